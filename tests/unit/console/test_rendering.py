"""What pages say, and that nothing on them is code of somebody else."""

from __future__ import annotations

import math

import pytest
from google.protobuf.duration_pb2 import Duration

from pretrade.admin.v1 import admin_pb2
from pretrade.console import rendering


def test_what_others_wrote_is_shown_and_not_run() -> None:
    found = admin_pb2.ListChangesResponse()
    found.changes.add(author="<script>alert(1)</script>", reason='"><img src=x>', diff=["a <b>"])
    shown = rendering.Pages().page("_changes", found=found)
    assert "<script>" not in shown
    assert "<img" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59, "59 s"), (200, "3 m 20 s"), (3_600, "1 h 0 m"), (90_000, "1 d 1 h"), (-61, "−1 m 1 s")],
)
def test_a_span_is_told_by_its_two_largest_units(seconds: int, text: str) -> None:
    assert rendering.span(Duration(seconds=seconds)) == text


def test_milliseconds_have_the_places_that_tell_something() -> None:
    assert rendering.milliseconds(Duration(nanos=1_234_000)) == "1.2"
    assert rendering.microseconds(1_234_567) == "1,235"
    assert rendering.microseconds(math.nan) == "–"


def test_a_value_that_only_newer_servers_know_is_shown_by_its_number() -> None:
    assert rendering.named(admin_pb2.TRADING_STATE_HALTED, "trading_state") == "HALTED"
    assert rendering.named(97, "trading_state") == "97"
