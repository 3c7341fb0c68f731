"""One table of idempotency keys for many processes."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.cases import Clock, new_case

from fallback.order import Answer
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.idempotency import ClaimLostError, IdempotencySettings, IdempotencyWindow, Kept, identify
from server.decision.record import Decided
from server.decision.shared_keys import (
    MAX_BYTES,
    PLACES,
    BusyError,
    Claim,
    KeyedOrder,
    Remembered,
    SharedKeys,
    make_memory,
)
from server.errors import KeyReusedError, OverloadedError

WINDOW_SECONDS: Final = 10.0
CLAIMING: Final = """
import sys, time
from hashlib import blake2b
from server.decision.shared_keys import BusyError, Claim, KeyedOrder, SharedKeys
table = SharedKeys(int(sys.argv[1]), 60.0, time.monotonic)
while time.monotonic() < float(sys.argv[2]):
    pass
for number in range(int(sys.argv[3])):
    order = KeyedOrder(blake2b(f"key-{number}".encode(), digest_size=16).digest(), bytes(16), "")
    while True:
        try:
            found = table.claim(order, time.monotonic() + 60.0)
        except BusyError:
            continue
        break
    if isinstance(found, Claim):
        print(number)
        while True:
            try:
                assert table.decided(found, sys.argv[4].encode())
            except BusyError:
                continue
            break
    else:
        assert found.decision
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
    return SharedKeys(memory, WINDOW_SECONDS, clock)


def key(name: str = "key", content: str = "order") -> KeyedOrder:
    whose, what = (hashlib.blake2b(text.encode(), digest_size=16).digest() for text in (name, content))
    return KeyedOrder(whose, what, "")


def claimed(table: SharedKeys, order: KeyedOrder, deadline: float) -> Claim:
    found = table.claim(order, deadline)
    assert isinstance(found, Claim)
    return found


def remembered(table: SharedKeys, order: KeyedOrder) -> Remembered:
    found = table.claim(order, 0.0)
    assert isinstance(found, Remembered)
    return found


def test_what_one_process_decided_every_process_knows(memory: int, clock: Clock) -> None:
    one, other = table(memory, clock), table(memory, clock)
    claim = claimed(one, key(), clock() + 1)
    with pytest.raises(BusyError):
        other.claim(key(), clock() + 1)
    assert one.decided(claim, b"decision")
    for process in (one, other):
        found = remembered(process, key())
        assert (found.decision, found.is_withdrawn) == (b"decision", False)


def test_a_key_of_another_order_is_refused_everywhere(memory: int, clock: Clock) -> None:
    claimed(table(memory, clock), key(), clock() + 1)
    with pytest.raises(KeyReusedError):
        table(memory, clock).claim(key(content="another"), clock() + 1)


def test_a_key_is_free_when_its_window_is_over_which_begins_with_the_decision(memory: int, clock: Clock) -> None:
    one = table(memory, clock)
    claim = claimed(one, key(), clock() + 60)
    clock.now += 30  # a decision may take longer than the window
    assert one.decided(claim, b"first")
    clock.now += WINDOW_SECONDS - 0.1
    assert remembered(one, key()).decision == b"first"
    clock.now += 0.2
    claimed(table(memory, clock), key(content="another"), clock() + 1)


def test_a_key_that_is_given_back_is_free(memory: int, clock: Clock) -> None:
    one = table(memory, clock)
    one.release(claimed(one, key(), clock() + 1))
    claimed(table(memory, clock), key(), clock() + 1)


def test_who_was_stopped_while_deciding_loses_the_key_at_its_deadline_and_finds_out(memory: int, clock: Clock) -> None:
    one, other = table(memory, clock), table(memory, clock)
    of_the_stopped = claimed(one, key(), clock() + 1)
    clock.now += 1.1
    assert not one.decided(of_the_stopped, b"too late, though nobody asked meanwhile")
    claim = claimed(other, key(), clock() + 1)
    assert not one.decided(of_the_stopped, b"too late")
    one.release(of_the_stopped)
    with pytest.raises(BusyError):
        one.claim(key(), clock() + 1)
    assert other.decided(claim, b"decision")
    assert remembered(one, key()).decision == b"decision"
    assert not one.decided(of_the_stopped, b"too late")
    assert remembered(one, key()).decision == b"decision"


