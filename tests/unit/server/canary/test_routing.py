"""Orders of a canary's flows: it answers them, or the champion does in time; in virtual time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from support.cases import new_case
from support.guest_sets import MIXED, RECORDED
from support.scripted_replica import Script, ScriptedReplica, answers, fails, hangs

from fallback.block import Block, View
from fallback.budget import BudgetSettings
from fallback.chain import Taken
from fallback.joint_case import JointCase
from fallback.order import Brought, Case
from feature_cache import features
from feature_cache.feature_set import FeatureSet, SetRow
from feature_cache.features import MF1
from pretrade.decision.v1 import decision_pb2 as pb
from server.canary.burn import Objective, SloSettings
from server.canary.evidence import FirstAttempt
from server.canary.pairing import Side
from server.canary.plan import Canary
from server.canary.routing import CanaryRouting
from server.inference.batcher import BatcherSettings
from server.inference.breaker import Mode
from server.inference.champion import Champion
from server.inference.outcome import Outcome
from server.inference.retry_budget import RetryBudget, RetrySettings
from server.inference.rows import Lane, Row

VERSION, OTHER = "bb" * 8, "cc" * 8
CANARY = Canary.start("one", VERSION, "aa" * 8, (1.0,), "ann", "better", now=0.0)
PASSED_OVER = [pb.DEGRADATION_CANARY_PASSED_OVER]


class Desk:
    """The model stage with a canary that takes every order."""

    def __init__(self, canary: Script, champion: Script, batcher: BatcherSettings, feature_set: FeatureSet) -> None:
        self.clock = asyncio.get_running_loop().time
        self.canary = ScriptedReplica("challenger", canary, batcher, feature_set=feature_set)
        self.primary = ScriptedReplica("primary", champion, feature_set=feature_set)
        self.secondary = ScriptedReplica("secondary", champion, feature_set=feature_set)
        budget = BudgetSettings()
        retry = RetryBudget(RetrySettings(share=1, per_second=1_000), self.clock)
        self.champion = Champion(self.primary, self.secondary, retry, False, budget, self.clock, lambda: 0.5)
        objective = Objective(SloSettings(), budget.cap_seconds)
        self.routing = CanaryRouting(
            self.canary, self.champion, lambda: self.primary.latency.p95, budget, objective, self.clock
        )
        self.routing.canary = CANARY
        self.observed: list[bool] = []
        """Whether the canary answered, an order each."""
        self.controls: list[bool] = []
        """Whether the first attempt at the champion answered, likewise."""
        self.routing.on_order(self._observe)

    def _observe(self, side: Side, attempt: FirstAttempt) -> None:
        answered = attempt.seconds <= attempt.allowed_seconds
        (self.observed if side is Side.CANARY else self.controls).append(answered)

    def case(self, timeout_seconds: float = 0.05, strategy: str = "alpha", own_features: bool = False) -> Case:
        own = np.zeros(features.N_FEATURES, dtype=np.float32) if own_features else None
        return new_case(arrived=self.clock(), timeout_seconds=timeout_seconds, strategy=strategy, caller_features=own)

    def case_that_brings(self, feature_set: FeatureSet = MIXED) -> Case:
        """An order with its caller's part of a set."""
        case = self.case()
        values = np.zeros(len(feature_set), dtype=np.float32)
        case.order.brought = Brought(feature_set, values)
        case.others = {MIXED: SetRow.of(MIXED, bytes(MIXED.row_bytes))}
        return case


@asynccontextmanager
async def desk(
    canary: Script,
    champion: Script | None = None,
    batcher: BatcherSettings | None = None,
    feature_set: FeatureSet = MF1,
) -> AsyncIterator[Desk]:
    made = Desk(canary, champion or answers(0.25), batcher or BatcherSettings(), feature_set)
    try:
        yield made
    finally:
        for replica in (made.canary, made.primary, made.secondary):
            await replica.batcher.close()


