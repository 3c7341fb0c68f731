"""The choice between the endpoints of a role, and the champion stage on several; in virtual time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from random import Random

import numpy as np
import pytest
from support.cases import new_case
from support.scripted_replica import Script, ScriptedReplica, answers, fails, hangs

from fallback.budget import BudgetSettings
from fallback.joint_case import JointCase
from fallback.order import Answer, Case
from feature_cache.features import N_FEATURES
from pretrade.decision.v1 import decision_pb2 as pb
from server.inference.batcher import BatcherSettings
from server.inference.breaker import Mode
from server.inference.champion import Champion
from server.inference.outcome import BatchFailedError, Outcome
from server.inference.pool import Pool
from server.inference.retry_budget import RetryBudget, RetrySettings
from server.inference.wire import ModelIdentity, ScoreBatch

PLENTY = RetrySettings(share=1, per_second=1_000)
TRADES = answers(0.75)
FEATURES = np.ones(N_FEATURES, dtype=np.float32)
"""Of every order: a probe's are zeros."""
MODEL = ModelIdentity("champion", "aa" * 8, 0.5, 0)


class Servers:
    """Model servers behind one role, each with a health that a test changes."""

    def __init__(self, role: str, scripts: Sequence[Script]) -> None:
        random = Random(7)
        self.replicas = [
            ScriptedReplica(f"{role}-{number}", script, BatcherSettings(max_in_flight=4))
            for number, script in enumerate(scripts, 1)
        ]
        self.pool = Pool(role, self.replicas, random.random)

    @property
    def calls(self) -> list[int]:
        return [replica.calls for replica in self.replicas]


class Stage:
    """The champion stage on pools, or on a pool alone."""

    def __init__(self, primary: Sequence[Script], secondary: Sequence[Script], retry: RetrySettings) -> None:
        self.clock = asyncio.get_running_loop().time
        self.primary = Servers("primary", primary)
        self.secondary = Servers("secondary", secondary)
        self.champion = Champion(
            self.primary.pool,
            self.secondary.pool if secondary else None,
            RetryBudget(retry, self.clock),
            retry.hedge,
            BudgetSettings(),
            self.clock,
            lambda: 0.5,
        )

    def case(self, timeout_seconds: float = 0.05) -> Case:
        return new_case(arrived=self.clock(), timeout_seconds=timeout_seconds, values=FEATURES)

    async def ask(self) -> tuple[Case, Answer | None]:
        case = self.case()
        return case, await self.champion.answer(case)


@asynccontextmanager
async def stage(
    primary: Sequence[Script], secondary: Sequence[Script] = (), retry: RetrySettings = PLENTY
) -> AsyncIterator[Stage]:
    made = Stage(primary, secondary, retry)
    try:
        yield made
    finally:
        for replica in (*made.primary.replicas, *made.secondary.replicas):
            await replica.batcher.close()


def attempts(case: Case) -> list[tuple[str, str]]:
    return [(attempt.replica, attempt.outcome) for attempt in case.attempts]


async def test_orders_that_come_together_go_to_one_endpoint_in_one_batch() -> None:
    async with stage([TRADES] * 4) as s:
        answered = await asyncio.gather(*(s.ask() for _ in range(32)))
        assert all(answer is not None and answer.source == pb.SOURCE_PRIMARY for _, answer in answered)
        assert sorted(s.primary.calls) == [0, 0, 0, 1]


def joint(s: Stage, told: list[JointCase]) -> JointCase:
    alone = s.case()
    case = JointCase(alone.order, alone.budget, asyncio.get_running_loop().create_future(), told.append)
    case.features = alone.features
    return case


async def test_cases_that_are_begun_together_are_one_batch_of_one_endpoint_and_say_which() -> None:
    async with stage([TRADES] * 4) as s:
        told: list[JointCase] = []
        cases = [joint(s, told) for _ in range(100)]
        assert s.champion.begin(cases) == cases
        await asyncio.sleep(0.02)
        assert len(told) == 100
        answered = [s.champion.settle(case) for case in cases]
        assert all(answer is not None and answer.source == pb.SOURCE_PRIMARY for answer in answered)
        assert sorted(s.primary.calls) == [0, 0, 0, 1]
        (name,) = {case.attempts[0].replica for case in cases}
        assert name in {replica.name for replica in s.primary.replicas}