def test_what_one_repeat_was_told_instead_every_later_one_is_told(memory: int, clock: Clock) -> None:
    one, other = table(memory, clock), table(memory, clock)
    one.decided(claimed(one, key(), clock() + 1), b"TRADE")
    first, second = remembered(one, key()), remembered(other, key())
    told = one.withdraw(first, b"NO_TRADE, halted")
    assert (told.decision, told.is_withdrawn, told.is_noted) == (b"NO_TRADE, halted", True, False)
    assert other.withdraw(second, b"ABSTAIN, stale").decision == b"NO_TRADE, halted", "somebody else was first"
    assert remembered(other, key()) == told
    other.noted(second.claim)
    found = remembered(one, key())
    assert (found.decision, found.is_withdrawn, found.is_noted) == (b"NO_TRADE, halted", True, True)
    assert one.withdraw(first, b"once more").is_noted
    clock.now += WINDOW_SECONDS + 0.1
    again = one.withdraw(first, b"forgotten by now")
    assert (again.decision, again.is_noted) == (b"forgotten by now", False)
    claimed(one, key(), clock() + 1)


def test_the_longest_decision_that_can_be_fits() -> None:
    case = new_case()
    case.order.message.order_ref = "\N{GRINNING FACE}" * 64
    case.feature_age_seconds = 3_600.123456789
    case.degradations += [*range(1, 24)]
    stages = [stage for stage in pb.Stage.values() if stage]
    for stage in (*stages, pb.STAGE_PRIMARY, pb.STAGE_SECONDARY):
        case.budget.charge(stage, 10.0, 9.9)
    longest = Answer(
        pb.ACTION_TRADE,
        pb.SOURCE_PRIMARY,
        pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD,
        0.75,
        0.5,
        "m" * 64,
        "f" * 16,
        2**62,
    )
    reasons = [pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD, *range(10, 23)]
    decision_id = "0192f3a4-7b6c-7def-8123-456789abcdef"
    wall_ns = 4_000_000_000_999_999_999
    decided = Decided(case, longest, pb.ACTION_TRADE, reasons, decision_id, 1_000.0, wall_ns, 2**64 - 1)
    decided.charge_audit(case.budget, 10.0, 1_000.0, 1_010.0)
    assert 300 < len(decided.remembered) <= MAX_BYTES
    again = Decided.repeated(decided.remembered, decided.order_ref, is_withdrawn=False)
    assert pb.Decision.FromString(again.wire) == pb.Decision.FromString(decided.wire)
    assert (again.remembered, again.model_expires_at) == (again.remembered, 2**62)
    safer = decided.withdrawn(pb.ACTION_NO_TRADE, reasons, 2**64 - 1)
    assert len(safer.remembered) <= MAX_BYTES


def test_a_table_of_another_layout_is_refused(clock: Clock) -> None:
    memory = make_memory(1)
    os.pwrite(memory, b"PTKEYS01", 0)
    with pytest.raises(ValueError, match="another version"):
        table(memory, clock)
    os.close(memory)


def test_a_full_bucket_takes_no_key_it_could_not_keep(clock: Clock) -> None:
    memory = make_memory(1)
    one = table(memory, clock)
    for number in range(PLACES):
        claimed(one, key(f"key-{number}"), clock() + 1)
    with pytest.raises(OverloadedError):
        one.claim(key("one more"), clock() + 1)
    clock.now += 1.1
    claimed(one, key("one more"), clock() + 1)
    os.close(memory)


def test_no_key_is_refused_while_there_are_no_more_than_the_table_was_made_for() -> None:
    """The buckets of a table are alike, so a smaller one at its full load shows what a larger one does at its own."""
    keys, seconds = 8_192, 30
    memory, clock = make_memory(keys), Clock()
    one = table(memory, clock)
    rate = keys / WINDOW_SECONDS
    for number in range(int(rate * seconds)):
        clock.now = 1_000.0 + number / rate
        one.decided(claimed(one, key(f"key-{number}"), clock() + 0.05), b"decision")
    os.close(memory)


def refused_share(alive: float, places: int, buckets: int) -> float:
    """The share of new keys that find their bucket full, when so many are alive in the mean.

    Source: Erlang's loss formula, which holds for keys that come at random and stay for any time.
    """
    load, refused = alive / buckets, 1.0
    for place in range(1, places + 1):
        refused = load * refused / (place + load * refused)
    return refused


def test_twenty_thousand_keys_a_second_find_their_places_where_they_did_not_before() -> None:
    alive = int(20_000 * WINDOW_SECONDS)
    assert alive == IdempotencySettings().max_keys
    memory = make_memory(alive)
    size = os.fstat(memory).st_size
    os.close(memory)
    assert size < 140 * 2**20
    buckets = size // (512 * PLACES)
    assert refused_share(alive, PLACES, buckets) < 2e-6
    assert refused_share(alive / 2, PLACES, buckets) < 1e-30
    # The formula says of the table there was, buckets of 32 in 65,536 places, what was seen of it.
    assert refused_share(50_000, 32, 2_048) == pytest.approx(0.026, abs=0.002)
    assert refused_share(100_000, 32, 2_048) == pytest.approx(0.38, abs=0.01)


