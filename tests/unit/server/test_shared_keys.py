"""One table of idempotency keys for many processes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from cases import Clock

from pretrade.decision.v1 import decision_pb2 as pb
from server.errors import KeyReusedError, OverloadedError
from server.idempotency import IdempotencySettings, IdempotencyWindow
from server.record import Decided
from server.shared_keys import BusyError, Claim, SharedKeys, make_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several processes share a port on Linux only")
DIGEST: Final = bytes(range(16))
CLAIMING: Final = """
import sys, time
from server.shared_keys import BusyError, Claim, SharedKeys
table = SharedKeys(int(sys.argv[1]), 60.0, time.monotonic)
while time.monotonic() < float(sys.argv[2]):
    pass
for number in range(int(sys.argv[3])):
    while True:
        try:
            found = table.claim(f"key-{number}", bytes(16), time.monotonic() + 60.0)
        except BusyError:
            continue
        break
    if isinstance(found, Claim):
        print(number)
        while True:
            try:
                table.decided(found, sys.argv[4].encode())
            except BusyError:
                continue
            break
    else:
        assert found
"""
HOLDING: Final = """
import fcntl, os, signal, sys
fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX, 1, int(sys.argv[2]))
print("held", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.fixture
def memory() -> Iterator[int]:
    memory = make_memory(4_096)
    yield memory
    os.close(memory)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def table(memory: int, clock: Clock) -> SharedKeys:
    return SharedKeys(memory, 10.0, clock)


def claimed(table: SharedKeys, key: str, deadline: float, digest: bytes = DIGEST) -> Claim:
    found = table.claim(key, digest, deadline)
    assert isinstance(found, Claim)
    return found


def test_what_one_process_decided_every_process_knows(memory: int, clock: Clock) -> None:
    one, other = table(memory, clock), table(memory, clock)
    claim = claimed(one, "key", clock() + 1)
    with pytest.raises(BusyError):
        other.claim("key", DIGEST, clock() + 1)
    one.decided(claim, b"decision")
    assert other.claim("key", DIGEST, clock() + 1) == b"decision"
    assert one.claim("key", DIGEST, clock() + 1) == b"decision"


def test_a_key_of_another_order_is_refused_everywhere(memory: int, clock: Clock) -> None:
    claimed(table(memory, clock), "key", clock() + 1)
    with pytest.raises(KeyReusedError):
        table(memory, clock).claim("key", bytes(16), clock() + 1)


def test_a_key_is_free_when_its_window_is_over(memory: int, clock: Clock) -> None:
    one = table(memory, clock)
    one.decided(claimed(one, "key", clock() + 1), b"first")
    clock.now += 10.1
    claimed(table(memory, clock), "key", clock() + 1, bytes(16))


def test_a_key_that_is_given_back_is_free(memory: int, clock: Clock) -> None:
    one = table(memory, clock)
    one.release(claimed(one, "key", clock() + 1))
    claimed(table(memory, clock), "key", clock() + 1)


def test_who_died_while_deciding_keeps_a_key_no_longer_than_its_deadline(memory: int, clock: Clock) -> None:
    one, other = table(memory, clock), table(memory, clock)
    of_the_dead = claimed(one, "key", clock() + 1)
    clock.now += 1.1
    claim = claimed(other, "key", clock() + 1)
    one.decided(of_the_dead, b"too late")  # it was only slow
    one.release(of_the_dead)
    with pytest.raises(BusyError):
        one.claim("key", DIGEST, clock() + 1)
    other.decided(claim, b"decision")
    assert one.claim("key", DIGEST, clock() + 1) == b"decision"


def test_a_decision_too_long_for_the_table_stays_with_its_process(memory: int, clock: Clock) -> None:
    one = table(memory, clock)
    one.decided(claimed(one, "key", clock() + 1), bytes(2_000))
    assert one.unshared == 1
    with pytest.raises(BusyError):
        table(memory, clock).claim("key", DIGEST, clock() + 1)


def test_a_full_table_takes_no_key_it_could_not_keep(clock: Clock) -> None:
    memory = make_memory(1)
    one = table(memory, clock)
    for number in range(32):
        claimed(one, f"key-{number}", clock() + 1)
    with pytest.raises(OverloadedError):
        one.claim("one more", DIGEST, clock() + 1)
    os.close(memory)


def test_processes_that_claim_the_same_keys_at_once_get_each_of_them_once(memory: int) -> None:
    keys, processes = 400, 4
    began = str(time.monotonic() + 2.0)
    root = Path(__file__).parents[3]
    claiming = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMING, str(memory), began, str(keys), f"process-{number}"],
            stdout=subprocess.PIPE,
            pass_fds=(memory,),
            cwd=root,
        )
        for number in range(processes)
    ]
    got = [int(number) for process in claiming for number in process.communicate(timeout=60)[0].split()]
    assert [process.returncode for process in claiming] == [0] * processes
    assert sorted(got) == list(range(keys))


