"""The last hour, made of the audit's answers."""

from __future__ import annotations

import asyncio
import datetime as dt
import math

import pytest

from pretrade.audit.v1 import audit_pb2 as pb
from pretrade.console.hour import MINUTES, SAMPLE, Hour, minute_of, quantile
from pretrade.decision.v1 import decision_pb2

_NOW = 1_800_000_030.0
"""In the middle of a minute."""


def audited(used_us: int, reply_status: str = "replied") -> pb.AuditedDecision:
    found = pb.AuditedDecision(reply_status=reply_status, heard_action=pb.HEARD_ACTION_NO_TRADE)
    found.packet.decision.source = decision_pb2.SOURCE_PRIMARY
    found.packet.decision.budget.used_us = used_us
    return found


class Audit:
    """Answers with the same decisions for every minute, and remembers which minutes it was asked for."""

    def __init__(self, *decisions: pb.AuditedDecision, more: bool = False) -> None:
        self.decisions = decisions
        self.more = more
        self.asked: list[int] = []
        self.incomplete = ""

    async def list(self, request: pb.ListDecisionsRequest) -> pb.ListDecisionsResponse:
        since = request.filter.since.ToDatetime(dt.UTC)
        assert request.filter.until.ToDatetime(dt.UTC) - since == dt.timedelta(minutes=1)
        assert request.page_size == SAMPLE
        self.asked.append(int(since.timestamp()) // 60)
        await asyncio.sleep(0)  # as a call takes its time
        token = "more" if self.more else ""
        return pb.ListDecisionsResponse(decisions=self.decisions, next_page_token=token, incomplete=self.incomplete)


def test_what_was_not_heard_in_time_is_counted_and_what_is_not_settled_is_not() -> None:
    decisions = [audited(100), audited(300, "reply_unconfirmed:deadline"), audited(200, "unsettled")]
    found = minute_of(decisions, is_whole=True)
    assert found.used_us == (100, 200, 300)
    assert (found.in_time, found.settled) == (1, 2)
    assert found.sources == {"PRIMARY": 3}


@pytest.mark.parametrize(("share", "value"), [(0.5, 50.0), (0.99, 99.0), (1.0, 100.0), (0.0, 1.0)])
def test_a_quantile_is_the_smallest_value_that_the_share_does_not_exceed(share: float, value: float) -> None:
    assert quantile(range(1, 101), share) == value


def test_there_is_no_quantile_of_nothing() -> None:
    assert math.isnan(quantile((), 0.5))


async def test_a_minute_that_is_over_is_asked_for_once_and_the_current_one_each_time() -> None:
    now, audit = _NOW, Audit(audited(1_000))
    hour = Hour(lambda: now)
    while hour.summary().missing:
        await hour.look(audit.list)
    current = int(now // 60)
    assert set(audit.asked) == set(range(current - MINUTES + 1, current + 1))
    audit.asked.clear()
    await hour.look(audit.list)
    assert audit.asked == [current]
    now += 60.0
    audit.asked.clear()
    await hour.look(audit.list)
    assert audit.asked == [current + 1, current]
    assert hour.summary().missing == 0, "the oldest minute is forgotten"


async def test_a_minute_is_asked_for_again_until_its_last_replies_are_settled() -> None:
    now, audit = _NOW, Audit(audited(1_000))
    hour = Hour(lambda: now)
    await hour.look(audit.list)
    now += 35.0  # five seconds into the next minute
    await hour.look(audit.list)
    audit.asked.clear()
    now += 20.0
    await hour.look(audit.list)
    assert int(_NOW // 60) in audit.asked
    audit.asked.clear()
    await hour.look(audit.list)
    assert int(_NOW // 60) not in audit.asked


async def test_a_minute_that_could_not_be_read_whole_is_asked_for_again() -> None:
    audit = Audit(audited(1_000))
    audit.incomplete = "the database is away"
    hour = Hour(lambda: _NOW)
    await hour.look(audit.list)
    assert hour.summary().problem == "the database is away"
    first = list(audit.asked)
    audit.incomplete = ""
    await hour.look(audit.list)
    assert audit.asked[len(first) :] == first
    assert not hour.summary().problem


async def test_pages_that_look_at_the_same_time_ask_once() -> None:
    audit = Audit(audited(1_000))
    hour = Hour(lambda: _NOW)
    await asyncio.gather(*(hour.look(audit.list) for _ in range(5)))
    assert len(audit.asked) == len(set(audit.asked)) == 12


async def test_a_sample_says_that_it_is_one() -> None:
    hour = Hour(lambda: _NOW)
    assert math.isnan(hour.summary().in_time)
    await hour.look(Audit(audited(1_000), more=True).list)
    assert not hour.summary().minute.is_whole
    assert hour.summary().in_time == 1.0


async def test_the_chart_has_a_gap_where_nothing_was_decided() -> None:
    hour = Hour(lambda: _NOW)
    await hour.look(Audit(audited(2_500)).list)
    series = hour.series()
    assert series["time"][-1] == _NOW // 60 * 60
    assert (series["p50_ms"][0], series["p50_ms"][-1]) == (None, 2.5)
    assert series["not_in_time"][-1] == 0.0
