"""Orders of several callers that are decided in columns: each gets what it gets alone, at its own deadline."""

from __future__ import annotations

import asyncio
import gc
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plain_orders import busy_plane, orders_of, scores
from support.planes import Plane, notes_in, packets_in
from support.scripted_replica import answers, fails, hangs

from fallback.budget import BudgetSettings
from fallback.guards import GuardSettings
from fallback.order import CallContext, Order
from feature_cache.compiled import compiled
from feature_cache.features import MF1
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision import blocks as blocks_module
from server.decision.decided_block import DecidedBlock, DecidedRow
from server.decision.many_calls import ManyCalls
from server.decision.pending import Waited
from server.decision.plane import Deciding
from server.decision.promise import Promise
from server.decision.record import Decided
from server.decision.reports import DecisionReports, Sink
from server.errors import DeadlineError
from server.inference.breaker import Mode
from server.inference.outcome import Outcome


@pytest.fixture(autouse=True, scope="module")
def few() -> Iterator[None]:
    """Four orders are enough for a block here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module, "LEAST", 4)
        yield


def begun(p: Plane, orders: Sequence[Order], seconds: float = 9.0) -> list[Waited]:
    """Orders that came one after another in one turn of the event loop, each with a microsecond more than the last."""
    now = p.clock()
    made = []
    for number, order in enumerate(orders):
        later = number * 1e-6
        promise = p.dataplane.begin(order, now + later, now + seconds + 2 * later, in_company=True)
        assert isinstance(promise, Promise)
        made.append(promise)
    return made


def blocks(promises: Sequence[Waited]) -> set[ManyCalls]:
    """The blocks that they are in now."""
    return {one.case for one in promises if isinstance(one.case, ManyCalls)}


def in_columns(p: Plane) -> float:
    """Orders that were decided in columns, as the metrics say."""
    return p.metrics.blocks.buckets()[1]


async def recorded(p: Plane, orders: int) -> None:
    """Waits until so many decisions are written down."""
    async with asyncio.timeout(30):
        while p.replies.owed < orders:  # noqa: ASYNC110 - a plain attribute
            await asyncio.sleep(0)


async def settled(p: Plane) -> None:
    """Waits until it is durable of all decisions what their callers heard."""
    async with asyncio.timeout(30):
        while p.replies.owed or p.replies.waiting:  # noqa: ASYNC110 - plain attributes
            await asyncio.sleep(0.001)


async def test_each_has_its_own_times_wherever_they_count(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        p.objective._min_allowed_seconds = 8.0
        told = Sink(
            "test",
            lambda _: None,
            one_in=2,
            slow_seconds=4.4,
            follows_traces=False,
            max_per_second=1e6,
        )
        p.dataplane._following._reports = DecisionReports((told,))
        now = p.clock()
        arrivals = {"o-0": now - 4.5, "o-1": now - 1.0, "o-2": now - 0.25, "o-3": now}
        deadlines = {ref: now + 5.0 + place * 1e-4 for place, ref in enumerate(arrivals)}
        orders = orders_of(Random(1), 4)
        made = [
            p.dataplane.begin(order, arrivals[order.order_ref], deadlines[order.order_ref], in_company=True)
            for order in orders
        ]
        decisions = [pb.Decision.FromString((await one).wire) for one in made]
        took = p.clock() - now
        assert p.objective.met == 1, "one of them had so much time"
        assert told.chosen == {"slow": 1, "sample": 1}
        latency = p.metrics.latency.buckets()[1]
        assert 5.75 <= latency <= 5.75 + 4 * took
        kept = {(order.instrument, order.side): arrivals[order.order_ref] for order in orders}
        cached: Any = p.dataplane._following._cached_scores
        assert {question: score.at for question, score in cached._scores.items()} == kept
        await p.journal.flush()
    packets = {packet.order.order_ref: packet for packet in packets_in(tmp_path)}
    for decision in decisions:
        arrived, deadline = arrivals[decision.order_ref], deadlines[decision.order_ref]
        packet = packets[decision.order_ref]
        assert packet.arrived_monotonic_ns == int(arrived * 1e9)
        for budget in (decision.budget, packet.decision.budget):
            assert budget.allowed_us == int((deadline - arrived) * 1e6)
            first, *others = budget.stages
            assert (first.stage, first.allowed_us) == (pb.STAGE_ADMISSION, budget.allowed_us)
            assert 0 <= first.used_us - int((now - arrived) * 1e6) <= took * 1e6
            assert first.used_us <= sum(use.used_us for use in budget.stages) <= budget.used_us
            assert budget.used_us <= int((now + took - arrived) * 1e6)
            assert all(use.allowed_us <= 5e6 for use in others), "the block's, which is the earliest"


async def test_of_a_block_that_a_replica_was_passed_over_for_every_decision_is_reported(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        p.primary.breaker.force(Mode.FORCED_OPEN)
        told = Sink("test", lambda _: None, one_in=0, slow_seconds=60.0, follows_traces=False, max_per_second=1e6)
        p.dataplane._following._reports = DecisionReports((told,))
        decisions = await asyncio.gather(*begun(p, orders_of(Random(1), 4)))
        assert {one.source for one in decisions} == {pb.SOURCE_SECONDARY}
        assert in_columns(p) == 4
        assert told.chosen == {"degraded": 4}


async def test_what_has_another_deadline_is_in_another_block_or_alone(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        orders = orders_of(Random(1), 12)
        now = p.clock()
        made: list[Deciding] = []
        for place, order in enumerate(orders):
            seconds = 9.0 if place % 2 else 5.0 + (place == 10)
            made.append(p.dataplane.begin(order, now, now + seconds, in_company=True))
        await asyncio.sleep(0)
        promises = [one for one in made if isinstance(one, Promise)]
        assert sorted(len(one) for one in blocks(promises)) == [5, 6]
        assert sum(isinstance(one, DecidedRow) for one in await asyncio.gather(*made)) == 11
        assert (+p.metrics.alone, in_columns(p)) == ({"deadlines": 1}, 11)


@pytest.mark.parametrize(
    ("why", "counted"),
    [("stages", "chain"), ("stale", "control"), ("hedge", "stage"), ("no features", "market"), ("a bug", "stage")],
)
async def test_where_something_else_is_unusual_each_is_decided_alone(
    why: str, counted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        if why == "stages":
            p.chain.ask_in_order(("rules", "model"))
        elif why == "stale":
            monkeypatch.setattr(type(p.control), "stale", True)
        elif why == "hedge":
            monkeypatch.setattr(p.champion, "_hedge", True)
        elif why == "no features":
            p.feature_cache._entries.clear()
        else:
            monkeypatch.setattr(p.champion, "begin_block", None)
        decided = await asyncio.gather(*begun(p, orders_of(Random(1), 5)))
        assert {type(one) for one in decided} == {Decided}
        assert (p.admission.in_flight, p.chain.broken.total()) == (0, why == "a bug")
        assert (+p.metrics.alone, in_columns(p)) == ({counted: 5}, 0)


async def test_the_entry_of_such_a_block_is_the_same_compiled_and_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled("server.decision.entry_wire_c") is None:
        pytest.skip("nothing is compiled here")
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        decided = await begun(p, orders_of(Random(1), 5))[0]
        assert isinstance(decided, DecidedRow)
        batch = p.packets.batch()
        batch.add_block(decided.block)
        compiled_entry = batch.entry()
        monkeypatch.setattr("server.decision.packets._compiled", None)
        assert batch.entry() == compiled_entry


async def test_one_that_is_late_does_so_at_its_own_deadline_and_the_others_wait_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "_NEAR_SECONDS", 100.0)
    budget = BudgetSettings(cap_seconds=10.0, audit_reserve_seconds=0.1, reply_reserve_seconds=0.05)
    async with busy_plane(tmp_path, answers(0.75), answers(0.75), budget=budget) as p:
        never: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        monkeypatch.setattr(p.journal, "append_batch", lambda batch: never)
        now = p.clock()
        orders = orders_of(Random(1), 5)
        hurried = p.dataplane.begin(orders[0], now, now + 1.0, in_company=True)
        patient = [p.dataplane.begin(order, now, now + 9.9, in_company=True) for order in orders[1:]]
        try:
            decided = await hurried
        except DeadlineError:  # where the machine is that slow
            pass
        else:
            assert isinstance(decided, Decided)
            assert (decided.abstained, decided.reasons[-1]) == (True, pb.REASON_CODE_AUDIT_LATE)
        assert not any(one.done() for one in patient)
        never.set_result(True)
        assert {(await one).order_ref for one in patient} == {"o-1", "o-2", "o-3", "o-4"}
        actions = {pb.Decision.FromString((await one).wire).action for one in patient}
        assert pb.ACTION_ABSTAIN not in actions
        assert p.admission.in_flight == 0


async def test_none_waits_for_those_whom_the_model_gets_in_a_later_batch(tmp_path: Path) -> None:
    may_answer = asyncio.Event()
    sure = answers(0.75)

    async def one_batch_at_once(rows: list[bytes]) -> Any:
        if p.primary.calls > 1:
            await may_answer.wait()
        return await sure(rows)

    async with busy_plane(tmp_path, one_batch_at_once, hangs) as p:
        p.primary.batcher._row_limit.limit = 4
        promises = begun(p, orders_of(Random(1), 7))
        first = [await one for one in promises[:4]]
        assert {type(one) for one in first} == {Decided}
        assert not any(one.done() for one in promises[4:])
        assert {len(one) for one in blocks(promises)} == {7}, "they leave it when all have their results"
        may_answer.set()
        p.primary.batcher._row_limit.limit = 4
        later = [await one for one in promises[4:]]
        assert {type(one) for one in later} == {DecidedRow}
        assert (p.chain.broken.total(), p.admission.in_flight) == (0, 0)
        assert (p.champion.attempts.total(), sum(p.metrics.by_source().values())) == (7, 7)
        assert (+p.metrics.alone, in_columns(p)) == ({"flight": 4}, 3)


@pytest.mark.parametrize("when", ["waiting", "queued", "asked"])
async def test_one_who_leaves_before_its_decision_is_made_takes_nothing_from_the_others(
    when: str, tmp_path: Path
) -> None:
    asked, may_answer = asyncio.Event(), asyncio.Event()
    sure = answers(0.75)

    sent: list[int] = []

    async def when_told(rows: list[bytes]) -> Any:
        sent.append(len(rows))
        asked.set()
        await may_answer.wait()
        return await sure(rows)

    async with busy_plane(tmp_path, when_told, hangs) as p:
        promises = begun(p, orders_of(Random(1), 6))
        if when == "asked":
            await asked.wait()
        elif when == "queued":
            await asyncio.sleep(0)
            assert p.primary.batcher.queued == 6
        p.dataplane.give_up(promises[2])
        may_answer.set()
        decided = [await one for place, one in enumerate(promises) if place != 2]
        assert {type(one) for one in decided} == {DecidedRow}
        with pytest.raises(asyncio.CancelledError):
            await promises[2]
        assert sent == [6 if when == "asked" else 5], "a row that nobody wants is not sent"
        assert (p.metrics.cancelled, p.admission.in_flight) == (1, 0)
        assert sum(p.metrics.by_source().values()) == 5
        await p.journal.flush()
    assert {one.order.order_ref for one in packets_in(tmp_path)} == {one.order_ref for one in decided}


async def test_one_whose_row_still_waits_for_its_batch_may_leave(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, hangs, hangs) as p:
        promises = begun(p, orders_of(Random(1), 6))
        await asyncio.sleep(0)
        (block,) = blocks(promises)
        for promise in promises:
            p.dataplane.give_up(promise)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (block.missing, block.is_left()) == (0, True)
        assert (p.metrics.cancelled, p.admission.in_flight) == (6, 0)
        await p.journal.flush()
    assert not packets_in(tmp_path)


async def test_of_one_who_leaves_before_the_audit_is_done_it_is_noted_that_nobody_heard_it(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        promises = begun(p, orders_of(Random(1), 6))
        await recorded(p, 6)
        p.dataplane.give_up(promises[3])
        decided = [await one for place, one in enumerate(promises) if place != 3]
        p.dataplane.heard(decided)
        await settled(p)
        assert (p.metrics.cancelled, p.admission.in_flight) == (1, 0)
        assert sum(p.metrics.by_source().values()) == 5
    (note,) = notes_in(tmp_path)
    (left,) = (packet for packet in packets_in(tmp_path) if packet.order.order_ref == "o-3")
    assert note.decision_id == left.decision.decision_id


async def test_what_each_caller_heard_is_known_of_each(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        decided = [await one for one in begun(p, orders_of(Random(1), 6))]
        p.dataplane.heard(decided[:2])
        assert p.replies.owed == 6, "they are held until all of them are settled"
        p.dataplane.unheard(decided[2], "deadline")
        p.dataplane.heard(decided[3:5])
        p.dataplane.unheard(decided[0], "cancelled")  # what was heard stays heard
        p.dataplane.in_doubt(decided[5:])
        await settled(p)
        assert p.replies.unconfirmed == {"deadline": 1, "unsent": 1}
    ids = {packet.order.order_ref: packet.decision.decision_id for packet in packets_in(tmp_path)}
    assert {note.decision_id for note in notes_in(tmp_path)} == {ids["o-2"], ids["o-5"]}


async def test_none_of_them_trades_when_the_audit_cannot_take_it(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75), journal_mebibytes=1) as p:
        note = packet_pb2.ReplyUnconfirmed(decision_id="a" * 2**20)
        await p.journal.append(packet_pb2.JournalEntry(reply_unconfirmed=note).SerializeToString())
        decisions = [pb.Decision.FromString((await one).wire) for one in begun(p, orders_of(Random(3), 6))]
        assert {decision.action for decision in decisions} == {pb.ACTION_ABSTAIN}
        assert {decision.reasons[-1] for decision in decisions} == {pb.REASON_CODE_AUDIT_UNAVAILABLE}
        assert (p.replies.owed, p.admission.in_flight) == (0, 0)


async def test_a_bug_that_one_of_them_meets_after_its_decision_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        orders = orders_of(Random(1), 6)
        scores_of = p.dataplane._following._cached_scores
        remember = scores_of.remember

        def broken(case: Any, answer: Any, decision_id: str) -> None:
            if case.order is orders[-1]:
                raise RuntimeError("a bug")
            remember(case, answer, decision_id)

        def all_broken(_block: Any, _ids: Any) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(scores_of, "remember", broken)
        monkeypatch.setattr(scores_of, "remember_block", all_broken)
        ended = await asyncio.gather(*begun(p, orders), return_exceptions=True)
        assert [type(one) for one in ended] == [Decided] * 5 + [RuntimeError]
        assert (p.objective.met, p.admission.in_flight) == (5, 0)


async def test_what_comes_with_a_key_a_trace_or_features_of_its_own_goes_alone(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        orders = orders_of(Random(1), 8)
        orders[0].context = CallContext(trace_id="ab" * 16)
        orders[1].idempotency_key = "key"
        orders[2].caller_features = np.zeros(len(MF1), dtype=np.float32)
        orders[3].context = CallContext(correlation_id="work")
        now = p.clock()
        made = [p.dataplane.begin(order, now, now + 9.0, in_company=True) for order in orders]
        ways = [type(one) for one in await asyncio.gather(*made)]
        assert ways == [Decided] * 3 + [DecidedRow] * 5
        await p.journal.flush()
    assert {one.order.order_ref: one.correlation_id for one in packets_in(tmp_path) if one.correlation_id} == {
        "o-3": "work"
    }


async def test_such_a_block_that_was_answered_leaves_the_collector_nothing(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                decided = [await one for one in begun(p, orders_of(Random(1), 6))]
                p.dataplane.heard(decided)
            del decided
            await p.journal.flush()
            await asyncio.sleep(0)
            left = [one for one in gc.get_objects() if type(one) in (ManyCalls, DecidedBlock, DecidedRow)]
        finally:
            gc.enable()
        assert len(left) <= 2, "the last one, which deadlines may still know"


_MOMENTS = ("waiting", "asked", "recorded", "decided")
_Ends = st.tuples(st.sampled_from((*_MOMENTS, "heard")), st.sampled_from((0.0, 0.001, 3.0)))


async def _live(path: Path, ends: Sequence[tuple[str, float]], failing: bool) -> None:
    """Orders whose callers leave at these moments, or hear their decisions; their deadlines are so much later."""
    left = [moment for moment, _ in ends if moment != "heard"]
    random = Random(len(ends))
    async with busy_plane(path, fails(Outcome.TRANSPORT) if failing else scores(random), answers(0.75)) as p:
        p.guards.configure(GuardSettings(price_collar_bps=50.0, max_notional=100_000.0))
        now = p.clock()
        promises = [
            p.dataplane.begin(order, now, now + 5.0 + later, in_company=True)
            for order, (_, later) in zip(orders_of(random, len(ends)), ends, strict=True)
        ]
        for moment in _MOMENTS:
            if moment == "asked":
                await asyncio.sleep(0)
            elif moment == "recorded" and len(left) < len(ends):
                await recorded(p, 1)
            elif moment == "decided":
                await asyncio.wait([asyncio.ensure_future(_end_of(one)) for one in promises])
            for promise, (end, _) in zip(promises, ends, strict=True):
                if end == moment:
                    p.dataplane.give_up(promise)
        heard = [promise.result() for promise, (end, _) in zip(promises, ends, strict=True) if end == "heard"]
        p.dataplane.heard(heard)
        await settled(p)
        await asyncio.sleep(0)
        assert (p.admission.in_flight, p.metrics.cancelled) == (0, len(left))
    written = {packet.decision.decision_id for packet in packets_in(path)}
    notes = [note.decision_id for note in notes_in(path)]
    assert sorted(notes) == sorted(written - {pb.Decision.FromString(one.wire).decision_id for one in heard})
    assert len(written) >= len(heard) + left.count("decided")


async def _end_of(promise: Deciding) -> None:
    while not promise.done():  # noqa: ASYNC110 - a promise has one caller, which is the test
        await asyncio.sleep(0.001)


@settings(max_examples=25, deadline=None)
@given(st.lists(_Ends, min_size=4, max_size=9), st.booleans())
def test_whenever_callers_leave_places_are_given_back_and_the_audit_says_who_heard(
    ends: list[tuple[str, float]], failing: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_live(Path(folder), ends, failing))
