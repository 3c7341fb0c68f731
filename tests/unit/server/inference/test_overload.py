"""Admission before the champion stage, under an open loop of orders, in virtual time.

A replica here takes 0.2 ms a batch and 0.5 ms a row, so that its capacity is just under 2,000 rows a second. The
secondary sees only retries.
"""

from __future__ import annotations

import asyncio

import numpy as np
from support.cases import new_case
from support.scripted_replica import ScriptedReplica

from fallback.budget import BudgetSettings
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.admission import Admission, AdmissionSettings
from server.errors import OverloadedError
from server.inference.batcher import BatcherSettings
from server.inference.champion import Champion
from server.inference.retry_budget import RetryBudget, RetrySettings
from server.inference.wire import ModelIdentity, ScoreBatch

CAPACITY = 2_000
TIMEOUT_SECONDS = 0.025
MODEL = ModelIdentity("champion", "aa" * 8, 0.5, 0)


async def takes_time_for_every_row(rows: list[bytes]) -> ScoreBatch:
    await asyncio.sleep(0.0002 + len(rows) / CAPACITY)
    return ScoreBatch(MODEL, np.full(len(rows), 0.75, dtype=np.float32))


class Callers:
    """Orders that arrive whether or not earlier ones were answered."""

    def __init__(self, admission_settings: AdmissionSettings) -> None:
        self.clock = asyncio.get_running_loop().time
        self.admission = Admission(admission_settings, self.clock)
        batcher_settings = BatcherSettings(max_rows=16)
        self.primary = ScriptedReplica("primary", takes_time_for_every_row, batcher_settings)
        self.secondary = ScriptedReplica("secondary", takes_time_for_every_row, batcher_settings)
        retry_budget = RetryBudget(RetrySettings(), self.clock)
        self.champion = Champion(
            self.primary, self.secondary, retry_budget, False, BudgetSettings(), self.clock, lambda: 0.5
        )
        self.times: list[float] = []
        """Of the admitted orders, in seconds."""
        self.scored = 0

    async def send(self, per_second: float, seconds: float) -> None:
        """Sends orders for so long, and waits for the answers to them."""
        self.times, self.scored, self.admission.shed = [], 0, 0
        async with asyncio.TaskGroup() as orders:
            started = self.clock()
            sent = 0
            while (elapsed := self.clock() - started) < seconds:
                for _ in range(int(elapsed * per_second) - sent):
                    sent += 1
                    try:
                        self.admission.admit(False)
                    except OverloadedError:
                        continue
                    orders.create_task(self._decide())
                await asyncio.sleep(0.0005)

    async def _decide(self) -> None:
        case = new_case(arrived=self.clock(), timeout_seconds=TIMEOUT_SECONDS, reserve_seconds=0.0045)
        answer = await self.champion.answer(case)
        self.admission.leave()
        elapsed = self.clock() - case.budget.arrived
        self.times.append(elapsed)
        if answer is None:
            self.admission.dropped(TIMEOUT_SECONDS)
        else:
            assert answer.source in (pb.SOURCE_PRIMARY, pb.SOURCE_SECONDARY)
            self.scored += 1
            self.admission.answered([(elapsed, TIMEOUT_SECONDS)])


async def test_ten_times_the_load_leaves_goodput_at_capacity_and_passes_within_five_seconds() -> None:
    callers = Callers(AdmissionSettings(min_in_flight=4))
    await callers.send(CAPACITY / 2, seconds=1)
    assert callers.admission.shed == 0
    usual = float(np.quantile(callers.times, 0.99))

    await callers.send(10 * CAPACITY, seconds=2)  # the limit finds its place
    await callers.send(10 * CAPACITY, seconds=2)
    assert callers.scored >= 0.9 * CAPACITY * 2
    assert callers.scored >= 0.8 * len(callers.times), (
        "most of what is admitted is scored, the rest is answered in time"
    )
    assert np.quantile(callers.times, 0.99) <= TIMEOUT_SECONDS
    assert callers.admission.shed > 0

    await callers.send(CAPACITY / 2, seconds=5)
    await callers.send(CAPACITY / 2, seconds=1)
    assert callers.admission.shed == 0
    assert callers.scored == len(callers.times)
    assert np.quantile(callers.times, 0.99) <= usual * 1.1


async def test_a_limit_that_ignores_latency_would_admit_what_nobody_can_score_in_time() -> None:
    callers = Callers(AdmissionSettings(max_in_flight=2_048, min_in_flight=2_048))
    await callers.send(10 * CAPACITY, seconds=1)
    assert callers.scored < 0.5 * len(callers.times)
