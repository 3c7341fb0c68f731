"""A whole replica in virtual time: its health probes, its breaker and its batcher, and rows that a model fails on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc
import grpc.aio
import numpy as np
import pytest
from support.scripted_replica import Script, ScriptedReplica, answers, fails, hangs
from support.virtual_time import until

from feature_cache.features import MF1
from server.inference.breaker import BreakerSettings, State
from server.inference.outcome import BatchFailedError, Outcome
from server.inference.rows import Scored
from server.inference.wire import ModelIdentity, ScoreBatch

BREAKER = BreakerSettings(consecutive_failures=3)


@asynccontextmanager
async def probed(script: Script) -> AsyncIterator[ScriptedReplica]:
    replica = ScriptedReplica("primary", script, breaker_settings=BREAKER)
    prober = replica.start_probing()
    try:
        yield replica
    finally:
        prober.cancel()
        with suppress(asyncio.CancelledError):
            await prober


async def test_a_replica_is_unhealthy_until_its_first_sound_answer() -> None:
    async with probed(answers(0.5, after_seconds=0.005)) as replica:
        assert not replica.healthy
        await replica.proven.wait()
        assert replica.healthy


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        (fails(Outcome.TRANSPORT), Outcome.TRANSPORT),
        (answers(float("nan")), Outcome.BAD_ANSWER),
        (answers(1.5), Outcome.BAD_ANSWER),
        (hangs, Outcome.TIMEOUT),
    ],
)
async def test_failing_probes_alone_open_the_breaker(script: Script, outcome: Outcome) -> None:
    async with probed(script) as replica:
        await asyncio.sleep(10)
        assert replica.transitions[State.OPEN] > 0
        assert not replica.available
        assert not replica.healthy
        assert set(replica.outcomes) == {outcome}


async def test_a_healed_replica_is_back_within_the_longest_open_time() -> None:
    async with probed(fails(Outcome.TRANSPORT)) as replica:
        await asyncio.sleep(60)
        assert replica.transitions[State.OPEN] > 10
        replica.script = answers(0.5)
        healed = asyncio.get_running_loop().time()
        await until(lambda: replica.available)
        assert asyncio.get_running_loop().time() - healed <= BREAKER.max_open_seconds + 0.1
        assert replica.healthy


async def test_a_stuck_probe_reopens_the_breaker() -> None:
    async with probed(fails(Outcome.TRANSPORT)) as replica:
        await until(lambda: replica.breaker.state is State.OPEN)
        replica.script = hangs
        opened = replica.transitions[State.OPEN]
        await asyncio.sleep(3)
        assert replica.transitions[State.OPEN] > opened
        assert replica.transitions[State.CLOSED] == 0


async def test_a_full_replica_is_probed_again_without_a_verdict() -> None:
    async with probed(fails(Outcome.TRANSPORT)) as replica:
        await until(lambda: replica.breaker.state is State.OPEN)
        opened = replica.transitions[State.OPEN]
        replica.script = fails(Outcome.OVERLOAD)
        await until(lambda: replica.breaker.state is State.HALF_OPEN)
        await asyncio.sleep(5)
        assert not replica.available
        assert (replica.transitions[State.OPEN], replica.transitions[State.CLOSED]) == (opened, 0)


@pytest.mark.parametrize("steps", range(6))
async def test_probes_end_even_when_they_are_wanted_at_that_moment(steps: int) -> None:
    replica = ScriptedReplica("primary", answers(0.5), breaker_settings=BREAKER)
    prober = replica.start_probing()
    await replica.proven.wait()
    await asyncio.sleep(0.01)
    for _ in range(BREAKER.consecutive_failures):  # opens the breaker, and so has the prober look again
        replica.breaker.record(Outcome.TIMEOUT, 0.050, replica.breaker.generation)
    for _ in range(steps):
        await asyncio.sleep(0)
    prober.cancel()
    await asyncio.sleep(60)
    assert prober.cancelled()


@pytest.mark.parametrize("quick_calls", [0, 1], ids=["probe", "warm-up"])
async def test_a_call_that_takes_too_long_is_given_up_and_not_cancelled(quick_calls: int) -> None:
    ends: list[str] = []

    async def slow(rows: list[bytes]) -> ScoreBatch:
        try:
            await asyncio.sleep(1.0 if replica.calls > quick_calls else 0.001)
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise
        ends.append("answered")
        return await answers(0.5)(rows)

    replica = ScriptedReplica("primary", slow, breaker_settings=BREAKER, warm_up_seconds=0.1)
    prober = replica.start_probing()
    await asyncio.sleep(10)
    assert replica.outcomes[Outcome.TIMEOUT] > 3
    assert replica.warm == bool(quick_calls)
    assert len(ends) > 3
    assert set(ends) == {"answered"}
    prober.cancel()


async def test_probes_survive_a_fault_of_ours() -> None:
    async def broken(_rows: list[bytes]) -> ScoreBatch:
        raise ZeroDivisionError

    async with probed(broken) as replica:
        await asyncio.sleep(5)
        assert not replica.available
        replica.script = answers(0.5)
        await replica.proven.wait()


async def test_a_replica_that_closes_its_breaker_is_not_judged_by_what_opened_it() -> None:
    async with probed(answers(0.5)) as replica:
        await replica.proven.wait()
        opened = asyncio.get_running_loop().time()
        for _ in range(BREAKER.consecutive_failures):
            replica.latency.add(0.050)
            replica.breaker.record(Outcome.TIMEOUT, 0.050, replica.breaker.generation)
        await until(lambda: replica.available)
        assert asyncio.get_running_loop().time() - opened <= BREAKER.open_seconds + 0.1, (
            "it is probed as soon as it may"
        )
        assert replica.latency.p95 == pytest.approx(0.001)


async def test_a_replica_that_grew_slow_is_probed_until_it_is_out_or_sound_though_no_order_asks_it() -> None:
    async with probed(answers(0.5)) as replica:
        await replica.proven.wait()
        replica.script = answers(0.5, after_seconds=BREAKER.slow_seconds * 2)
        report = replica._begin(from_caller=False, shadow=False)
        slow_at = asyncio.get_running_loop().time()
        report(Outcome.SUCCESS, BREAKER.slow_seconds)
        await until(lambda: not replica.available)
        assert asyncio.get_running_loop().time() - slow_at < 0.5, "the regular probes alone take seconds"


async def test_a_block_of_shadow_rows_is_slow_to_nobody() -> None:
    replica = ScriptedReplica("challenger", answers(0.5), breaker_settings=BREAKER)
    heard: list[float] = []
    replica.on_batch(lambda outcome, seconds: heard.append(seconds))
    for _ in range(BREAKER.consecutive_failures):
        replica._begin(from_caller=False, shadow=True)(Outcome.SUCCESS, BREAKER.slow_seconds)
    assert replica.available
    assert len(heard) == BREAKER.consecutive_failures
    assert all(map(math.isnan, heard)), "what compares models hears how they ended"
    for _ in range(BREAKER.consecutive_failures):
        replica._begin(from_caller=False, shadow=True)(Outcome.TIMEOUT, 0.5)
    assert not replica.available, "one that does not answer is out all the same"


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


def cools(calls: int) -> Script:
    """A replica that answers in 9 ms at first and gets quicker with each call, until it is warm."""
    made = 0

    async def script(rows: list[bytes]) -> ScoreBatch:
        nonlocal made
        made += 1
        return await answers(0.5, after_seconds=0.003 + 0.006 * max(0.0, 1 - made / calls))(rows)

    return script


@asynccontextmanager
async def warming(script: Script, seconds: float = 10.0) -> AsyncIterator[ScriptedReplica]:
    replica = ScriptedReplica("primary", script, warm_up_seconds=seconds)
    prober = replica.start_probing()
    try:
        yield replica
    finally:
        prober.cancel()
        with suppress(asyncio.CancelledError):
            await prober


async def test_a_replica_is_warmed_up_until_it_answers_no_quicker() -> None:
    async with warming(cools(calls=400)) as replica:
        await replica.proven.wait()
        assert not replica.warm
        await until(lambda: replica.warm)
        assert 400 <= replica.calls <= 600
        assert replica.latency.expected == pytest.approx(0.003)


async def test_a_warm_up_ends_with_its_time_or_with_a_failure() -> None:
    async with warming(cools(calls=400), seconds=1.0) as replica:
        began = asyncio.get_running_loop().time()
        await until(lambda: replica.warm)
        assert asyncio.get_running_loop().time() - began == pytest.approx(1.0, abs=0.1)
    async with warming(answers(0.5)) as replica:
        await replica.proven.wait()
        replica.script = fails(Outcome.TRANSPORT)
        await until(lambda: replica.warm)
        assert replica.calls < 10


async def test_a_replica_is_warmed_up_once() -> None:
    async with warming(answers(0.5)) as replica:
        await until(lambda: replica.warm)
        calls = replica.calls
        await asyncio.sleep(10)
        assert replica.calls - calls <= 11, "one health probe a second"


@pytest.mark.parametrize(("after", "outcome"), [(0.99, Outcome.TRANSPORT), (1.0, Outcome.TIMEOUT)])
async def test_a_server_that_ends_a_call_because_its_time_is_up_is_a_timeout(
    monkeypatch: pytest.MonkeyPatch, after: float, outcome: Outcome
) -> None:
    """It knows the deadline, and may be heard before gRPC's own timer."""
    replica = ScriptedReplica("primary", hangs)

    async def resets(*_: object, timeout: float, **__: object) -> None:  # noqa: ASYNC109 - gRPC's name for it
        await asyncio.sleep(timeout * after)
        raise grpc.aio.AioRpcError(
            grpc.StatusCode.CANCELLED, grpc.aio.Metadata(), grpc.aio.Metadata(), "Stream removed (RST_STREAM)"
        )

    monkeypatch.setattr(replica, "_call", resets, raising=False)
    with pytest.raises(BatchFailedError) as failure:
        await replica.ask([bytes(4 * len(MF1))], None)
    assert failure.value.outcome is outcome
