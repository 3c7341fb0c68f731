"""The runbook as the console shows it."""

from __future__ import annotations

import re
from pathlib import Path

from pretrade.client.cli import worst
from pretrade.console.runbook import anchor_of, body, rendered, section

_CLIENT = Path(worst.__file__)


def test_every_section_that_a_fault_or_an_alert_names_is_on_the_page() -> None:
    anchors = set(re.findall(r'<h\d id="([^"]+)"', body()))
    assert len(anchors) > 40
    named = set(re.findall(r'"([A-Z][a-z]+[A-Z]\w+)"', _CLIENT.read_text()))
    assert {name.lower() for name in named} <= anchors
    rules = (Path(__file__).parents[3] / "k8s/components/monitoring/rules.yaml").read_text()
    for url in re.findall(r'runbook_url: "([^"]+)"', rules):
        if "{{" not in url:
            path, _, anchor = section(url).partition("#")
            assert path == "/runbook"
            assert anchor in anchors, url


def test_links_within_the_page_lead_somewhere() -> None:
    anchors = set(re.findall(r'<h\d id="([^"]+)"', body()))
    inner = set(re.findall(r'href="#([^"]+)"', body()))
    assert inner
    assert inner <= anchors


def test_links_to_pages_that_the_console_does_not_have_are_text() -> None:
    found = rendered("Read [control](control.md#first), [below](#a) and [that](https://example.com/).\n\n## A\n")
    assert found.startswith('<p>Read control, <a href="#a">below</a> and <a href="https://example.com/">that</a>.</p>')
    assert '<h2 id="a">A</h2>' in found


def test_no_markup_of_a_page_is_passed_on() -> None:
    assert "<script" not in rendered("A <script>alert(1)</script> and\n\n<img src=x onerror=alert(1)>\n")
    assert "href" not in rendered("[x](javascript:alert(1))")


def test_an_anchor_is_that_of_github() -> None:
    assert anchor_of("What a `model` does not know, yet") == "what-a-model-does-not-know-yet"
    assert not section("docs/control.md#first")