async def test_the_canary_answers_an_order_of_its_flow() -> None:
    async with desk(answers(0.75, version=VERSION)) as d:
        case = d.case()
        answer = await d.routing.answer(case)
        assert answer is not None
        assert (answer.action, answer.source, answer.model_version) == (pb.ACTION_TRADE, pb.SOURCE_CANARY, VERSION)
        assert case.degradations == []
        assert [(one.replica, one.outcome) for one in case.attempts] == [("challenger", "success")]
        assert [use[0] for use in case.budget.uses] == [pb.STAGE_CANARY]
        assert (d.observed, d.primary.calls) == ([True], 0)


async def test_other_flows_never_see_it() -> None:
    async with desk(answers(0.75, version=VERSION)) as d:
        d.routing.canary = CANARY.weighted(0.3, held=True, now=0.0)
        sources = set()
        for number in range(40):
            case = d.case(strategy=f"s{number}")
            answer = await d.routing.answer(case)
            assert answer is not None
            taken = d.routing.canary.takes(case.order.instrument, case.order.strategy)
            assert (answer.source == pb.SOURCE_CANARY) == taken
            sources.add(answer.source)
        assert sources == {pb.SOURCE_CANARY, pb.SOURCE_PRIMARY}
        assert len(d.observed) + len(d.controls) == 40
        assert all(d.observed)
        assert all(d.controls)


async def test_orders_that_a_canary_does_not_cover_are_decided_together_as_without_it_and_tell_nothing_of_it() -> None:
    async with desk(answers(0.75, version=VERSION)) as d:
        held = d.routing.canary = CANARY.model_copy(update={"strategy": "sweep-?"})
        own, other = d.case(strategy="sweep-1"), d.case(strategy="sweep-10")
        assert (d.routing.tells(own.order), d.routing.tells(other.order)) == (True, False)
        results = list[Any]()
        joint = [JointCase(case.order, case.budget, asyncio.Future(), results.append) for case in (own, other)]
        for case in joint:
            case.features = own.features
        (begun,) = d.routing.begin(joint)
        assert begun is joint[1]
        answer = await d.routing.answer(other)
        assert answer is not None
        assert answer.source == pb.SOURCE_PRIMARY
        assert await d.routing.answer_on_trial(other) is None
        assert (d.observed, d.controls) == ([], []), "neither model is judged by it"
        assert d.routing.flows(held) == (1, 1), "its own"
        answer = await d.routing.answer(own)
        assert answer is not None
        assert (answer.source, d.observed) == (pb.SOURCE_CANARY, [True])
        await asyncio.sleep(0.01)
        assert results == [begun]


class Columns(Block):
    """Orders in columns that tell only that their attempt has ended."""

    __slots__ = ("ended",)

    def __init__(self, cases: Sequence[Case]) -> None:
        snapshot = new_case(sequence=1).snapshot
        assert snapshot is not None
        row = np.zeros(len(MF1), np.float32)
        view = View(snapshot, 0.0, 100.0, row, row.tobytes())
        super().__init__([case.order for case in cases], [view] * len(cases), cases[0].budget)
        self.ended = asyncio.Event()

    def complete(self) -> None:
        self.ended.set()

    def is_gone(self, place: int) -> bool:
        return False

    def is_left(self) -> bool:
        return False

    def put_failure(self, place: int, result: Any) -> None:
        self.put(place, result)


