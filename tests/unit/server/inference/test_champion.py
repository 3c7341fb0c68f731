"""The champion stage: two replicas, at most one retry, never beyond the budget; in virtual time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import new_case
from support.guest_sets import MIXED
from support.scripted_replica import Script, ScriptedReplica, answers, fails, hangs

from fallback.budget import BudgetSettings
from fallback.order import Case
from feature_cache.feature_set import SetRow
from pretrade.decision.v1 import decision_pb2 as pb
from server.inference import model_sets
from server.inference.batcher import BatcherSettings
from server.inference.breaker import Mode
from server.inference.champion import Champion
from server.inference.outcome import Outcome
from server.inference.retry_budget import RetryBudget, RetrySettings
from server.inference.wire import ScoreBatch

PLENTY = RetrySettings(share=1, per_second=1_000)
HEDGING = PLENTY.model_copy(update={"hedge": True})
TRADES, REFUSES = answers(0.75), answers(0.25)


class Stage:
    """A champion stage, its replicas and a case that arrives now."""

    def __init__(self, primary: Script, secondary: Script, retry: RetrySettings, random: Callable[[], float]) -> None:
        self.clock = asyncio.get_running_loop().time
        batcher_settings = BatcherSettings(slots=1, max_in_flight=4)
        self.primary = ScriptedReplica("primary", primary, batcher_settings)
        self.secondary = ScriptedReplica("secondary", secondary, batcher_settings)
        self.champion = Champion(
            self.primary,
            self.secondary,
            RetryBudget(retry, self.clock),
            retry.hedge,
            BudgetSettings(),
            self.clock,
            random,
        )

    def case(self, timeout_seconds: float = 0.05) -> Case:
        return new_case(arrived=self.clock(), timeout_seconds=timeout_seconds)


@asynccontextmanager
async def stage(
    primary: Script, secondary: Script, retry: RetrySettings = PLENTY, random: Callable[[], float] = lambda: 0.5
) -> AsyncIterator[Stage]:
    made = Stage(primary, secondary, retry, random)
    try:
        yield made
    finally:
        await made.primary.batcher.close()
        await made.secondary.batcher.close()


async def test_the_primary_answers_and_the_secondary_is_not_asked() -> None:
    async with stage(TRADES, TRADES) as s:
        case = s.case()
        answer = await s.champion.answer(case)
        assert answer is not None
        assert (answer.action, answer.source) == (pb.ACTION_TRADE, pb.SOURCE_PRIMARY)
        assert answer.reason == pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD
        assert (answer.score, answer.threshold, answer.model_version) == (0.75, 0.5, "aa" * 8)
        assert case.degradations == []
        assert [(a.replica, a.outcome, a.model_version) for a in case.attempts] == [("primary", "success", "aa" * 8)]
        ((ledger_stage, _, used, _),) = case.budget.uses
        assert ledger_stage == pb.STAGE_PRIMARY
        assert used == pytest.approx(0.001)
        assert s.secondary.calls == 0


async def test_a_score_below_the_threshold_is_no_trade() -> None:
    async with stage(REFUSES, TRADES) as s:
        answer = await s.champion.answer(s.case())
        assert answer is not None
        assert (answer.action, answer.reason) == (pb.ACTION_NO_TRADE, pb.REASON_CODE_SCORE_BELOW_THRESHOLD)


async def test_a_score_at_the_threshold_is_a_trade() -> None:
    async with stage(answers(0.5), TRADES) as s:
        answer = await s.champion.answer(s.case())
        assert answer is not None
        assert answer.action == pb.ACTION_TRADE


@pytest.mark.parametrize(
    ("script", "degradation"),
    [
        (fails(Outcome.TRANSPORT), pb.DEGRADATION_PRIMARY_FAILED),
        (fails(Outcome.MODEL_ERROR), pb.DEGRADATION_PRIMARY_FAILED),
        (fails(Outcome.OVERLOAD), pb.DEGRADATION_PRIMARY_OVERLOADED),
        (answers(math.nan), pb.DEGRADATION_PRIMARY_BAD_ANSWER),
        (answers(1.5), pb.DEGRADATION_PRIMARY_BAD_ANSWER),
        (hangs, pb.DEGRADATION_PRIMARY_TIMEOUT),
    ],
)
async def test_whatever_befalls_the_primary_the_secondary_answers(
    script: Script, degradation: pb.Degradation.ValueType
) -> None:
    async with stage(script, REFUSES) as s:
        case = s.case()
        answer = await s.champion.answer(case)
        assert answer is not None
        assert (answer.action, answer.source) == (pb.ACTION_NO_TRADE, pb.SOURCE_SECONDARY)
        assert case.degradations == [degradation]
        assert [attempt.replica for attempt in case.attempts] == ["primary", "secondary"]
        assert [ledger_stage for ledger_stage, *_ in case.budget.uses] == [pb.STAGE_PRIMARY, pb.STAGE_SECONDARY]
        assert case.budget.for_models(s.clock()) > 0


async def test_when_both_fail_there_is_no_third_attempt() -> None:
    async with stage(fails(Outcome.TRANSPORT), fails(Outcome.MODEL_ERROR)) as s:
        case = s.case()
        assert await s.champion.answer(case) is None
        assert case.degradations == [pb.DEGRADATION_PRIMARY_FAILED, pb.DEGRADATION_SECONDARY_FAILED]
        assert (s.primary.calls, s.secondary.calls) == (1, 1)


async def test_an_open_breaker_costs_no_time_and_no_retry() -> None:
    async with stage(hangs, TRADES, RetrySettings(share=0, per_second=0)) as s:
        s.primary.breaker.force(Mode.FORCED_OPEN)
        case = s.case()
        answer = await s.champion.answer(case)
        assert answer is not None
        assert answer.source == pb.SOURCE_SECONDARY
        assert case.degradations == [pb.DEGRADATION_PRIMARY_BREAKER_OPEN]
        assert s.primary.calls == 0


async def test_with_both_breakers_open_the_next_stage_is_asked_at_once() -> None:
    async with stage(TRADES, TRADES) as s:
        for replica in (s.primary, s.secondary):
            replica.breaker.force(Mode.FORCED_OPEN)
        case, started = s.case(), s.clock()
        assert await s.champion.answer(case) is None
        assert s.clock() == started
        assert case.degradations == [pb.DEGRADATION_PRIMARY_BREAKER_OPEN, pb.DEGRADATION_SECONDARY_BREAKER_OPEN]
        assert case.budget.uses == [
            (pb.STAGE_PRIMARY, 0.0, 0.0, pb.DEGRADATION_PRIMARY_BREAKER_OPEN),
            (pb.STAGE_SECONDARY, 0.0, 0.0, pb.DEGRADATION_SECONDARY_BREAKER_OPEN),
        ]


async def test_a_full_replica_is_passed_over_without_a_retry() -> None:
    async with stage(hangs, TRADES, RetrySettings(share=0, per_second=0)) as s:
        while not s.primary.batcher.full:
            await s.primary.batcher.submit(b"", s.clock() + 1)
        s.primary.breaker.force(Mode.FORCED_CLOSED)
        case = s.case()
        answer = await s.champion.answer(case)
        assert answer is not None
        assert answer.source == pb.SOURCE_SECONDARY
        assert case.degradations == [pb.DEGRADATION_PRIMARY_OVERLOADED]
        assert [attempt.replica for attempt in case.attempts] == ["secondary"]


async def test_without_retry_budget_the_next_stage_is_asked() -> None:
    async with stage(fails(Outcome.TRANSPORT), TRADES, RetrySettings(share=0, per_second=0)) as s:
        case = s.case()
        assert await s.champion.answer(case) is None
        assert case.degradations == [pb.DEGRADATION_PRIMARY_FAILED, pb.DEGRADATION_RETRY_BUDGET_EXHAUSTED]
        assert s.secondary.calls == 0


async def test_without_time_no_replica_is_asked() -> None:
    async with stage(TRADES, TRADES) as s:
        case = s.case(timeout_seconds=0.0055)  # 5 ms are reserved
        assert await s.champion.answer(case) is None
        assert case.degradations == [pb.DEGRADATION_NO_TIME_FOR_MODEL]
        assert [(stage, used, skipped) for stage, _, used, skipped in case.budget.uses] == [
            (pb.STAGE_PRIMARY, 0.0, pb.DEGRADATION_NO_TIME_FOR_MODEL),
            (pb.STAGE_SECONDARY, 0.0, pb.DEGRADATION_NO_TIME_FOR_MODEL),
        ]
        assert (s.primary.calls, s.secondary.calls) == (0, 0)


async def test_a_primary_that_became_slow_is_passed_over_by_orders_in_a_hurry() -> None:
    async with stage(answers(0.75, after_seconds=0.02), TRADES) as s:
        for _ in range(3):
            await s.champion.answer(s.case())
        case = s.case(timeout_seconds=0.025)
        answer = await s.champion.answer(case)
        assert answer is not None
        assert answer.source == pb.SOURCE_SECONDARY
        assert case.degradations == [pb.DEGRADATION_NO_TIME_FOR_MODEL]


async def test_the_first_attempt_gets_all_the_time_when_a_retry_could_not_finish() -> None:
    async with stage(answers(0.75, after_seconds=0.003), TRADES) as s:
        s.secondary.latency.add(0.015)
        case = s.case(timeout_seconds=0.03)
        await s.champion.answer(case)
        ((_, allowed, _, _),) = case.budget.uses
        assert allowed == pytest.approx(0.025 * 0.95)


async def test_a_retry_needs_room_for_the_p95() -> None:
    async with stage(fails(Outcome.TRANSPORT, after_seconds=0.009), TRADES) as s:
        for seconds in (*[0.001] * 10, 0.016):
            s.secondary.latency.add(seconds)
        case = s.case(timeout_seconds=0.03)
        assert await s.champion.answer(case) is None
        assert case.degradations == [pb.DEGRADATION_PRIMARY_FAILED, pb.DEGRADATION_NO_TIME_FOR_MODEL]
        assert s.secondary.calls == 0


async def test_without_features_no_replica_is_asked() -> None:
    async with stage(TRADES, TRADES) as s:
        case = new_case(arrived=s.clock(), problem=pb.REASON_CODE_FEATURES_STALE)
        assert await s.champion.answer(case) is None
        assert (case.degradations, s.primary.calls) == ([], 0)


async def test_a_cancelled_caller_harms_no_other() -> None:
    async with stage(answers(0.75, after_seconds=0.005), TRADES) as s:
        callers = [asyncio.create_task(s.champion.answer(s.case())) for _ in range(3)]
        await asyncio.sleep(0.002)
        callers[1].cancel()
        first, _, third = await asyncio.gather(*callers, return_exceptions=True)
        assert not isinstance(first, BaseException | None)
        assert not isinstance(third, BaseException | None)
        assert first.source == third.source == pb.SOURCE_PRIMARY
        assert callers[1].cancelled()
        assert s.primary.calls == 1


scripts = st.one_of(
    st.builds(answers, st.sampled_from((0.2, 0.8, math.nan)), st.floats(0.0001, 0.08)),
    st.builds(fails, st.sampled_from((Outcome.TRANSPORT, Outcome.OVERLOAD)), st.floats(0.0001, 0.08)),
    st.just(hangs),
)


@settings(max_examples=75)
@given(
    primary=scripts,
    secondary=scripts,
    timeout_seconds=st.floats(0.001, 0.06),
    random=st.floats(0, 0.999),
    hedge=st.booleans(),
)
async def test_however_the_replicas_behave_the_reserve_is_never_touched(
    primary: Script, secondary: Script, timeout_seconds: float, random: float, hedge: bool
) -> None:
    async with stage(primary, secondary, HEDGING if hedge else PLENTY, random=lambda: random) as s:
        for _ in range(8):
            case, started = s.case(timeout_seconds), s.clock()
            answer = await s.champion.answer(case)
            elapsed = s.clock() - started
            assert elapsed <= max(0.0, timeout_seconds - case.budget.reserve_seconds) + 1e-9
            assert sum(used for _, _, used, _ in case.budget.uses) <= elapsed + 1e-9
            assert all(used <= max(0.0, allowed) + 1e-9 for _, allowed, used, _ in case.budget.uses)
            assert [a.replica for a in case.attempts] in ([], ["primary"], ["secondary"], ["primary", "secondary"])
            assert answer is not None or case.degradations != []
            assert answer is None or 0 <= answer.score <= 1


async def test_a_hedge_leaves_when_the_first_attempt_takes_longer_than_most_and_the_first_score_wins() -> None:
    async with stage(answers(0.75, after_seconds=0.002), REFUSES, HEDGING) as s:
        await s.champion.answer(s.case())
        s.primary.script = answers(0.75)
        for _ in range(19):
            await s.champion.answer(s.case())
        assert s.secondary.calls == 0, "none was slower than the others"
        s.primary.script = answers(0.75, after_seconds=0.009)
        case, started = s.case(), s.clock()
        answer = await s.champion.answer(case)
        assert answer is not None
        assert (answer.action, answer.source) == (pb.ACTION_NO_TRADE, pb.SOURCE_SECONDARY)
        assert s.clock() - started == pytest.approx(0.002 + 0.001), "the recent p95, then the secondary's time"
        assert case.degradations == [pb.DEGRADATION_PRIMARY_TIMEOUT]
        assert [(a.replica, a.outcome) for a in case.attempts] == [("primary", "ignored"), ("secondary", "success")]
        assert [ledger_stage for ledger_stage, *_ in case.budget.uses] == [pb.STAGE_PRIMARY, pb.STAGE_SECONDARY]
        await asyncio.sleep(0.01)
        assert s.primary.outcomes == {Outcome.SUCCESS: 21}, "the loser's batch counts for its replica"


async def test_a_first_attempt_that_ends_before_its_hedge_wins() -> None:
    async with stage(answers(0.75, after_seconds=0.007), answers(0.25, after_seconds=0.006), HEDGING) as s:
        case = s.case()
        answer = await s.champion.answer(case)
        assert answer is not None
        assert answer.source == pb.SOURCE_PRIMARY
        assert case.degradations == []
        assert [(a.replica, a.outcome) for a in case.attempts] == [("primary", "success"), ("secondary", "ignored")]


@pytest.mark.parametrize(
    "bad", [lambda seconds: answers(math.nan, seconds), lambda seconds: fails(Outcome.TRANSPORT, seconds)]
)
async def test_an_unusable_answer_wins_no_hedge(bad: Callable[[float], Script]) -> None:
    async with stage(bad(0.006), answers(0.75, after_seconds=0.008), HEDGING) as s:
        answer = await s.champion.answer(s.case())
        assert answer is not None
        assert answer.source == pb.SOURCE_SECONDARY
    async with stage(answers(0.75, after_seconds=0.009), bad(0.003), HEDGING) as s:
        answer = await s.champion.answer(s.case())
        assert answer is not None
        assert answer.source == pb.SOURCE_PRIMARY


async def test_hedges_and_retries_share_one_budget() -> None:
    one = RetrySettings(share=0, per_second=0.1, hedge=True)  # one in 10 s
    async with stage(answers(0.75, after_seconds=0.009), TRADES, one) as s:
        await s.champion.answer(s.case())
        assert s.secondary.calls == 1
        await s.champion.answer(s.case())
        assert s.secondary.calls == 1
        s.primary.script = fails(Outcome.TRANSPORT)
        case = s.case()
        assert await s.champion.answer(case) is None
        assert case.degradations == [pb.DEGRADATION_PRIMARY_FAILED, pb.DEGRADATION_RETRY_BUDGET_EXHAUSTED]


async def test_a_first_attempt_that_fails_quickly_is_retried_not_hedged() -> None:
    async with stage(fails(Outcome.TRANSPORT), TRADES, HEDGING) as s:
        case = s.case()
        answer = await s.champion.answer(case)
        assert answer is not None
        assert answer.source == pb.SOURCE_SECONDARY
        assert case.degradations == [pb.DEGRADATION_PRIMARY_FAILED]


async def test_after_a_hedge_there_is_no_third_attempt() -> None:
    async with stage(fails(Outcome.TRANSPORT, 0.008), fails(Outcome.MODEL_ERROR, 0.008), HEDGING) as s:
        case = s.case()
        assert await s.champion.answer(case) is None
        assert case.degradations == [pb.DEGRADATION_PRIMARY_FAILED, pb.DEGRADATION_SECONDARY_FAILED]
        assert (s.primary.calls, s.secondary.calls) == (1, 1)


async def test_a_caller_that_goes_takes_both_attempts_out_of_their_queues() -> None:
    async with stage(hangs, hangs, HEDGING) as s:
        for replica in (s.primary, s.secondary):
            replica.batcher.submit(b"", s.clock() + 1)
        await asyncio.sleep(0)
        caller = asyncio.create_task(s.champion.answer(s.case()))
        await asyncio.sleep(0.008)
        assert s.primary.batcher.queued == s.secondary.batcher.queued == 1
        caller.cancel()
        await asyncio.wait((caller,))
        await asyncio.sleep(0.01)
        assert (s.primary.calls, s.secondary.calls) == (1, 1), "the queued rows were not sent"


async def test_attempts_retries_and_hedges_are_counted_by_what_became_of_them() -> None:
    async with stage(fails(Outcome.TRANSPORT), TRADES) as s:
        await s.champion.answer(s.case())
        assert s.champion.attempts == {("primary", Outcome.TRANSPORT): 1, ("secondary", Outcome.SUCCESS): 1}
        assert s.champion.second_attempts == {("retry", "granted"): 1, ("retry", "won"): 1}
    async with stage(fails(Outcome.TRANSPORT), fails(Outcome.MODEL_ERROR)) as s:
        await s.champion.answer(s.case())
        assert s.champion.second_attempts == {("retry", "granted"): 1}
    async with stage(fails(Outcome.TRANSPORT), TRADES, RetrySettings(share=0, per_second=0)) as s:
        await s.champion.answer(s.case())
        assert s.champion.second_attempts == {("retry", "refused"): 1}
    async with stage(hangs, TRADES, HEDGING) as s:
        await s.champion.answer(s.case())
        assert s.champion.second_attempts == {("hedge", "granted"): 1, ("hedge", "won"): 1}
        assert s.champion.attempts == {("primary", Outcome.IGNORED): 1, ("secondary", Outcome.SUCCESS): 1}


async def test_a_drained_replica_gets_no_orders_and_is_named() -> None:
    async with stage(TRADES, TRADES) as s:
        s.primary.drained = True
        case = s.case()
        answer = await s.champion.answer(case)
        assert answer is not None
        assert (answer.source, s.primary.calls) == (pb.SOURCE_SECONDARY, 0)
        assert case.degradations == [pb.DEGRADATION_PRIMARY_DRAINED]
        s.secondary.drained = True
        drained = s.case()
        assert await s.champion.answer(drained) is None
        assert drained.degradations == [pb.DEGRADATION_PRIMARY_DRAINED, pb.DEGRADATION_SECONDARY_DRAINED]
        s.primary.drained = False
        back = await s.champion.answer(s.case())
        assert back is not None
        assert back.source == pb.SOURCE_PRIMARY


async def test_a_model_of_another_set_gets_that_sets_row_and_a_model_of_mf1_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[bytes]] = []

    async def script(rows: list[bytes]) -> ScoreBatch:
        asked.append(rows)
        return await TRADES(rows)

    monkeypatch.setattr(model_sets, "_known", {"primary": MIXED})
    async with stage(script, TRADES) as s:
        case = s.case()
        case.others = {MIXED: SetRow.of(MIXED, b"row of mixed")}
        answer = await s.champion.answer(case)
        assert answer is not None
        assert asked == [[b"row of mixed"]]
        monkeypatch.setattr(model_sets, "_known", {})
        await s.champion.answer(case)
        assert asked[1:] == [[case.row()]]


async def test_a_model_whose_sets_features_are_missing_is_not_asked_and_the_next_replica_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_sets, "_known", {"primary": MIXED})
    for hedged in (False, True):
        async with stage(TRADES, TRADES, HEDGING if hedged else PLENTY) as s:
            case = s.case()
            answer = await s.champion.answer(case)
            assert answer is not None
            assert (answer.source, s.primary.calls) == (pb.SOURCE_SECONDARY, 0)
            assert case.degradations == [pb.DEGRADATION_FEATURES_OF_SET_MISSING]
            ledger_stage, _, _, skipped = case.budget.uses[0]
            assert (ledger_stage, skipped) == (pb.STAGE_PRIMARY, pb.DEGRADATION_FEATURES_OF_SET_MISSING)