async def test_a_case_that_was_begun_with_others_goes_on_at_another_endpoint() -> None:
    async with stage([fails(Outcome.TRANSPORT)] * 2) as s:
        told: list[JointCase] = []
        cases = [joint(s, told) for _ in range(3)]
        assert len(s.champion.begin(cases)) == 3
        await asyncio.sleep(0.005)
        assert [s.champion.settle(case) for case in cases] == [None] * 3
        for replica in s.primary.replicas:
            replica.script = TRADES
        answered = await asyncio.gather(*(s.champion.go_on(case) for case in cases))
        assert all(answer is not None for answer in answered)
        for case in cases:
            (first, how), (second, then) = attempts(case)
            assert (how, then) == ("transport", "success")
            assert first != second


async def test_orders_that_come_while_a_batch_is_under_way_go_to_an_endpoint_that_is_free() -> None:
    async with stage([answers(0.75, after_seconds=0.008)] * 2) as s:
        first = asyncio.ensure_future(s.ask())
        await asyncio.sleep(0.001)
        second = asyncio.ensure_future(s.ask())
        await asyncio.sleep(0.001)
        assert s.primary.calls == [1, 1]
        await asyncio.gather(first, second)


async def test_many_orders_load_equal_endpoints_evenly() -> None:
    async with stage([answers(0.75, after_seconds=0.002)] * 4) as s:
        for _ in range(400):
            asyncio.ensure_future(s.ask())  # noqa: RUF006 - ends within the test
            await asyncio.sleep(0.0007)
        await asyncio.sleep(0.1)
        least, *_, most = sorted(s.primary.calls)
        assert least > most / 2, s.primary.calls


async def test_with_two_of_four_dead_every_order_is_answered_by_a_model() -> None:
    async with stage([TRADES] * 4) as s:
        await asyncio.gather(*(s.ask() for _ in range(4)))
        for dead in s.primary.replicas[1:3]:
            dead.script = fails(Outcome.TRANSPORT)
        _, *before, _ = s.primary.calls
        for _ in range(300):
            case, answer = await s.ask()
            assert answer is not None, attempts(case)
            await asyncio.sleep(0.001)
        _, *after, _ = s.primary.calls
        assert max(np.subtract(after, before)) == 1, "one batch tells that an endpoint is dead"


async def test_a_retry_goes_to_the_other_role_and_to_another_endpoint_where_there_is_none() -> None:
    dies = fails(Outcome.TRANSPORT)
    async with stage([dies, dies], [TRADES]) as s:
        case, answer = await s.ask()
        assert answer is not None
        assert answer.source == pb.SOURCE_SECONDARY
        assert [name.partition("-")[0] for name, _ in attempts(case)] == ["primary", "secondary"]
    async with stage([dies, TRADES]) as s:
        seen: Counter[tuple[tuple[str, str], ...]] = Counter()
        for _ in range(20):
            case, answer = await s.ask()
            assert answer is not None
            seen[tuple(attempts(case))] += 1
        assert set(seen) <= {
            (("primary-2", "success"),),
            (("primary-1", "transport"), ("primary-2", "success")),
        }


async def test_no_order_is_tried_a_third_time_nor_twice_at_one_endpoint() -> None:
    async with stage([fails(Outcome.MODEL_ERROR)] * 4, [fails(Outcome.TRANSPORT)] * 2) as s:
        for _ in range(50):
            case, answer = await s.ask()
            names = [name for name, _ in attempts(case)]
            assert answer is None
            assert len(names) <= 2
            assert len(set(names)) == len(names)
            await asyncio.sleep(0.001)


