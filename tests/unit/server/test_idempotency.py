"""The promise of the idempotency key: the same key, the same decision, made once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from cases import Clock, new_case

from fallback.order import Answer
from pretrade.decision.v1 import decision_pb2 as pb
from server.errors import DeadlineError, KeyReusedError, OverloadedError
from server.idempotency import IdempotencySettings, IdempotencyWindow
from server.record import Decided

SETTINGS = IdempotencySettings(window_seconds=60, max_keys=3)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def window(clock: Clock) -> IdempotencyWindow:
    return IdempotencyWindow(SETTINGS, clock)


def order(key: str = "key", quantity: float = 1.0, timeout_seconds: int = 1) -> pb.Order:
    message = pb.Order(instrument="BTCUSDT.BINANCE", quantity=quantity, strategy="alpha", idempotency_key=key)
    message.timeout.seconds = timeout_seconds
    return message


class Decider:
    """Makes a decision with a new id each time; waits at the gate if there is one."""

    def __init__(self) -> None:
        self.made = 0
        self.gate: asyncio.Event | None = None

    async def __call__(self) -> Decided:
        self.made += 1
        answer = Answer(pb.ACTION_ABSTAIN, pb.SOURCE_NONE, pb.REASON_CODE_NO_SOURCE)
        decision = Decided(new_case(), answer, answer.action, [answer.reason], f"decision-{self.made}", 1_000.0, 0)
        if self.gate is not None:
            await self.gate.wait()
        return decision


def soon() -> float:
    return asyncio.get_running_loop().time() + 30


async def once(
    window: IdempotencyWindow, decide: Callable[[], Awaitable[Decided]], message: pb.Order | None = None
) -> str:
    return (await window.once(message or order(), soon(), decide)).decision_id


async def test_the_same_key_gets_the_same_decision(window: IdempotencyWindow) -> None:
    decide = Decider()
    assert [await once(window, decide) for _ in range(3)] == ["decision-1"] * 3
    assert (decide.made, window.repeated) == (1, 2)


async def test_another_key_gets_its_own(window: IdempotencyWindow) -> None:
    decide = Decider()
    assert await once(window, decide, order("a")) != await once(window, decide, order("b"))


async def test_concurrent_repeats_decide_once(window: IdempotencyWindow) -> None:
    decide = Decider()
    decide.gate = asyncio.Event()
    calls = [asyncio.create_task(once(window, decide)) for _ in range(50)]
    await asyncio.sleep(0)
    decide.gate.set()
    assert set(await asyncio.gather(*calls)) == {"decision-1"}
    assert (decide.made, window.repeated) == (1, 49)


async def test_the_same_key_for_another_order_is_refused(window: IdempotencyWindow) -> None:
    decide = Decider()
    await once(window, decide)
    with pytest.raises(KeyReusedError) as caught:
        await once(window, decide, order(quantity=2.0))
    assert (caught.value.reason, caught.value.field) == ("IDEMPOTENCY_KEY_REUSED", "idempotency_key")
    assert decide.made == 1


async def test_another_order_is_refused_while_the_first_is_under_way(window: IdempotencyWindow) -> None:
    decide = Decider()
    decide.gate = asyncio.Event()
    first = asyncio.create_task(once(window, decide))
    await asyncio.sleep(0)
    with pytest.raises(KeyReusedError):
        await once(window, decide, order(quantity=2.0))
    decide.gate.set()
    assert await first == "decision-1"


async def test_a_repeat_may_allow_another_time(window: IdempotencyWindow) -> None:
    decide = Decider()
    await once(window, decide, order(timeout_seconds=1))
    assert await once(window, decide, order(timeout_seconds=2)) == "decision-1"


async def test_a_first_call_that_fails_frees_the_key(window: IdempotencyWindow) -> None:
    async def fail() -> Decided:
        raise DeadlineError("DEADLINE_EXCEEDED", "too late")

    decide = Decider()
    with pytest.raises(DeadlineError):
        await once(window, fail)
    assert len(window) == 0
    assert await once(window, decide, order(quantity=2.0)) == "decision-1"


async def test_when_the_first_call_is_cancelled_one_waiting_repeat_decides(window: IdempotencyWindow) -> None:
    decide = Decider()
    decide.gate = asyncio.Event()
    first, *repeats = [asyncio.create_task(once(window, decide)) for _ in range(5)]
    await asyncio.sleep(0)
    first.cancel()
    decide.gate.set()
    assert await asyncio.gather(*repeats) == ["decision-2"] * 4
    assert first.cancelled()
    assert decide.made == 2


async def test_a_cancelled_repeat_leaves_the_first_call_alone(window: IdempotencyWindow) -> None:
    decide = Decider()
    decide.gate = asyncio.Event()
    first, repeat = [asyncio.create_task(once(window, decide)) for _ in range(2)]
    await asyncio.sleep(0)
    repeat.cancel()
    decide.gate.set()
    assert await first == "decision-1"
    assert decide.made == 1


async def test_a_repeat_waits_no_longer_than_its_own_deadline(window: IdempotencyWindow) -> None:
    decide = Decider()
    decide.gate = asyncio.Event()
    first = asyncio.create_task(once(window, decide))
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await window.once(order(), asyncio.get_running_loop().time(), decide)
    decide.gate.set()
    assert await first == "decision-1"


async def test_a_key_is_forgotten_after_the_window(window: IdempotencyWindow, clock: Clock) -> None:
    decide = Decider()
    await once(window, decide)
    clock.now += 59.9
    assert await once(window, decide) == "decision-1"
    clock.now += 0.2
    assert await once(window, decide, order(quantity=2.0)) == "decision-2"
    assert len(window) == 1


async def test_keys_beyond_the_bound_are_shed_until_one_expires(window: IdempotencyWindow, clock: Clock) -> None:
    decide = Decider()
    for key in "abc":
        await once(window, decide, order(key))
    with pytest.raises(OverloadedError):
        await once(window, decide, order("d"))
    assert await once(window, decide, order("a")) == "decision-1", "known keys are kept"
    clock.now += 61
    assert await once(window, decide, order("d")) == "decision-4"
    assert len(window) == 1


async def test_a_call_still_under_way_outlives_the_window(window: IdempotencyWindow, clock: Clock) -> None:
    decide = Decider()
    decide.gate = asyncio.Event()
    first = asyncio.create_task(once(window, decide))
    await asyncio.sleep(0)
    clock.now += 61
    repeat = asyncio.create_task(once(window, decide))
    await asyncio.sleep(0)
    decide.gate.set()
    assert {await first, await repeat} == {"decision-1"}
