"""What keeps orders in columns safe where something goes wrong after they were begun, or as they are begun."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from support.plain_orders import busy_plane, orders_of
from support.planes import Plane, notes_in, packets_in
from support.scripted_replica import answers, hangs

from fallback.budget import BudgetSettings
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision import blocks as blocks_module
from server.decision.packets import PacketBatch
from server.decision.pending import Waited
from server.decision.promise import Promise
from server.decision.record import Decided
from server.errors import DeadlineError, JournalError
from server.inference.batcher import MicroBatcher
from server.inference.wire import ModelIdentity, ScoreBatch

ORDERS = 6
WAYS = pytest.mark.parametrize("together", [True, False], ids=["one call", "many callers"])


@pytest.fixture(autouse=True, scope="module")
def few() -> Iterator[None]:
    """Four orders are enough for a block here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module, "LEAST", 4)
        yield


class Asking:
    """Orders that were begun in columns, whichever way they came.

    Args:
        p: Decides.
        together: As one call; otherwise each has a caller of its own.
        orders: How many.
    """

    def __init__(self, p: Plane, together: bool, orders: int = ORDERS) -> None:
        self._p = p
        now, made = p.clock(), orders_of(Random(1), orders)
        self.begun = p.dataplane.begin_together(made, now, now + 9.0) if together else None
        self._promises: list[Waited] = []
        if self.begun is None:
            for order in made:
                promise = p.dataplane.begin(order, now, now + 9.0, in_company=True)
                assert isinstance(promise, Promise)
                self._promises.append(promise)

    async def outcomes(self) -> list[pb.Decision | BaseException]:
        """The decision of each order, or why there is none."""
        if self.begun is None:
            ended = await asyncio.gather(*self._promises, return_exceptions=True)
            return [one if isinstance(one, BaseException) else pb.Decision.FromString(one.wire) for one in ended]
        await self.begun.ended()
        found: list[pb.Decision | BaseException] = []
        for one in self.begun.outcomes():
            error = None if isinstance(one, bytes) else one.exception()
            wire = one if isinstance(one, bytes) else b"" if error else one.result().wire
            found.append(error or pb.Decision.FromString(wire))
        return found

    def leave(self) -> None:
        """The caller of all orders, or of the third, leaves."""
        if self.begun is None:
            self._p.dataplane.give_up(self._promises[2])
        else:
            self._p.dataplane.give_up_together(self.begun)


def in_columns(p: Plane) -> float:
    """Orders that were decided in columns."""
    return p.metrics.blocks.buckets()[1]


def held_commit(p: Plane, monkeypatch: pytest.MonkeyPatch) -> asyncio.Future[bool]:
    """Has the test say when, and whether, decisions are durable."""
    commit: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(p.journal, "append_batch", lambda batch: commit)
    return commit


async def recorded(p: Plane) -> None:
    """Waits until the decisions are written down."""
    async with asyncio.timeout(30):
        while p.replies.owed < ORDERS:  # noqa: ASYNC110 - a plain attribute
            await asyncio.sleep(0)