def test_memory_is_taken_when_there_are_keys_and_not_before(clock: Clock) -> None:
    memory = make_memory(200_000)
    one = table(memory, clock)
    for number in range(2_000):
        clock.now += 0.01  # a hundred a second: a thousand are alive at once
        one.decided(claimed(one, key(f"key-{number}"), clock() + 0.05), b"decision" * 20)
    taken = os.fstat(memory).st_blocks * 512
    os.close(memory)
    assert taken < 24 * 2**20


def test_processes_that_claim_the_same_keys_at_once_get_each_of_them_once(memory: int) -> None:
    keys, processes = 400, 4
    began = str(time.monotonic() + 2.0)
    root = Path(__file__).parents[4]
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
    bucket = claimed(one, key(), clock() + 1).bucket
    others = (f"other-{number}" for number in range(100))
    argv = [sys.executable, "-c", HOLDING, str(memory), str(bucket)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, pass_fds=(memory,)) as holding:
        assert holding.stdout is not None
        assert holding.stdout.readline() == b"held\n"
        with pytest.raises(BusyError):
            one.claim(key(), clock() + 1)
        for other in others:
            try:
                claimed(one, key(other), clock() + 1)
            except BusyError:
                continue
            break
        else:
            pytest.fail("no key at all can be claimed")
        holding.send_signal(signal.SIGKILL)
    clock.now += 1.1
    claimed(one, key(), clock() + 1)
    fcntl.lockf(memory, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, bucket)


NAMES: Final = st.sampled_from(["a", "b", "c"])
CONTENTS: Final = st.sampled_from(["one", "other"])


