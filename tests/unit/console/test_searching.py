"""Filters as people type them."""

from __future__ import annotations

import time
from urllib.parse import parse_qsl

import pytest

from pretrade.audit.v1 import audit_pb2 as pb
from pretrade.console.forms import FormError
from pretrade.console.searching import filter_of, live, next_page
from pretrade.decision.v1 import decision_pb2


def test_an_empty_form_restricts_nothing() -> None:
    empty = dict.fromkeys(("last", "instrument", "strategy", "heard", "decided", "source", "model"), "")
    assert filter_of(empty) == pb.DecisionFilter()
    assert filter_of({}) == pb.DecisionFilter()


def test_each_field_restricts_what_it_names() -> None:
    found = filter_of(
        {"instrument": "A.X, B.X", "strategy": "twap", "heard": "nothing", "decided": "trade", "source": "cached_score"}
    )
    assert list(found.instruments) == ["A.X", "B.X"]
    assert list(found.strategies) == ["twap"]
    assert list(found.heard_actions) == [pb.HEARD_ACTION_NOTHING]
    assert list(found.decided_actions) == [decision_pb2.ACTION_TRADE]
    assert list(found.sources) == [decision_pb2.SOURCE_CACHED_SCORE]


def test_all_pages_of_a_search_have_one_filter_whenever_they_are_asked_for() -> None:
    form = {"last": "10m", "strategy": "twap & co"}
    first = filter_of(form)
    assert abs(first.since.ToNanoseconds() - (time.time_ns() - 600 * 10**9)) < 60 * 10**9
    following = dict(parse_qsl(next_page(form, first, "token")))
    assert following["page"] == "token"
    assert filter_of(following) == first
    assert next_page(form, first, "") == ""


def test_a_live_tail_begins_now_with_the_same_filter() -> None:
    assert dict(parse_qsl(live({"last": "1d", "strategy": "twap", "page": "token"}))) == {"strategy": "twap"}


@pytest.mark.parametrize("form", [{"last": "-1h"}, {"source": "oracle"}, {"since": "1e99"}, {"model": "x" * 300}])
def test_what_cannot_be_understood_is_refused(form: dict[str, str]) -> None:
    with pytest.raises(FormError):
        filter_of(form)