async def test_orders_in_columns_are_asked_of_one_model_each() -> None:
    async with desk(answers(0.75, version=VERSION)) as d:
        cases = own, *others = [d.case(strategy=one) for one in ("sweep-1", "sweep-10", "twap")]
        orders = [case.order for case in cases]
        d.routing.canary = CANARY.model_copy(update={"strategy": "sweep-?"})
        assert d.routing.parted("", orders, range(3)) == [[1, 2], [0]]
        assert d.routing.begin_block(Columns(cases)) is Taken.LEFT, "no block is asked of two models"
        assert (d.primary.calls, d.canary.calls) == (0, 0)
        for part, source in ((others, pb.SOURCE_PRIMARY), ([own], pb.SOURCE_CANARY)):
            block = Columns(part)
            assert d.routing.begin_block(block) is Taken.BEGUN
            await block.ended.wait()
            assert d.routing.settle_block(block)
            assert block.source == source
            d.routing.count_block(block)
        assert (d.primary.calls, d.canary.calls, d.routing.answered, d.routing.passed_over) == (1, 1, 1, 0)
        assert (d.observed, d.controls) == ([True], []), "orders that it does not cover tell nothing of it"
        d.routing.canary = None
        assert d.routing.parted("", orders, range(3)) == (range(3),)


async def test_a_canary_that_cannot_be_asked_leaves_its_columns_to_be_asked_one_by_one() -> None:
    async with desk(answers(0.75, version=VERSION)) as d:
        d.canary.breaker.force(Mode.FORCED_OPEN)
        assert d.routing.begin_block(Columns([d.case()])) is Taken.LEFT
        assert (d.primary.calls, d.routing.passed_over, d.observed) == (0, 0, []), "each of them says so"


async def test_columns_that_no_champion_can_be_asked_for_speak_against_it() -> None:
    async with desk(answers(0.75, version=VERSION)) as d:
        d.routing.canary = CANARY.weighted(0.0, held=True, now=0.0)
        for replica in (d.primary, d.secondary):
            replica.breaker.force(Mode.FORCED_OPEN)
        assert d.routing.begin_block(Columns([d.case(), d.case()])) is Taken.PASSED_OVER
        assert d.controls == [False, False]


async def test_columns_with_too_little_time_speak_for_nobody() -> None:
    async with desk(answers(0.75, version=VERSION)) as d:
        d.routing.canary = CANARY.weighted(0.0, held=True, now=0.0)
        block = Columns([d.case(timeout_seconds=0.0075)])
        assert d.routing.begin_block(block) is Taken.BEGUN
        await block.ended.wait()
        assert d.routing.settle_block(block)
        d.routing.count_block(block)
        assert d.controls == []


async def test_columns_without_time_for_two_attempts_such_as_the_champions_speak_for_nobody() -> None:
    async with desk(answers(0.75, version=VERSION), answers(0.25, after_seconds=0.012)) as d:
        d.routing.canary = CANARY.weighted(0.0, held=True, now=0.0)
        for _ in range(10):
            await d.champion.answer(d.case(timeout_seconds=1.0))
        for timeout_seconds, told in ((0.025, []), (1.0, [True])):
            block = Columns([d.case(timeout_seconds=timeout_seconds)])
            assert d.routing.begin_block(block) is Taken.BEGUN
            await block.ended.wait()
            assert d.routing.settle_block(block)
            d.routing.count_block(block)
            assert d.controls == told


@pytest.mark.parametrize("in_columns", [True, False])
@pytest.mark.parametrize("ended", ["ended", "another"])
async def test_a_score_that_comes_when_its_trial_has_ended_decides_nothing(in_columns: bool, ended: str) -> None:
    async with desk(answers(0.75, version=VERSION)) as d:
        after = None if ended == "ended" else CANARY.model_copy(update={"model_version": OTHER})
        if in_columns:
            block = Columns([d.case()])
            assert d.routing.begin_block(block) is Taken.BEGUN
            d.routing.canary = after
            await block.ended.wait()
            assert not d.routing.settle_block(block)
        else:
            case = d.case()
            call = asyncio.create_task(d.routing.answer(case))
            await asyncio.sleep(0)
            d.routing.canary = after
            answer = await call
            assert answer is not None
            assert (answer.source, case.degradations) == (pb.SOURCE_PRIMARY, PASSED_OVER)
            outcomes = [one.outcome for one in case.attempts]
            assert outcomes == ["ignored" if after is None else "bad_answer", "success"]
        assert (d.canary.calls, d.routing.answered, d.routing.passed_over) == (1, 0, not in_columns)
        assert d.observed == ([False] if after and not in_columns else [])