async def test_a_pool_that_is_out_hands_over_to_the_other_role_at_no_cost() -> None:
    async with stage([TRADES] * 2, [TRADES] * 2, RetrySettings(share=0, per_second=0)) as s:
        s.primary.replicas[0].breaker.force(Mode.FORCED_OPEN)
        s.primary.replicas[1].drained = True
        case, answer = await s.ask()
        assert answer is not None
        assert answer.source == pb.SOURCE_SECONDARY
        assert case.degradations == [pb.DEGRADATION_PRIMARY_BREAKER_OPEN]
        s.primary.replicas[0].drained = True
        case, _ = await s.ask()
        assert case.degradations == [pb.DEGRADATION_PRIMARY_DRAINED], "all of them are drained"


async def test_an_endpoint_that_is_ejected_gets_no_order() -> None:
    async with stage([TRADES] * 2) as s:
        s.primary.replicas[0].ejected = "does not serve model 1234"
        for _ in range(20):
            await s.ask()
        assert s.primary.calls == [0, 20]


async def test_hedging_asks_another_endpoint_of_the_only_role() -> None:
    async with stage([TRADES] * 2, retry=PLENTY.model_copy(update={"hedge": True})) as s:
        for _ in range(40):
            await s.ask()
        first = s.primary.pool.pick()
        assert first is not None
        assert isinstance(first, ScriptedReplica)
        first.script = hangs
        case, answer = await s.ask()
        assert answer is not None
        assert sorted(outcome for _, outcome in attempts(case)) == ["ignored", "success"]


@pytest.mark.parametrize("slow_seconds", [0.02, 0.2])
async def test_an_endpoint_that_becomes_twenty_times_slower_is_passed_over_within_a_tenth_of_a_second(
    slow_seconds: float,
) -> None:
    async with stage([TRADES] * 4) as s:
        probers = [replica.start_probing() for replica in s.primary.replicas]
        loop = asyncio.get_running_loop()
        arrivals: dict[str, list[float]] = {}

        def noting(name: str, seconds: float) -> Script:
            async def script(rows: list[bytes]) -> ScoreBatch:
                if rows[0] == FEATURES.tobytes():
                    arrivals.setdefault(name, []).append(loop.time())
                await asyncio.sleep(seconds)
                return ScoreBatch(MODEL, np.full(len(rows), 0.75, dtype=np.float32))

            return script

        for replica in s.primary.replicas:
            replica.script = noting(replica.name, 0.001)
        tasks = []

        async def trade(seconds: float) -> None:
            for _ in range(int(seconds / 0.0005)):
                tasks.append(asyncio.ensure_future(s.ask()))
                await asyncio.sleep(0.0005)

        await trade(0.5)
        slow, began = s.primary.replicas[2], loop.time()
        slow.script = noting(slow.name, slow_seconds)
        await trade(1.0)
        results = await asyncio.gather(*tasks)
        for prober in probers:
            prober.cancel()
        assert all(answer is not None for _, answer in results)
        late = [round(when - began, 3) for when in arrivals[slow.name] if when > began + 0.1]
        assert not late, "orders still wait for it"
        assert len(arrivals["primary-1"]) > 100


async def test_an_endpoint_that_is_quick_again_gets_orders_again() -> None:
    async with stage([TRADES] * 2) as s:
        probers = [replica.start_probing() for replica in s.primary.replicas]
        slow = s.primary.replicas[0]
        for script, seconds in ((answers(0.75, after_seconds=0.04), 1.0), (TRADES, 5.0)):
            slow.script = script
            until = s.clock() + seconds
            before = slow.calls
            while s.clock() < until:
                asyncio.ensure_future(s.ask())  # noqa: RUF006 - ends within the test
                await asyncio.sleep(0.0005)
        await asyncio.sleep(0.1)
        for prober in probers:
            prober.cancel()
        assert slow.calls - before > 500


async def test_an_endpoint_whose_batch_failed_is_not_asked_while_another_is_sound() -> None:
    async with stage([TRADES] * 3) as s:
        present = s.primary.pool.pick()
        assert isinstance(present, ScriptedReplica)

        async def fails_once(_rows: list[bytes]) -> ScoreBatch:
            present.script = TRADES
            raise BatchFailedError(Outcome.MODEL_ERROR, "once")

        present.script = fails_once
        await s.ask()
        before = present.calls
        for _ in range(50):
            await s.ask()
        assert present.calls == before