class Table(RuleBasedStateMachine):
    """Three processes and a few keys, held against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.memory = make_memory(1)
        self.processes = [table(self.memory, self.clock) for _ in range(3)]
        self.known: dict[str, dict[str, Any]] = {}
        """By name: content, claim, expires, state and decision, as they should be."""
        self.claims: list[tuple[str, Claim]] = []
        self.seen: list[tuple[str, Remembered]] = []
        self.decisions = 0

    def teardown(self) -> None:
        os.close(self.memory)

    def alive(self, name: str) -> dict[str, Any] | None:
        entry = self.known.get(name)
        return entry if entry is not None and entry["expires"] > self.clock() else None

    def holds(self, name: str, claim: Claim) -> dict[str, Any] | None:
        """What is kept under a claim that nobody else has made since."""
        entry = self.alive(name)
        return entry if entry is not None and entry["claim"] == claim else None

    @rule(process=st.integers(0, 2), name=NAMES, content=CONTENTS, patience=st.floats(0.1, 20.0))
    def claim(self, process: int, name: str, content: str, patience: float) -> None:
        entry = self.alive(name)
        try:
            found = self.processes[process].claim(key(name, content), self.clock() + patience)
        except KeyReusedError:
            assert entry is not None
            assert entry["content"] != content
            return
        except BusyError:
            assert entry is not None
            assert (entry["state"], entry["content"]) == ("claimed", content)
            return
        if isinstance(found, Claim):
            assert entry is None
            expires = self.clock() + patience
            self.known[name] = {"content": content, "claim": found, "expires": expires, "state": "claimed"}
            self.claims.append((name, found))
        else:
            assert entry is not None
            assert entry["content"] == content
            assert (found.claim, found.decision) == (entry["claim"], entry["decision"])
            assert (found.is_withdrawn, found.is_noted) == (entry["state"] != "decided", entry["state"] == "noted")
            self.seen.append((name, found))

    @precondition(lambda self: self.claims)
    @rule(process=st.integers(0, 2), data=st.data(), release=st.booleans())
    def end(self, process: int, data: st.DataObject, release: bool) -> None:
        name, claim = data.draw(st.sampled_from(self.claims))
        entry = self.holds(name, claim)
        held = entry is not None and entry["state"] == "claimed"
        if release:
            self.processes[process].release(claim)
            if held:
                del self.known[name]
            return
        self.decisions += 1
        decision = f"decision {self.decisions}".encode()
        assert self.processes[process].decided(claim, decision) == held
        if entry is not None and held:
            entry |= {"state": "decided", "decision": decision, "expires": self.clock() + WINDOW_SECONDS}

    @precondition(lambda self: self.seen)
    @rule(process=st.integers(0, 2), data=st.data(), note=st.booleans())
    def withdraw(self, process: int, data: st.DataObject, note: bool) -> None:
        name, found = data.draw(st.sampled_from(self.seen))
        entry = self.holds(name, found.claim)
        if note:
            self.processes[process].noted(found.claim)
            if entry is not None and entry["state"] == "withdrawn":
                entry["state"] = "noted"
            return
        told = self.processes[process].withdraw(found, b"safer")
        assert told.is_withdrawn
        if entry is not None and entry["state"] == "decided":
            entry |= {"state": "withdrawn", "decision": b"safer"}
        assert told.decision == (b"safer" if entry is None else entry["decision"])
        assert told.is_noted == (entry is not None and entry["state"] == "noted")

    @rule(seconds=st.floats(0.05, 15.0))
    def pass_by(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def no_place_is_taken_twice(self) -> None:
        places = [(entry["claim"].bucket, entry["claim"].place) for name in self.known if (entry := self.alive(name))]
        assert len(set(places)) == len(places)


TestTable = Table.TestCase
TestTable.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)


def order(name: str = "key") -> pb.Order:
    return pb.Order(instrument="BTCUSDT.BINANCE", quantity=1.0, strategy="alpha", idempotency_key=name)


def decided(decision_id: str) -> Decided:
    answer = Answer(pb.ACTION_ABSTAIN, pb.SOURCE_NONE, pb.REASON_CODE_NO_SOURCE)
    return Decided(new_case(), answer, answer.action, [answer.reason], decision_id, 1_000.0, 0)


def windows(memory: int, number: int) -> list[IdempotencyWindow]:
    clock = asyncio.get_running_loop().time
    return [IdempotencyWindow(clock, SharedKeys(memory, 60.0, clock)) for _ in range(number)]


async def test_repeats_on_another_process_wait_for_the_first_ones_decision(memory: int) -> None:
    clock = asyncio.get_running_loop().time
    made, deciding, may_decide = 0, asyncio.Event(), asyncio.Event()

    async def decide() -> Decided:
        nonlocal made
        made += 1
        deciding.set()
        await may_decide.wait()
        return decided(f"decision-{made}")

    def call(window: IdempotencyWindow, deadline: float) -> asyncio.Task[Kept]:
        return asyncio.create_task(window.once(identify(order(), ""), deadline, decide))

    processes = windows(memory, 3)
    calls = [call(processes[number % 3], clock() + 30) for number in range(12)]
    await deciding.wait()
    with pytest.raises(TimeoutError):
        await call(processes[1], clock())
    may_decide.set()
    kept = await asyncio.gather(*calls)
    assert {one.decided.decision_id for one in kept} == {"decision-1"}
    assert [one.at is None for one in kept].count(True) == 1
    assert made == 1


async def test_a_call_that_failed_leaves_the_key_to_any_process(memory: int) -> None:
    clock = asyncio.get_running_loop().time
    one, other = windows(memory, 2)

    async def fail() -> Decided:
        raise OverloadedError("TOO_MANY_IN_FLIGHT", "")

    async def decide() -> Decided:
        return decided("decided")

    async def once(window: IdempotencyWindow, decide: Any) -> str:
        return (await window.once(identify(order(), ""), clock() + 30, decide)).decided.decision_id

    with pytest.raises(OverloadedError):
        await once(one, fail)
    assert await once(other, decide) == "decided"
    assert await once(one, fail) == "decided"


async def test_a_call_that_was_stopped_past_its_deadline_is_not_told_its_own_decision(memory: int) -> None:
    """The first process stands still while it decides, so that another one decides in its place."""
    loop, clock = asyncio.get_running_loop(), Clock()
    clock.now = loop.time()
    stopped, other = (IdempotencyWindow(clock, SharedKeys(memory, 60.0, clock)) for _ in range(2))

    async def decide_in_its_place() -> Decided:
        return decided("the other's")

    async def decide_and_stand_still() -> Decided:
        clock.now += 10.0
        kept = await other.once(identify(order(), ""), clock() + 30, decide_in_its_place)
        assert kept.decided.decision_id == "the other's"
        return decided("the stopped one's")

    with pytest.raises(ClaimLostError):
        await stopped.once(identify(order(), ""), clock() + 1.0, decide_and_stand_still)
    assert stopped.lost == 1
    kept = await stopped.once(identify(order(), ""), clock() + 1.0, decide_in_its_place)
    assert kept.decided.decision_id == "the other's"
    assert kept.at is not None