@pytest.mark.parametrize("in_columns", [True, False])
async def test_a_score_of_the_version_that_was_promoted_meanwhile_decides(in_columns: bool) -> None:
    async with desk(answers(0.75, version=VERSION)) as d:
        block = Columns([d.case()])
        assert d.routing.begin_block(block) is Taken.BEGUN
        call = asyncio.create_task(d.routing.answer(d.case()))
        await asyncio.sleep(0)
        d.routing.canary, d.routing.promoted = None, VERSION
        if in_columns:
            await block.ended.wait()
            assert d.routing.settle_block(block)
        answer = await call
        assert answer is not None
        assert answer.source == pb.SOURCE_CANARY


async def test_an_overload_of_the_canary_speaks_against_nobody() -> None:
    async with desk(answers(0.75, version=VERSION)) as d:
        call = asyncio.create_task(d.routing.answer(d.case()))
        await asyncio.sleep(0)
        await d.canary.batcher.close()
        answer = await call
        assert answer is not None
        assert (answer.source, d.routing.passed_over, d.observed) == (pb.SOURCE_PRIMARY, 1, [])


async def test_columns_of_the_canarys_that_are_too_many_for_their_time_go_one_by_one() -> None:
    async with desk(answers(0.75, after_seconds=0.006, version=VERSION), batcher=BatcherSettings(max_rows=32)) as d:
        for _ in range(10):  # so it is known to take 6 ms
            await d.routing.answer(d.case())
        d.observed.clear()
        few = Columns([d.case()] * 64)
        assert d.routing.begin_block(few) is Taken.BEGUN
        await few.ended.wait()
        many = Columns([d.case()] * 256)
        assert d.routing.begin_block(many) is Taken.LEFT, "four batches in each slot"
        await asyncio.gather(*(d.routing.answer(d.case()) for _ in range(256)))
        assert False not in d.observed, "what a caller makes too long is no fault of the canary's"
        assert d.routing.passed_over > 64


async def test_columns_that_would_be_late_at_a_slow_canary_go_one_by_one() -> None:
    async with desk(answers(0.75, after_seconds=0.02, version=VERSION)) as d:
        for _ in range(10):
            await d.routing.answer(d.case(timeout_seconds=1.0))
        assert d.routing.begin_block(Columns([d.case(timeout_seconds=1.0)])) is Taken.BEGUN
        assert d.routing.begin_block(Columns([d.case(timeout_seconds=0.04)])) is Taken.LEFT


async def test_columns_without_what_the_canary_reads_go_one_by_one() -> None:
    async with desk(answers(0.75, version=VERSION), feature_set=MIXED) as d:
        assert d.routing.begin_block(Columns([d.case()])) is Taken.LEFT
        assert d.canary.calls == 0


