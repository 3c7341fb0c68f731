"""The last hour, made of the audit's answers."""

from __future__ import annotations

import asyncio
import datetime as dt
import math

import grpc
import pytest

from pretrade.audit.v1 import audit_pb2 as pb
from pretrade.console.calls import CallFailedError
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
        self.incomplete_minutes: set[int] | None = None
        """Those that cannot be read whole; None for all, if any is."""
        self.at_once = self.most_at_once = 0

    async def list(self, request: pb.ListDecisionsRequest) -> pb.ListDecisionsResponse:
        since = request.filter.since.ToDatetime(dt.UTC)
        assert request.filter.until.ToDatetime(dt.UTC) - since == dt.timedelta(minutes=1)
        assert request.page_size == SAMPLE
        minute = int(since.timestamp()) // 60
        self.asked.append(minute)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)  # as a call takes its time
        self.at_once -= 1
        is_whole = self.incomplete_minutes is not None and minute not in self.incomplete_minutes
        return pb.ListDecisionsResponse(
            decisions=self.decisions,
            next_page_token="more" if self.more else "",
            incomplete="" if is_whole else self.incomplete,
        )


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
    await hour.look(audit.list)
    assert not hour.summary().missing
    assert audit.most_at_once == 4, "the audit answers others meanwhile"
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


async def test_a_minute_that_could_be_read_does_not_hide_that_another_could_not() -> None:
    audit = Audit(audited(1_000))
    audit.incomplete, audit.incomplete_minutes = "the database is away", {int(_NOW // 60) - 5}
    hour = Hour(lambda: _NOW)
    await hour.look(audit.list)
    assert len(audit.asked) == MINUTES
    assert hour.summary().problem == "the database is away"


async def test_pages_that_look_at_the_same_time_ask_once() -> None:
    audit = Audit(audited(1_000))
    hour = Hour(lambda: _NOW)
    await asyncio.gather(*(hour.look(audit.list) for _ in range(5)))
    assert len(audit.asked) == len(set(audit.asked)) == MINUTES


async def test_a_look_at_a_slow_audit_ends_and_the_next_goes_on_where_it_ended() -> None:
    monotonic, audit = 0.0, Audit(audited(1_000))

    async def slowly(request: pb.ListDecisionsRequest) -> pb.ListDecisionsResponse:
        nonlocal monotonic
        monotonic += 0.05
        return await audit.list(request)

    hour = Hour(lambda: _NOW, lambda: monotonic)
    await hour.look(slowly)
    first = len(audit.asked)
    assert 10 <= first < 20
    assert hour.summary().missing == MINUTES - first
    await hour.look(slowly)
    assert len(audit.asked) > len(set(audit.asked)) > first, "the current minute is asked for anew, and older ones"


async def test_a_failure_ends_the_look_and_is_said() -> None:
    audit = Audit(audited(1_000))

    async def failing(request: pb.ListDecisionsRequest) -> pb.ListDecisionsResponse:
        if len(audit.asked) == 6:
            raise CallFailedError("the audit does not answer", grpc.StatusCode.UNAVAILABLE)
        return await audit.list(request)

    hour = Hour(lambda: _NOW)
    with pytest.raises(CallFailedError, match="does not answer"):
        await hour.look(failing)
    assert hour.summary().minute.decisions >= 6
    assert len(audit.asked) < 12
    audit.asked.append(0)
    await hour.look(failing)
    assert not hour.summary().missing


async def test_a_sample_says_that_it_is_one() -> None:
    hour = Hour(lambda: _NOW)
    assert math.isnan(hour.summary().in_time)
    await hour.look(Audit(audited(1_000), more=True).list)
    assert not hour.summary().minute.is_whole
    assert hour.summary().in_time == 1.0


async def test_the_chart_has_a_gap_where_nothing_was_decided() -> None:
    audit = Audit(audited(2_500))

    async def of_this_minute(request: pb.ListDecisionsRequest) -> pb.ListDecisionsResponse:
        is_current = request.filter.since.seconds == _NOW // 60 * 60
        return await audit.list(request) if is_current else pb.ListDecisionsResponse()

    hour = Hour(lambda: _NOW)
    await hour.look(of_this_minute)
    series = hour.series()
    assert series["time"][-1] == _NOW // 60 * 60
    assert (series["p50_ms"][0], series["p50_ms"][-1]) == (None, 2.5)
    assert series["not_in_time"][-1] == 0.0