@WAYS
async def test_none_of_them_trades_when_their_commit_fails(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        commit = held_commit(p, monkeypatch)
        asking = Asking(p, together)
        await recorded(p)
        commit.set_exception(JournalError("EIO"))
        for one in await asking.outcomes():
            assert isinstance(one, pb.Decision)
            assert (one.action, one.reasons[-1]) == (pb.ACTION_ABSTAIN, pb.REASON_CODE_AUDIT_UNAVAILABLE)
        assert (p.replies.owed, p.admission.in_flight) == (0, 0)


@WAYS
async def test_none_of_them_is_told_after_its_deadline_what_became_durable_too_late(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        commit = held_commit(p, monkeypatch)
        asking = Asking(p, together)
        await recorded(p)
        # This process stood still meanwhile, so nobody has looked at the deadlines.
        monkeypatch.setattr(p.dataplane._recorder, "_clock", lambda: p.clock() + 1_000.0)
        commit.set_result(True)
        assert {type(one) for one in await asking.outcomes()} == {DeadlineError}
        assert p.replies.unconfirmed == {"deadline": ORDERS}
        assert (p.metrics.late, p.admission.in_flight) == (ORDERS, 0)


@WAYS
async def test_a_bug_before_they_are_written_down_has_each_of_them_go_alone(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        new_ids = p.dataplane._recorder._new_ids
        calls = Counter[str]()

        def fails_first(count: int) -> Sequence[str]:
            calls["made"] += 1
            if calls["made"] == 1:
                raise RuntimeError("a bug")
            return new_ids(count)

        monkeypatch.setattr(p.dataplane._recorder, "_new_ids", fails_first)
        for one in await Asking(p, together).outcomes():
            assert isinstance(one, pb.Decision)
            assert one.source == pb.SOURCE_PRIMARY
            stages = [use.stage for use in one.budget.stages]
            assert len(set(stages)) == len(stages), "each entry of the ledger is there once"
        assert (+p.metrics.alone, p.admission.in_flight) == ({"audit": ORDERS}, 0)
        assert in_columns(p) == 0


@WAYS
async def test_a_bug_while_they_are_written_down_is_told_to_every_caller(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_batch: PacketBatch, _decided: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(PacketBatch, "add_block", broken)
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        assert {type(one) for one in await Asking(p, together).outcomes()} == {RuntimeError}
        await asyncio.sleep(0)
        assert p.admission.in_flight == 0
        await p.journal.flush()
    assert not packets_in(tmp_path)


@WAYS
async def test_a_bug_while_they_are_parted_has_each_of_them_go_alone(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        monkeypatch.setattr(p.routing, "parted", lambda *_: 1 / 0)
        for one in await Asking(p, together).outcomes():
            assert isinstance(one, pb.Decision)
            assert one.source == pb.SOURCE_PRIMARY
        assert (p.metrics.alone["bug"], p.admission.in_flight) == (ORDERS, 0)
        assert p.chain.broken == {"model": 1}
        assert in_columns(p) == 0


@WAYS
async def test_a_bug_in_what_is_known_of_the_market_has_each_of_them_go_alone(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        monkeypatch.setattr(p.dataplane._markets, "views", broken)
        sources = {one.source for one in await Asking(p, together).outcomes() if isinstance(one, pb.Decision)}
        assert sources == {pb.SOURCE_PRIMARY}
        assert (+p.metrics.alone, p.admission.in_flight) == ({"market": ORDERS}, 0)


async def test_of_a_call_that_two_versions_scored_each_order_says_its_own(tmp_path: Path) -> None:
    versions = ["aa" * 8, "bb" * 8]

    async def swapped(rows: list[bytes]) -> ScoreBatch:
        await asyncio.sleep(0.001)
        model = ModelIdentity("champion", versions[min(p.primary.calls, 2) - 1], 0.5, 0)
        return ScoreBatch(model, np.full(len(rows), 0.75, dtype=np.float32))

    async with busy_plane(tmp_path, swapped, hangs) as p:
        p.primary.batcher._row_limit.limit = 4
        found = [one for one in await Asking(p, together=True).outcomes() if isinstance(one, pb.Decision)]
        assert Counter(one.model_version for one in found) == {versions[0]: 4, versions[1]: 2}
        assert +p.metrics.alone == {"mixed": ORDERS}
        await p.journal.flush()
    for packet in packets_in(tmp_path):
        assert [one.model_version for one in packet.attempts] == [packet.decision.model_version]


@WAYS
async def test_a_replica_that_cannot_answer_in_time_is_asked_for_none_of_them(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MicroBatcher, "expected_seconds", 100.0)
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        for one in await Asking(p, together).outcomes():
            assert isinstance(one, pb.Decision)
            assert pb.DEGRADATION_NO_TIME_FOR_MODEL in one.degradations
        assert (p.primary.calls, p.secondary.calls) == (0, 0)
        assert +p.metrics.alone == {"stage": ORDERS}


@WAYS
async def test_of_those_who_leave_as_their_scores_come_nothing_is_written_down(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        answered = p.dataplane._blocks._answered

        def leaving(block: Any) -> None:
            asking.leave()
            answered(block)

        monkeypatch.setattr(p.dataplane._blocks, "_answered", leaving)
        asking = Asking(p, together)
        left = ORDERS if together else 1
        async with asyncio.timeout(30):
            while p.metrics.cancelled < left:  # noqa: ASYNC110 - a plain attribute
                await asyncio.sleep(0)
        if not together:
            assert sum(isinstance(one, pb.Decision) for one in await asking.outcomes()) == ORDERS - 1
        for _ in range(5):
            await asyncio.sleep(0)
        assert p.admission.in_flight == 0
        await p.journal.flush()
    assert len(packets_in(tmp_path)) == ORDERS - left
    assert not notes_in(tmp_path)


@WAYS
async def test_of_answers_that_nobody_reports_as_sent_it_is_noted_that_this_is_not_known(
    together: bool, tmp_path: Path
) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        assert all(isinstance(one, pb.Decision) for one in await Asking(p, together).outcomes())
        assert (in_columns(p), p.replies.owed) == (ORDERS, ORDERS)
        p.replies._note_unsent(math.inf)
        async with asyncio.timeout(30):
            while p.replies.waiting:  # noqa: ASYNC110 - a plain attribute
                await asyncio.sleep(0.001)
        assert p.replies.unconfirmed == {"unsent": ORDERS}
    assert len(notes_in(tmp_path)) == ORDERS


async def test_a_call_for_which_there_are_not_enough_places_begins_with_none(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        p.admission._limit = float(ORDERS)  # a part of which is for those that only reduce
        now = p.clock()
        assert p.dataplane.begin_together(orders_of(Random(1), ORDERS), now, now + 9.0) is None
        assert p.admission.in_flight == 0
        assert p.dataplane.begin_together(orders_of(Random(1), 2), now, now - 1.0) is None, "it is too late"
        assert p.admission.in_flight == 0


async def test_what_a_late_audit_took_out_of_a_block_is_not_among_its_decisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = BudgetSettings(cap_seconds=0.5, audit_reserve_seconds=0.1, reply_reserve_seconds=0.05)
    async with busy_plane(tmp_path, answers(0.75), answers(0.75), budget=budget) as p:
        commit = held_commit(p, monkeypatch)
        asking = Asking(p, together=True)
        outcomes = await asking.outcomes()
        assert {type(one) for one in outcomes} <= {pb.Decision, DeadlineError}
        assert asking.begun is not None
        assert asking.begun.take_decided() == [], "their callers hear of each by itself"
        (block,) = asking.begun.blocks
        assert all(isinstance(one.result(), Decided) for one in block.apart.values() if one.exception() is None)
        commit.set_result(True)
