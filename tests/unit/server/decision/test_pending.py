"""Orders that arrive together share the way to the model and to the disk, and get what each would get alone."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.planes import INSTRUMENT, Plane, market, packets_in, plane
from support.scripted_replica import answers, fails, hangs

from fallback.chain import StageName
from fallback.guards import GuardSettings
from fallback.order import Answer, Part
from feature_cache import features
from feature_cache.store.codec import encode
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.convert import OrderReader
from server.decision.pending import Pending
from server.decision.plane import Deciding
from server.decision.record import Decided, ReplyState
from server.inference.outcome import Outcome
from server.inference.rows import Row
from server.inference.wire import ModelIdentity, ScoreBatch

MANY = 200
"""More decisions under way than any test here has."""


def fresh(p: Plane) -> None:
    """Gives the server features that may decide for as long as a test takes."""
    p.dataplane._markets._max_age_seconds = 600.0
    assert p.feature_cache.accept(encode(market(0.1)))


async def by_row(rows: list[bytes]) -> ScoreBatch:
    """Scores that depend on the row and on nothing else."""
    first = [np.frombuffer(row, dtype=features.ROW)[1] for row in rows]
    scores = np.array([0.75 if value >= 0 else 0.25 for value in first], dtype=np.float32)
    return ScoreBatch(ModelIdentity("champion", "aa" * 8, 0.5, 0), scores)


class InProcess:
    """The model of `by_row` in this process."""

    name, version, threshold, expires_at, feature_set = "champion", "aa" * 8, 0.5, 0, features.MF1
    parts: tuple[Part, ...] = ()

    def scores_and_parts(self, rows: bytes) -> tuple[NDArray[np.float32], None]:
        first = np.frombuffer(rows, dtype=features.ROW).reshape(-1, features.N_FEATURES)[:, 1]
        return np.where(first >= 0, 0.75, 0.25).astype(np.float32), None


async def test_orders_of_one_turn_go_to_the_model_and_to_the_disk_together(tmp_path: Path) -> None:
    async with plane(tmp_path, answers(0.75), hangs, max_in_flight=MANY) as p:
        fresh(p)
        before = p.journal.batches
        decisions = await asyncio.gather(*(p.decide(own_features=False) for _ in range(8)))
        assert {(one.source, one.action) for one in decisions} == {(pb.SOURCE_PRIMARY, pb.ACTION_TRADE)}
        assert max(p.primary.calls, p.journal.batches - before) <= 2, "the first one has nobody to wait for"
        assert sorted(packet.attempts[0].batch_index for packet in packets_in(tmp_path)) == [0, *range(7)]


def begun(p: Plane, orders: int) -> list[Deciding]:
    message = pb.Order(instrument=INSTRUMENT, side=pb.SIDE_BUY, quantity=1.0, strategy="alpha")
    reader, now = OrderReader((INSTRUMENT,)), p.clock()
    return [p.dataplane.begin(reader.read(message), now, now + 60.0, in_company=True) for _ in range(orders)]


async def test_orders_in_company_are_decided_with_those_that_follow(tmp_path: Path) -> None:
    async with plane(tmp_path, answers(0.75), hangs, max_in_flight=MANY) as p:
        fresh(p)
        before = p.journal.batches
        decisions = await asyncio.gather(*begun(p, 8))
        assert {one.source for one in decisions} == {pb.SOURCE_PRIMARY}
        assert (p.primary.calls, p.journal.batches - before) == (1, 1)


async def test_orders_that_no_replica_answers_are_scored_here_and_written_down_together(tmp_path: Path) -> None:
    down = fails(Outcome.TRANSPORT)
    async with plane(tmp_path, down, down, max_in_flight=MANY) as p:
        fresh(p)
        p.dataplane._chain.ask_in_order(("model", "embedded"))
        p.embedded.scorer = InProcess()
        before = p.journal.batches
        decisions = await asyncio.gather(*begun(p, 8))
        assert {one.source for one in decisions} == {pb.SOURCE_EMBEDDED}
        assert p.journal.batches - before == 1
        attempts = [packet.attempts[-1] for packet in packets_in(tmp_path)]
        assert sorted((one.batch_rows, one.batch_index) for one in attempts) == [(8, place) for place in range(8)]


async def test_a_decision_that_was_heard_is_gone_without_the_collector(tmp_path: Path) -> None:
    async with plane(tmp_path, answers(0.75), hangs, max_in_flight=MANY) as p:
        fresh(p)
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                promises, told = begun(p, 8), asyncio.Event()
                promises[0].add_done_callback(lambda _, told=told: told.set())  # type: ignore[misc]
                p.dataplane.heard(await asyncio.gather(*promises))
                await told.wait()
            # Not isinstance: it asks the objects of other libraries for their class, and some warn of that.
            left = [one for one in gc.get_objects() if type(one) is Pending]
        finally:
            gc.enable()
        assert len(left) <= 16, "the deadlines hold those of before until the next ones come"


async def test_what_is_given_up_is_noted_whether_it_was_decided_or_not(tmp_path: Path) -> None:
    async with plane(tmp_path, answers(0.75), hangs, max_in_flight=MANY) as p:
        fresh(p)
        (decided,) = begun(p, 1)
        await decided
        (left,) = begun(p, 1)
        for future in (decided, left, left):
            p.dataplane.give_up(future)
        with pytest.raises(asyncio.CancelledError):
            await left
        await asyncio.sleep(0)
        made = decided.result()
        assert isinstance(made, Decided)
        assert made.reply is ReplyState.UNHEARD
        assert (p.metrics.cancelled, p.admission.in_flight) == (2, 0)


async def test_a_caller_who_leaves_takes_nothing_from_those_who_came_with_it(tmp_path: Path) -> None:
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def when_told(rows: list[bytes]) -> ScoreBatch:
        asked.set()
        await may_answer.wait()
        return await by_row(rows)

    async with plane(tmp_path, when_told, hangs, max_in_flight=MANY) as p:
        fresh(p)
        calls = [asyncio.create_task(p.decide(own_features=False)) for _ in range(3)]
        await asked.wait()
        calls[1].cancel()
        await asyncio.wait((calls[1],))
        may_answer.set()
        left = [await calls[0], await calls[2]]
        assert {one.source for one in left} == {pb.SOURCE_PRIMARY}
        assert len(packets_in(tmp_path)) == 2, "of the one that left there is no decision"
        assert (p.metrics.cancelled, p.admission.in_flight) == (1, 0)


async def test_those_whose_attempt_fails_go_on_alone(tmp_path: Path) -> None:
    async with plane(tmp_path, fails(Outcome.TRANSPORT), by_row, max_in_flight=MANY) as p:
        fresh(p)
        decisions = await asyncio.gather(*(p.decide(own_features=False) for _ in range(4)))
        assert {one.source for one in decisions} == {pb.SOURCE_SECONDARY}
        assert {tuple(one.degradations) for one in decisions} == {(pb.DEGRADATION_PRIMARY_FAILED,)}
        assert [[attempt.replica for attempt in packet.attempts] for packet in packets_in(tmp_path)] == [
            ["primary", "secondary"]
        ] * 4


async def test_a_bug_of_a_stage_that_begins_with_them_costs_no_order_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with plane(tmp_path, answers(0.75), hangs, max_in_flight=MANY) as p:
        fresh(p)
        submit = p.primary.batcher.submit_together

        def broken(rows: list[Row]) -> None:
            submit(rows[:1])
            raise ZeroDivisionError("a bug, when one row was submitted already")

        monkeypatch.setattr(p.primary.batcher, "submit_together", broken)
        decisions = await asyncio.gather(*begun(p, 4))
        assert {one.source for one in decisions} == {pb.SOURCE_PRIMARY}
        assert p.chain.broken == {"model": 1}
        assert len(packets_in(tmp_path)) == 4
        assert p.admission.in_flight == 0


async def test_an_order_whose_stray_result_comes_with_its_answer_is_written_down_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with plane(tmp_path, answers(0.75), hangs, max_in_flight=MANY) as p:
        fresh(p)
        stray: list[Row] = []
        decide = p.chain.decide

        def broken(rows: list[Row]) -> None:
            stray.append(rows[0])
            raise ZeroDivisionError("a bug, when one row was submitted already")

        async def with_stray_result(case: Pending) -> Answer:
            answer = await decide(case)
            if case is stray[0].taker:
                stray[0].taker.set_result(Outcome.TRANSPORT)
            return answer

        monkeypatch.setattr(p.primary.batcher, "submit_together", broken)
        monkeypatch.setattr(p.chain, "decide", with_stray_result)
        decisions = await asyncio.gather(*begun(p, 4))
        assert {one.source for one in decisions} == {pb.SOURCE_PRIMARY}
        assert len(packets_in(tmp_path)) == 4
        assert p.metrics.decisions.total() == 4
        assert p.admission.in_flight == 0


async def test_a_caller_with_a_key_that_leaves_when_it_was_just_decided_has_not_heard_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with plane(tmp_path, answers(0.75), hangs) as p:
        fresh(p)
        message = pb.Order(instrument=INSTRUMENT, side=pb.SIDE_BUY, quantity=1.0, strategy="alpha", idempotency_key="k")
        now = p.clock()
        call = p.dataplane.begin(OrderReader((INSTRUMENT,)).read(message), now, now + 60.0)
        monkeypatch.setattr(p.dataplane._promises, "_ended", lambda cases: p.dataplane.give_up(call))
        with pytest.raises(asyncio.CancelledError):
            await call
        assert p.dataplane._replies.unconfirmed == {"cancelled": 1}
        assert len(packets_in(tmp_path)) == 1


async def test_one_with_too_little_time_is_answered_while_the_others_wait(tmp_path: Path) -> None:
    async with plane(tmp_path, hangs, hangs, max_in_flight=MANY) as p:
        fresh(p)
        patient = [asyncio.create_task(p.decide(own_features=False)) for _ in range(2)]
        hurried = await p.decide(timeout_seconds=2.5, own_features=False)
        assert hurried.source == pb.SOURCE_NONE
        assert pb.DEGRADATION_PRIMARY_TIMEOUT in hurried.degradations
        assert not any(call.done() for call in patient)
        for call in patient:
            call.cancel()
        await asyncio.wait(patient)


async def test_a_bug_that_one_order_meets_is_none_of_the_others_business(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with plane(tmp_path, answers(0.75), hangs, max_in_flight=MANY) as p:
        fresh(p)
        apply: Callable[..., Any] = p.guards.apply

        def fails_for_one(case: Any, answer: Any, beyond_limits: Any) -> Any:
            if case.order.quantity == 13:
                raise ZeroDivisionError
            return apply(case, answer, beyond_limits)

        p.guards.configure(GuardSettings(max_notional=1.0))  # each is looked at closely
        monkeypatch.setattr(p.guards, "apply", fails_for_one)
        calls = (p.decide(own_features=False, quantity=float(quantity)) for quantity in (12, 13, 14))
        first, second, third = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(second, ZeroDivisionError)
        assert isinstance(first, pb.Decision)
        assert isinstance(third, pb.Decision)
        assert p.admission.in_flight == 0


@pytest.mark.parametrize("part", ["cached_scores", "shadow", "reports"])
async def test_a_bug_that_one_order_meets_after_its_decision_counts_no_other_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    async with plane(tmp_path, answers(0.75), hangs, max_in_flight=MANY) as p:
        fresh(p)
        plane_of = p.dataplane._following
        scores, shadow, reports = plane_of._cached_scores, plane_of._shadow, plane_of._reports
        remember, mirror, decided = scores.remember, shadow.mirror, reports.decided

        def meet_bug(cases: Iterable[Any]) -> None:
            if any(case.order.quantity == 13 for case in cases):
                raise ZeroDivisionError

        def remember_or_fail(case: Any, *others: Any) -> None:
            meet_bug((case,))
            remember(case, *others)

        def mirror_or_fail(rows: Any) -> None:
            meet_bug(row[0] for row in rows)
            mirror(rows)

        def report_or_fail(cases: Any, now: float) -> None:
            meet_bug(cases)
            decided(cases, now)

        patches: dict[str, tuple[Any, str, Any]] = {
            "cached_scores": (scores, "remember", remember_or_fail),
            "shadow": (shadow, "mirror", mirror_or_fail),
            "reports": (reports, "decided", report_or_fail),
        }
        monkeypatch.setattr(*patches[part])
        plane_of._control.shadow = True
        calls = (p.decide(own_features=False, quantity=float(quantity)) for quantity in (11, 12, 13, 14))
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(one) for one in found] == [pb.Decision, pb.Decision, ZeroDivisionError, pb.Decision]
        counted = 3 if part == "cached_scores" else 4  # what one part has done is not taken back for another's bug
        assert p.objective.met == counted
        assert sum(p.metrics.by_source().values()) == counted
        assert p.metrics.latency.buckets()[0][-1][1] == counted
        assert p.admission.in_flight == 0


async def test_orders_of_one_turn_are_scored_in_this_process_by_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    scores = InProcess.scores_and_parts

    def counted(self: InProcess, rows: bytes) -> tuple[NDArray[np.float32], None]:
        found = scores(self, rows)
        calls.append(len(found[0]))
        return found

    monkeypatch.setattr(InProcess, "scores_and_parts", counted)
    async with plane(tmp_path, hangs, hangs, max_in_flight=MANY) as p:
        fresh(p)
        p.embedded.scorer = InProcess()
        p.chain.ask_in_order(("embedded", "model"))
        decisions = await asyncio.gather(*(p.decide(own_features=False) for _ in range(8)))
        assert {(one.source, one.action) for one in decisions} == {(pb.SOURCE_EMBEDDED, pb.ACTION_TRADE)}
        assert (sorted(calls), p.primary.calls) == ([1, 7], 0), "the first one has nobody to wait for"
        assert sorted(packet.attempts[0].batch_rows for packet in packets_in(tmp_path)) == [1, *[7] * 7]


@pytest.mark.parametrize("first", ["model", "embedded"])
@pytest.mark.parametrize("mix", range(12))
async def test_a_mix_of_orders_gets_together_what_each_of_them_gets_alone(
    tmp_path: Path, mix: int, first: StageName
) -> None:
    choose = random.Random(mix)
    orders = [_any_order(choose) for _ in range(24)]
    known = choose.random() < 0.8
    decisions: dict[str, list[pb.Decision]] = {}
    for way in ("together", "alone"):
        path = tmp_path / way
        path.mkdir()
        async with plane(path, by_row, by_row, max_in_flight=MANY) as p:
            p.guards.configure(GuardSettings(max_notional=10_000.0))
            p.embedded.scorer = InProcess()
            p.chain.ask_in_order((first, "cached_score", "rules"))
            if known:
                fresh(p)
            if way == "together":
                decisions[way] = await asyncio.gather(*(p.decide(**order) for order in orders))
            else:
                decisions[way] = [await p.decide(**order) for order in orders]
            packets = packets_in(path)
        assert len(packets) == len(orders)
    for together, alone in zip(decisions["together"], decisions["alone"], strict=True):
        assert _says(together) == _says(alone)


def _any_order(choose: random.Random) -> dict[str, Any]:
    own = choose.random() < 0.25
    return {
        "own_features": own,
        "own_book_age_ms": choose.choice([0.0, 0.0, 5_000.0]),
        "side": choose.choice([pb.SIDE_BUY, pb.SIDE_SELL]),
        "quantity": choose.choice([1.0, 50.0, 500.0]),
        "limit_price": choose.choice([100.0, 100.0, 150.0]),
        "reduce_only": choose.random() < 0.2,
    }


def _says(decision: pb.Decision) -> tuple[object, ...]:
    """What a decision says, but for its times and its id."""
    return (
        decision.action,
        decision.source,
        list(decision.reasons),
        list(decision.degradations),
        decision.score,
        decision.threshold,
        decision.model_version,
        [(use.stage, use.skipped) for use in decision.budget.stages],
    )