async def test_columns_of_the_canarys_wait_behind_live_rows_and_no_longer_than_they_may() -> None:
    patient = BatcherSettings(max_rows=1, slots=1, min_patience_seconds=10, max_patience_seconds=10)
    async with desk(hangs, batcher=patient) as d:
        live = [d.canary.batcher.submit(bytes(100), d.clock() + 1.0) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        block = Columns([d.case(timeout_seconds=1.0)])
        assert d.routing.begin_block(block) is Taken.BEGUN
        assert d.canary.batcher.expected_batches(Lane.LIVE) < d.canary.batcher.expected_batches(Lane.CANARY)
        began = d.clock()
        await block.ended.wait()
        assert block.results[0] is Outcome.TIMEOUT
        assert d.clock() - began == pytest.approx(block.allowed, abs=0.01)
        assert block.allowed < 0.6, "the champion has its share of the second"
        for one in live:
            one.cancel()


async def test_what_a_caller_brings_may_fail_the_champion_in_company_as_alone() -> None:
    async with desk(answers(0.75, version=VERSION), fails(Outcome.MODEL_ERROR), feature_set=MIXED) as d:
        told: list[Outcome] = []
        d.primary.on_batch(lambda outcome, seconds: told.append(outcome))
        d.routing.canary = CANARY.weighted(0.0, held=True, now=0.0)
        alone = d.case_that_brings()
        case = JointCase(alone.order, alone.budget, asyncio.Future(), lambda case: None)
        case.features, case.others = alone.features, alone.others
        assert list(d.routing.begin([case])) == [case]
        await asyncio.sleep(0.01)
        assert case.result is Outcome.MODEL_ERROR
        assert told == []


async def test_whether_it_is_busy_is_asked_of_the_model_that_gets_all_orders() -> None:
    async with desk(hangs) as d:
        freed: list[None] = []
        d.routing.on_free(lambda: freed.append(None))
        assert not d.routing.is_busy(1)
        for _ in range(2):
            assert d.routing.begin_block(Columns([d.case()])) is Taken.BEGUN
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert d.routing.is_busy(1)
        d.routing.canary = CANARY.weighted(0.5, held=True, now=0.0)
        assert not d.routing.is_busy(1), "the champion is not"
        await asyncio.sleep(1)
        assert len(freed) == 2


async def test_it_knows_how_many_flows_there_are_and_how_many_of_them_are_its_own() -> None:
    async with desk(answers(0.75, version=VERSION)) as d:
        for number in (*range(4), *range(4)):
            await d.routing.answer(d.case(strategy=f"s{number}"))
        await d.routing.answer(d.case(strategy="own", own_features=True))
        assert d.routing.flows(CANARY) == (4, 4)
        assert d.routing.flows(CANARY.weighted(0.0, held=True, now=0.0)) == (4, 0)
        d.routing.forget_flows()
        assert d.routing.flows(CANARY) == (0, 0)


async def test_a_stage_before_it_asks_the_canary_for_its_orders_once() -> None:
    async with desk(fails(Outcome.MODEL_ERROR)) as d:
        case = d.case()
        assert await d.routing.answer_on_trial(case) is None
        assert (d.canary.calls, d.primary.calls) == (1, 0)
        assert await d.routing.answer_on_trial(case) is None
        answer = await d.routing.answer(case)
        assert answer is not None
        assert (answer.source, d.canary.calls) == (pb.SOURCE_PRIMARY, 1)
    async with desk(answers(0.75, version=VERSION)) as d:
        answer = await d.routing.answer_on_trial(d.case())
        assert answer is not None
        assert answer.source == pb.SOURCE_CANARY
        assert await d.routing.answer_on_trial(d.case(own_features=True)) is None
        d.routing.canary = CANARY.weighted(0.0, held=True, now=0.0)
        assert await d.routing.answer_on_trial(d.case()) is None
        d.routing.canary = None
        assert await d.routing.answer_on_trial(d.case()) is None


async def test_an_order_of_other_flows_that_its_first_replica_did_not_answer_is_what_the_canary_is_compared_with() -> (
    None
):
    async with desk(answers(0.75, version=VERSION)) as d:
        d.routing.canary = CANARY.weighted(0.0, held=True, now=0.0)
        d.primary.script = fails(Outcome.MODEL_ERROR)
        answer = await d.routing.answer(d.case())
        assert answer is not None
        assert (answer.source, d.controls) == (pb.SOURCE_SECONDARY, [False])
        await d.routing.answer(d.case(timeout_seconds=0.0075))
        assert d.controls == [False], "without time for two attempts it speaks against nobody"
        d.routing.canary = None
        await d.routing.answer(d.case())
        assert d.controls == [False], "without a canary nobody is compared"


@pytest.mark.parametrize(
    "broken",
    [
        hangs,
        fails(Outcome.MODEL_ERROR),
        fails(Outcome.BAD_ANSWER),
        answers(float("nan"), version=VERSION),
        answers(0.9, version=OTHER),
    ],
    ids=["hangs", "fails", "garbage", "nan", "other-version"],
)
async def test_the_champion_answers_in_time_for_a_canary_that_does_not(broken: Script) -> None:
    async with desk(broken) as d:
        for _ in range(5):
            case = d.case()
            answer = await d.routing.answer(case)
            assert answer is not None
            assert answer.source == pb.SOURCE_PRIMARY
            assert case.degradations == PASSED_OVER
            assert d.clock() < case.budget.deadline
            assert len(case.attempts) <= 2
        assert d.observed == [False] * 5


async def test_an_order_has_two_attempts_the_canarys_included() -> None:
    async with desk(fails(Outcome.MODEL_ERROR), fails(Outcome.MODEL_ERROR)) as d:
        case = d.case()
        assert await d.routing.answer(case) is None
        assert [one.replica for one in case.attempts] == ["challenger", "primary"]
        assert d.secondary.calls == 0


async def test_an_order_that_was_under_way_when_its_canary_began_is_asked_of_no_third_model() -> None:
    async with desk(answers(0.75, version=VERSION), fails(Outcome.MODEL_ERROR)) as d:
        d.secondary.script, d.routing.canary = fails(Outcome.MODEL_ERROR), None
        case = d.case()
        assert await d.routing.answer(case) is None
        d.routing.canary = CANARY
        assert await d.routing.answer_on_trial(case) is None  # as a stage after the champion's asks
        assert [one.replica for one in case.attempts] == ["primary", "secondary"]
        assert (case.degradations.count(pb.DEGRADATION_CANARY_PASSED_OVER), d.observed) == (0, [])


async def test_a_canary_whose_breaker_is_open_costs_nothing_and_counts_as_its_failure() -> None:
    async with desk(answers(0.75, version=VERSION)) as d:
        d.canary.breaker.force(Mode.FORCED_OPEN)
        case = d.case()
        answer = await d.routing.answer(case)
        assert answer is not None
        assert (answer.source, d.canary.calls, d.observed) == (pb.SOURCE_PRIMARY, 0, [False])
        assert case.degradations == PASSED_OVER


async def test_an_order_without_time_for_both_goes_to_the_champion_and_speaks_against_nobody() -> None:
    async with desk(answers(0.75, version=VERSION)) as d:
        case = d.case(timeout_seconds=0.0075)
        answer = await d.routing.answer(case)
        assert answer is not None
        assert (answer.source, d.canary.calls, d.observed) == (pb.SOURCE_PRIMARY, 0, [])


async def test_an_order_that_brings_its_own_features_goes_to_the_champion_and_speaks_against_nobody() -> None:
    async with desk(fails(Outcome.MODEL_ERROR)) as d:
        for _ in range(20):
            case = d.case(own_features=True)
            answer = await d.routing.answer(case)
            assert answer is not None
            assert (answer.source, case.degradations) == (pb.SOURCE_PRIMARY, [])
        assert (d.canary.calls, d.observed, d.controls) == (0, [], [])


async def test_an_order_that_brings_its_part_of_another_set_is_evidence_where_the_canary_answers() -> None:
    async with desk(answers(0.75, version=VERSION), feature_set=MIXED) as d:
        answer = await d.routing.answer(d.case_that_brings())
        assert answer is not None
        assert (answer.source, d.observed) == (pb.SOURCE_CANARY, [True])
        d.routing.canary = CANARY.weighted(0.0, held=True, now=0.0)
        answer = await d.routing.answer(d.case_that_brings())
        assert answer is not None
        assert (answer.source, d.controls) == (pb.SOURCE_PRIMARY, [True])


@pytest.mark.parametrize("failure", [fails(Outcome.MODEL_ERROR), fails(Outcome.BAD_ANSWER), answers(float("nan"))])
async def test_what_the_callers_part_of_a_row_may_have_caused_speaks_against_no_model(failure: Script) -> None:
    async with desk(failure, failure, feature_set=MIXED) as d:
        told: list[Outcome] = []
        for replica in (d.canary, d.primary, d.secondary):
            replica.on_batch(lambda outcome, seconds: told.append(outcome))
        for weight in (1.0, 0.0):
            d.routing.canary = CANARY.weighted(weight, held=True, now=0.0)
            assert await d.routing.answer(d.case_that_brings()) is None
        assert (d.canary.calls, d.primary.calls) == (1, 2)
        assert (told, d.observed, d.controls) == ([], [], [])
        assert d.canary.outcomes.total() == 1, "the breaker knows of it"


async def test_how_long_a_model_takes_is_evidence_whatever_the_caller_brings() -> None:
    async with desk(hangs, feature_set=MIXED) as d:
        await d.routing.answer(d.case_that_brings())
        assert d.observed == [False]


async def test_what_a_caller_brings_of_a_set_that_no_model_takes_excuses_none() -> None:
    failure = fails(Outcome.MODEL_ERROR)
    async with desk(failure, failure, feature_set=MIXED) as d:
        told: list[Outcome] = []
        d.canary.on_batch(lambda outcome, seconds: told.append(outcome))
        await d.routing.answer(d.case_that_brings(RECORDED))
        assert (told, d.observed) == ([Outcome.MODEL_ERROR], [False])


@pytest.mark.parametrize("weight", [0.0, 1.0])
async def test_an_order_that_allows_too_little_is_decided_and_speaks_against_nobody(weight: float) -> None:
    async with desk(hangs) as d:
        d.routing.canary = CANARY.weighted(weight, held=True, now=0.0)
        answer = await d.routing.answer(d.case(timeout_seconds=0.0195))
        assert answer is not None
        assert (d.observed, d.controls) == ([], [])
        await d.routing.answer(d.case(timeout_seconds=0.02))
        assert len(d.observed) + len(d.controls) == 1


async def test_orders_that_find_its_queue_long_speak_against_nobody() -> None:
    async with desk(hangs, batcher=BatcherSettings(max_queued_rows=3)) as d:
        # Two batches are under way, and as many rows wait as may: this is what a flood of one caller makes of it.
        flood = []
        for _ in range(5):
            flood.append(d.canary.batcher.submit(bytes(100), d.clock() + 1.0, Lane.CANARY))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert d.canary.batcher.full_for(Lane.CANARY)
        case = d.case()
        answer = await d.routing.answer(case)
        assert answer is not None
        assert (answer.source, case.degradations, d.observed) == (pb.SOURCE_PRIMARY, PASSED_OVER, [])
        for row in flood:
            row.cancel()


async def test_an_order_without_features_is_nobodys_business() -> None:
    async with desk(answers(0.75, version=VERSION)) as d:
        case = new_case(arrived=d.clock(), problem=pb.REASON_CODE_FEATURES_STALE)
        assert await d.routing.answer(case) is None
        assert (d.canary.calls, d.observed) == (0, [])


async def test_its_orders_leave_before_shadow_rows() -> None:
    async with desk(answers(0.75, version=VERSION)) as d:
        for _ in range(1_000):
            future = asyncio.get_running_loop().create_future()
            d.canary.batcher.submit_shadow([Row(bytes(100), math.inf, future)])
        case = d.case()
        answer = await d.routing.answer(case)
        assert answer is not None
        assert answer.source == pb.SOURCE_CANARY
        assert case.attempts[0].batch_rows == 1


async def test_a_caller_that_leaves_takes_its_row_along() -> None:
    async with desk(hangs) as d:
        call = asyncio.create_task(d.routing.answer(d.case()))
        await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert d.observed == []