def test_a_process_stopped_in_the_middle_holds_up_its_bucket_alone(memory: int, clock: Clock) -> None:
    one = table(memory, clock)
    bucket = claimed(one, "key", clock() + 1).bucket
    others = (f"other-{number}" for number in range(100))
    argv = [sys.executable, "-c", HOLDING, str(memory), str(bucket)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, pass_fds=(memory,)) as holding:
        assert holding.stdout is not None
        assert holding.stdout.readline() == b"held\n"
        with pytest.raises(BusyError):
            one.claim("key", DIGEST, clock() + 1)
        for other in others:
            try:
                claimed(one, other, clock() + 1)
            except BusyError:
                continue
            break
        else:
            pytest.fail("no key at all can be claimed")
        holding.send_signal(signal.SIGKILL)
    clock.now += 1.1
    claimed(one, "key", clock() + 1)
    fcntl.lockf(memory, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, bucket)


def order(key: str = "key") -> pb.Order:
    return pb.Order(instrument="BTCUSDT.BINANCE", quantity=1.0, strategy="alpha", idempotency_key=key)


async def test_repeats_on_another_process_wait_for_the_first_ones_decision(memory: int) -> None:
    clock = asyncio.get_running_loop().time
    settings = IdempotencySettings(window_seconds=60)
    windows = [IdempotencyWindow(settings, clock, SharedKeys(memory, 60.0, clock)) for _ in range(3)]
    made, deciding, may_decide = 0, asyncio.Event(), asyncio.Event()

    async def decide() -> Decided:
        nonlocal made
        made += 1
        deciding.set()
        await may_decide.wait()
        return Decided.repeated(pb.Decision(decision_id=f"decision-{made}").SerializeToString())

    calls = [asyncio.create_task(windows[number % 3].once(order(), clock() + 30, decide)) for number in range(12)]
    await deciding.wait()
    with pytest.raises(TimeoutError):
        await windows[1].once(order(), clock(), decide)
    may_decide.set()
    decisions = await asyncio.gather(*calls)
    assert {decision.decision_id for decision in decisions} == {"decision-1"}
    assert made == 1
    assert all(window.remembers("decision-1") for window in windows)


async def test_a_call_that_failed_leaves_the_key_to_any_process(memory: int) -> None:
    clock = asyncio.get_running_loop().time
    one, other = (IdempotencyWindow(IdempotencySettings(), clock, SharedKeys(memory, 10.0, clock)) for _ in range(2))

    async def fail() -> Decided:
        raise OverloadedError("TOO_MANY_IN_FLIGHT", "")

    async def decide() -> Decided:
        return Decided.repeated(pb.Decision(decision_id="decided").SerializeToString())

    with pytest.raises(OverloadedError):
        await one.once(order(), clock() + 30, fail)
    assert (await other.once(order(), clock() + 30, decide)).decision_id == "decided"
    assert (await one.once(order(), clock() + 30, fail)).decision_id == "decided"
