"""The promise of the idempotency key: the same key, the same decision, made once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Clock, new_case

from fallback.order import Answer
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.idempotency import IdempotencyWindow, identify
from server.decision.record import Decided
from server.decision.shared_keys import PLACES, SharedKeys, make_memory
from server.errors import DeadlineError, KeyReusedError, OverloadedError


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def window(clock: Clock) -> Iterator[IdempotencyWindow]:
    """Of sixty seconds, for as many keys as one bucket has places."""
    memory = make_memory(1)
    yield IdempotencyWindow(clock, SharedKeys(memory, 60.0, clock))
    os.close(memory)


def order(
    key: str = "key", quantity: float = 1.0, timeout_seconds: int = 1, strategy: str = "alpha", order_ref: str = "ref"
) -> pb.Order:
    message = pb.Order(instrument="BTCUSDT.BINANCE", quantity=quantity, strategy=strategy, idempotency_key=key)
    message.order_ref = order_ref
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
    window: IdempotencyWindow,
    decide: Callable[[], Awaitable[Decided]],
    message: pb.Order | None = None,
    caller: str = "",
) -> str:
    return (await window.once(identify(message or order(), caller), soon(), decide)).decided.decision_id


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
        await window.once(identify(order(), ""), asyncio.get_running_loop().time(), decide)
    decide.gate.set()
    assert await first == "decision-1"


async def test_a_key_is_forgotten_after_the_window(window: IdempotencyWindow, clock: Clock) -> None:
    decide = Decider()
    await once(window, decide)
    clock.now += 59.9
    assert await once(window, decide) == "decision-1"
    clock.now += 0.2
    assert await once(window, decide, order(quantity=2.0)) == "decision-2"


async def test_keys_beyond_the_bound_are_shed_and_counted_until_one_expires(
    window: IdempotencyWindow, clock: Clock
) -> None:
    decide = Decider()
    for number in range(PLACES):
        await once(window, decide, order(f"{number}"))
    with pytest.raises(OverloadedError) as refused:
        await once(window, decide, order("one more"))
    assert (refused.value.reason, window.refused) == ("TOO_MANY_IDEMPOTENCY_KEYS", 1)
    assert await once(window, decide, order("0")) == "decision-1", "known keys are kept"
    clock.now += 61
    assert await once(window, decide, order("one more")) == f"decision-{PLACES + 1}"


async def test_a_call_still_under_way_outlives_the_window(window: IdempotencyWindow, clock: Clock) -> None:
    decide = Decider()
    decide.gate = asyncio.Event()
    until = clock() + 600
    first = asyncio.create_task(window.once(identify(order(), ""), until, decide))
    await asyncio.sleep(0)
    clock.now += 61
    repeat = asyncio.create_task(window.once(identify(order(), ""), soon(), decide))
    await asyncio.sleep(0)
    decide.gate.set()
    assert {(await one).decided.decision_id for one in (first, repeat)} == {"decision-1"}


async def test_callers_that_count_from_one_do_not_meet(window: IdempotencyWindow) -> None:
    decide = Decider()
    desks = [("desk-a", order("1")), ("desk-b", order("1", quantity=2.0)), ("desk-a", order("1", strategy="beta"))]
    heard = [await once(window, decide, message, caller) for caller, message in desks]
    assert heard == ["decision-1", "decision-2", "decision-3"]
    assert [await once(window, decide, message, caller) for caller, message in desks] == heard
    with pytest.raises(KeyReusedError):
        await once(window, decide, order("1", quantity=3.0), "desk-a")


@given(
    first=st.tuples(*[st.text(max_size=6)] * 3),
    second=st.tuples(*[st.text(max_size=6)] * 3),
)
def test_whose_key_it_is_cannot_be_confused(first: tuple[str, str, str], second: tuple[str, str, str]) -> None:
    def whose(caller: str, strategy: str, key: str) -> bytes:
        return identify(order(key, strategy=strategy), caller).key

    assert (whose(*first) == whose(*second)) == (first == second)


async def test_the_reference_is_the_repeats_own_which_is_the_first_ones(window: IdempotencyWindow) -> None:
    decide = Decider()
    message = order(order_ref="ref")
    for _ in range(2):
        kept = await window.once(identify(message, ""), soon(), decide)
        assert kept.decided.decision_id == "decision-1"
    with pytest.raises(KeyReusedError):
        await once(window, decide, order(order_ref="another"))
