"""Shadow rows: compared where they are scored, counted where they are not, never waited for."""

from __future__ import annotations

import asyncio
import math

import numpy as np
from scripted_replica import ScriptedReplica, answers, fails, hangs

from feature_cache import features
from server.inference.batcher import BatcherSettings
from server.inference.breaker import Mode
from server.inference.outcome import Outcome
from server.inference.shadow import Shadow

ROW = np.zeros(features.N_FEATURES, dtype=np.float32)


async def test_the_challenger_agrees_where_both_fall_on_the_same_side() -> None:
    challenger = ScriptedReplica("challenger", answers(0.7, threshold=0.6))
    shadow = Shadow(challenger)
    shadow.mirror(ROW, 0.9, 0.5)
    shadow.mirror(ROW, 0.1, 0.5)
    shadow.mirror(ROW, math.nan, math.nan)
    await asyncio.sleep(0.1)
    assert shadow.fates() == {"agreed": 1, "disagreed": 1, "uncompared": 1, "failed": 0, "shed": 0, "refused": 0}
    assert challenger.calls == 1, "one batch"
    await challenger.batcher.close()


async def test_a_failing_challenger_is_counted() -> None:
    challenger = ScriptedReplica("challenger", fails(Outcome.MODEL_ERROR))
    shadow = Shadow(challenger)
    shadow.mirror(ROW, 0.9, 0.5)
    await asyncio.sleep(0.1)
    assert shadow.failed == 1
    await challenger.batcher.close()


async def test_a_hanging_challenger_holds_a_bounded_number_of_rows() -> None:
    challenger = ScriptedReplica("challenger", hangs, BatcherSettings(max_queued_shadow_rows=10))
    shadow = Shadow(challenger)
    for _ in range(50):
        for _ in range(20):
            shadow.mirror(ROW, 0.9, 0.5)
        await asyncio.sleep(0.02)
    assert shadow.offered == 1_000
    assert challenger.batcher.queued <= 10
    assert challenger.batcher.in_flight <= 8
    # Once its breaker is open it is not even asked.
    assert shadow.refused > 0
    assert shadow.refused + shadow.failed + challenger.batcher.shed + challenger.batcher.queued == 1_000
    await challenger.batcher.close()


async def test_a_challenger_whose_breaker_is_open_is_not_asked() -> None:
    challenger = ScriptedReplica("challenger", answers(0.7))
    challenger.breaker.force(Mode.FORCED_OPEN)
    shadow = Shadow(challenger)
    shadow.mirror(ROW, 0.9, 0.5)
    assert (shadow.refused, challenger.batcher.queued) == (1, 0)
