"""Bars and decisions as the chart draws them."""

from __future__ import annotations

import datetime as dt

from feature_cache.ta1.indicators import FEATURES
from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.audit.v1 import audit_pb2
from pretrade.console.charting import OTHERS, PANES, columns, last_second, marks, newest, pane
from pretrade.decision.v1 import decision_pb2

BEGIN = 1_795_575_720


def bar(number: int, **fields: float) -> pb.Bar:
    found = pb.Bar(complete=True, **fields)  # type: ignore[arg-type]  # each field has its own kind of number
    found.start.FromSeconds(BEGIN + 10 * number)
    return found


def traded(number: int, close: float) -> pb.Bar:
    return bar(number, open=100.0, high=101.5, low=99.0, close=close, trades=2, volume=3.0, mid_open=100.25)


def decided(seconds: float, heard: int, side: int, decision_id: str) -> audit_pb2.AuditedDecision:
    found = audit_pb2.AuditedDecision(heard_action=heard)  # type: ignore[arg-type]  # the number of an enum's value
    found.packet.order.side = side  # type: ignore[assignment]  # the same
    found.packet.decision.decision_id = decision_id
    found.packet.decision.source = decision_pb2.SOURCE_PRIMARY
    found.packet.decision.decided_at.FromMicroseconds(int((BEGIN + seconds) * 1e6))
    return found


def test_a_bar_without_a_trade_has_a_mid_and_no_candle() -> None:
    found = columns([traded(0, 100.75), bar(1, mid_open=100.5)])
    assert found["time"] == [BEGIN, BEGIN + 10]
    assert found["close"] == [100.75, None]
    assert (found["mid_open"], found["whole"]) == ([100.25, 100.5], [True, True])


def test_the_pane_has_the_volume_or_an_indicator_where_that_is_defined() -> None:
    bars = [traded(0, 100.75), bar(1)]
    bars[1].indicators["rsi_14"] = -3.5
    assert pane(bars, "volume") == [3.0, 0.0]
    assert pane(bars, "rsi_14") == [None, -3.5]


def test_every_indicator_that_is_offered_is_one_of_ta1() -> None:
    assert PANES.keys() - {"volume"} <= {feature.name for feature in FEATURES}


def test_prices_are_shown_with_as_many_decimals_as_tell_them_apart() -> None:
    assert columns([traded(0, 100.5)])["digits"] == 2
    assert columns([traded(0, 100.12345)])["digits"] == 5
    assert columns([bar(0, open=100.0, mid_open=100.0)])["digits"] == 0
    assert columns([bar(0, mid_open=0.1 + 0.2)])["digits"] == 2, "rounding is no price"
    assert columns([])["digits"] == 0


def test_the_newest_bar_is_said_in_words() -> None:
    assert newest([]) == ""
    assert "open 100, high 101.5, low 99, close 100.75, volume 3 in 2 trades." in newest([traded(0, 100.75)])
    quiet = bar(1)
    quiet.lacks.extend(["mid", "continuity"])
    assert newest([traded(0, 1.0), quiet]).endswith("no trade. It lacks: mid, continuity.")


def test_decisions_of_one_bar_that_ended_alike_are_one_mark_that_leads_to_the_newest() -> None:
    trade, buy = audit_pb2.HEARD_ACTION_TRADE, decision_pb2.SIDE_BUY
    decisions = [
        decided(11, audit_pb2.HEARD_ACTION_ABSTAIN, buy, "e"),
        decided(9, trade, decision_pb2.SIDE_SELL, "d"),
        decided(8, trade, buy, "c"),
        decided(2, trade, buy, "b"),
        decided(1, audit_pb2.HEARD_ACTION_NO_TRADE, buy, "a"),
    ]
    found = marks(decisions, "10s")
    shown = [(one["time"] - BEGIN, one["glyph"], one["tone"], one["below"], one["href"]) for one in found]
    assert shown == [
        (10, OTHERS, "warn", True, "/decisions/e"),
        (0, "▼", "good", False, "/decisions/d"),
        (0, "▲", "good", True, "/decisions/c"),
        (0, "△", "plain", True, "/decisions/a"),
    ]
    labels = [one["label"] for one in found]
    assert labels[2].startswith("2 × TRADE buy, the newest at ")
    assert labels[3].startswith("NO_TRADE buy at ")
    assert labels[3].endswith(" by PRIMARY")


def test_the_end_of_a_page_is_where_its_newest_bar_ends() -> None:
    assert last_second([traded(0, 1.0)], "10s") == dt.datetime.fromtimestamp(BEGIN + 10, dt.UTC)
