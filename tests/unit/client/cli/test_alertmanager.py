"""Conditions on alerts, as people write them and as Alertmanager takes them."""

from __future__ import annotations

import pytest

from pretrade.client.cli.alertmanager import Matcher


@pytest.mark.parametrize(
    ("text", "matcher", "shown"),
    [
        ("ReplicaDown", Matcher("alertname", "ReplicaDown"), "alertname=ReplicaDown"),
        ("replica=primary", Matcher("replica", "primary"), "replica=primary"),
        ('replica="primary"', Matcher("replica", "primary"), "replica=primary"),
        ("severity!=page", Matcher("severity", "page", is_equal=False), "severity!=page"),
        ("instance=~s-[01].*", Matcher("instance", "s-[01].*", is_regex=True), "instance=~s-[01].*"),
        ("slo!~answered.*", Matcher("slo", "answered.*", is_regex=True, is_equal=False), "slo!~answered.*"),
        ("region=", Matcher("region", ""), "region="),
        ("summary=a=b", Matcher("summary", "a=b"), "summary=a=b"),
    ],
)
def test_a_condition_is_read_and_shown(text: str, matcher: Matcher, shown: str) -> None:
    assert Matcher.parse(text) == matcher
    assert str(matcher) == shown


@pytest.mark.parametrize("text", ["", "two words", "=primary", "1st=primary", "replica=~(", "replica~x"])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"neither the name of an alert|no regular expression"):
        Matcher.parse(text)
