"""Poison rows on a whole replica: its breaker, batcher and latency, in virtual time."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from support.scripted_replica import ScriptedReplica, fails

from server.inference.batcher import Scored
from server.inference.breaker import State
from server.inference.outcome import BatchFailedError, Outcome
from server.inference.wire import ModelIdentity, ScoreBatch

POISON = b"poison"


async def fails_on_poison(rows: list[bytes]) -> ScoreBatch:
    """A handler that raises for one row, and so for the batch."""
    await asyncio.sleep(0.001)
    if POISON in rows:
        raise BatchFailedError(Outcome.MODEL_ERROR, "the handler raised")
    return ScoreBatch(ModelIdentity("champion", "aa" * 8, 0.5, 0), np.full(len(rows), 0.75, dtype=np.float32))


@pytest.mark.fault(
    "A8",
    "The model fails on one row in every batch",
    "The other orders of the batch get their scores. No breaker opens.",
)
async def test_a_poison_row_in_every_batch_opens_no_breaker_and_fails_alone() -> None:
    replica = ScriptedReplica("primary", fails_on_poison)
    clock = asyncio.get_running_loop().time
    for _ in range(50):
        rows = [replica.batcher.submit(POISON if number == 3 else b"fine", clock() + 0.03) for number in range(8)]
        results = await asyncio.gather(*rows)
        assert results[3] is Outcome.MODEL_ERROR
        assert all(isinstance(result, Scored) for number, result in enumerate(results) if number != 3)
    assert replica.breaker.state is State.CLOSED
    assert replica.batcher.splits == 50
    assert replica.calls == 50 * 9
    await replica.batcher.close()


async def test_a_broken_model_opens_its_breaker_within_a_second_although_its_batches_are_split() -> None:
    replica = ScriptedReplica("primary", fails(Outcome.MODEL_ERROR, after_seconds=0.008))
    clock = asyncio.get_running_loop().time
    started = clock()
    while replica.breaker.state is State.CLOSED:
        rows = [replica.batcher.submit(b"row", clock() + 0.02) for _ in range(64)]
        assert not any(isinstance(result, Scored) for result in await asyncio.gather(*rows))
    assert clock() - started < 1
    assert replica.outcomes == {Outcome.MODEL_ERROR: 5}
    await replica.batcher.close()


async def test_what_a_callers_own_row_may_have_caused_is_no_evidence_against_a_model() -> None:
    replica = ScriptedReplica("challenger", fails_on_poison)
    told: list[Outcome] = []
    replica.on_batch(lambda outcome, seconds: told.append(outcome))
    clock = asyncio.get_running_loop().time
    await replica.batcher.submit(POISON, clock() + 0.03, from_caller=True)
    assert (told, replica.outcomes) == ([], {Outcome.MODEL_ERROR: 1}), "the breaker knows of it"
    mates = [replica.batcher.submit(row, clock() + 0.03, from_caller=row == POISON) for row in (POISON, b"fine")]
    await asyncio.gather(*mates)
    assert told == [Outcome.SUCCESS], "its mate was scored"
    await replica.batcher.submit(b"fine", clock() + 0.03, from_caller=True)
    await replica.batcher.submit(POISON, clock() + 0.03)
    assert told == [Outcome.SUCCESS, Outcome.SUCCESS, Outcome.MODEL_ERROR], "the last is a row of the server's own"
    await replica.batcher.close()
