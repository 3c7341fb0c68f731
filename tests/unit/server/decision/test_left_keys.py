"""A decision that a killed process had written down, and not published, is what repeats of its call get."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest
from support.request_path import RequestPath, entries, left_by_kill, order, request_path, statuses

from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.idempotency import identify
from server.decision.shared_keys import BusyError, Claim, KeyedOrder, OrphanedError, Remembered, SharedKeys, make_memory
from server.errors import KeyReusedError
from server.journal.journal_file import JournalReader

ROOT: Final = Path(__file__).parents[4]
CLAIMING: Final = """
import sys, time
from server.decision.shared_keys import Claim, KeyedOrder, SharedKeys
table = SharedKeys(int(sys.argv[1]), 60.0, time.monotonic, slot=1)
order = KeyedOrder(bytes.fromhex(sys.argv[2]), bytes.fromhex(sys.argv[3]), "")
assert isinstance(table.claim(order, time.monotonic() + float(sys.argv[4])), Claim)
print("claimed", flush=True)
sys.stdin.read()
"""
KEYED: Final = order("first", idempotency_key="key")


@pytest.fixture
def memory() -> Iterator[int]:
    memory = make_memory(1_000)
    yield memory
    os.close(memory)


class Claiming:
    """A process in slot 1 that has claimed a key and does not decide."""

    def __init__(self, memory: int, order: KeyedOrder, seconds: float = 60.0) -> None:
        argv = [sys.executable, "-c", CLAIMING, str(memory), order.key.hex(), order.digest.hex(), str(seconds)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, pass_fds=(memory,), cwd=ROOT)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"claimed\n"

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.communicate()


async def decided_unheard(p: RequestPath, asked: pb.Order = KEYED) -> pb.Decision:
    """A decision that is durable, and of which nobody knows whether its caller heard it."""
    reply = await p.servicer.Decide(pb.DecideRequest(order=asked), p.call())
    return pb.DecideResponse.FromString(reply.wire).decision


def table(memory: int) -> SharedKeys:
    return SharedKeys(memory, 60.0, time.monotonic)


async def test_a_server_that_is_killed_and_started_again_decides_no_key_again(tmp_path: Path) -> None:
    async with request_path(tmp_path / "killed") as p:
        first = await decided_unheard(p)
        left = left_by_kill(tmp_path / "killed", tmp_path / "left")
    async with request_path(left) as p:
        assert (await p.decide(KEYED)).decision_id == first.decision_id
        with pytest.raises(KeyReusedError):
            await p.decide(order("second", idempotency_key="key"))
        assert p.gate.asked == 0
        await p.settled()
    assert statuses(left) == {"first": "replied"}


async def test_a_repeat_gets_what_a_killed_process_had_written_down(tmp_path: Path, memory: int) -> None:
    async with request_path(tmp_path / "killed") as p:
        first = await decided_unheard(p)
        left_by_kill(tmp_path / "killed", tmp_path / "1")
    claiming = Claiming(memory, identify(KEYED, ""))
    async with request_path(tmp_path / "other", shared=memory) as p:
        repeat = asyncio.create_task(p.decide(KEYED))
        claiming.kill()
        assert (await repeat).decision_id == first.decision_id
        assert p.gate.asked == 0
        await p.settled()
    assert statuses(tmp_path / "1") == {"first": "reply_unconfirmed:killed"}
    noted = [entry.WhichOneof("entry") for entry in entries(tmp_path / "other")]
    assert noted == ["reply_unconfirmed", "reply_heard"], "a repeat heard it; there is no second row"


@pytest.mark.parametrize("has_lapsed", [False, True])
async def test_what_a_killed_process_had_not_written_down_is_free(
    tmp_path: Path, memory: int, has_lapsed: bool
) -> None:
    async with request_path(tmp_path / "killed") as p:
        await decided_unheard(p, order("another", idempotency_key="another"))
        left_by_kill(tmp_path / "killed", tmp_path / "1")
    claiming = Claiming(memory, identify(KEYED, ""), 0.0 if has_lapsed else 60.0)
    claiming.kill()
    async with request_path(tmp_path / "other", shared=memory) as p:
        for _ in range(2):
            assert (await p.decide(KEYED)).order_ref == "first"
        assert p.gate.asked == 1
        assert (await p.decide(order("another", idempotency_key="another"))).order_ref == "another"
        assert p.gate.asked == 1


async def test_a_journal_that_cannot_be_read_keeps_its_keys_until_it_can(tmp_path: Path, memory: int) -> None:
    claiming = Claiming(memory, identify(KEYED, ""))
    claiming.kill()
    async with request_path(tmp_path / "other", shared=memory) as p:
        repeat = asyncio.create_task(p.decide(KEYED))
        async with request_path(tmp_path / "killed") as killed:
            first = await decided_unheard(killed)
            assert not repeat.done()
            left_by_kill(tmp_path / "killed", tmp_path / "copied")
        (tmp_path / "copied").rename(tmp_path / "1")
        assert (await repeat).decision_id == first.decision_id


async def test_a_commit_that_was_cut_off_stays_so_when_its_order_was_decided_again(tmp_path: Path, memory: int) -> None:
    """The commit is in the log, and not in its index, which other processes have open: no reader sees it, as yet."""
    async with request_path(tmp_path / "killed") as p:
        await decided_unheard(p, order("seen"))
        await p.settled_on_disk()
        index = (tmp_path / "killed" / "journal.db-shm").read_bytes()
        await decided_unheard(p)
        journal = left_by_kill(tmp_path / "killed", tmp_path / "1") / "journal.db"
    with closing(JournalReader(journal)) as reader:
        assert reader.last_position() > 1
        with (tmp_path / "1" / "journal.db-shm").open("r+b") as shared:
            shared.write(index)
        assert reader.last_position() == 1
        Claiming(memory, identify(KEYED, "")).kill()
        async with request_path(tmp_path / "other", shared=memory) as p:
            await p.decide(KEYED)
            assert p.gate.asked == 1
    assert statuses(tmp_path / "1") == {"seen": "reply_unconfirmed:killed"}
    assert statuses(tmp_path / "other") == {"first": "replied"}


async def test_a_journal_that_was_taken_over_is_not_settled_again(tmp_path: Path, memory: int) -> None:
    Claiming(memory, identify(KEYED, "")).kill()
    async with request_path(tmp_path / "1") as successor, request_path(tmp_path / "other", shared=memory) as p:
        repeat = asyncio.create_task(p.decide(KEYED))
        await decided_unheard(successor)
        assert not repeat.done(), "it is in use, and what is left there may not be in the table"
        SharedKeys(memory, 60.0, time.monotonic, slot=1).has_taken_over()
        assert (await repeat).order_ref == "first"
        assert p.gate.asked == 1


def test_a_claim_outlives_its_time_where_its_process_has_died(memory: int) -> None:
    keyed = KeyedOrder(b"k" * 16, b"d" * 16, "")
    claiming = Claiming(memory, keyed, 0.0)
    mine = table(memory)
    assert isinstance(mine.claim(keyed, time.monotonic()), Claim), "a process that lives may be as late as it likes"
    claiming.kill()
    other = KeyedOrder(b"o" * 16, b"d" * 16, "")
    Claiming(memory, other, 0.0).kill()
    with pytest.raises(OrphanedError) as raised:
        mine.claim(other, time.monotonic() + 60.0)
    assert raised.value.slot == 1
    mine.give_up(raised.value.claim)
    assert isinstance(mine.claim(other, time.monotonic() + 60.0), Claim)
    mine.give_up(raised.value.claim)
    with pytest.raises(BusyError):
        mine.claim(other, 0.0)


def test_what_is_restored_overwrites_nothing_newer(memory: int) -> None:
    mine, keyed = table(memory), KeyedOrder(b"k" * 16, b"d" * 16, "")
    claim = mine.claim(keyed, time.monotonic() + 60.0)
    assert isinstance(claim, Claim)
    mine.restore(keyed, b"of a dead process", 60.0)
    assert mine.decided(claim, b"newer")
    mine.restore(keyed, b"of a dead process", 60.0)
    found = mine.claim(keyed, 0.0)
    assert isinstance(found, Remembered)
    assert found.decision == b"newer"


async def test_an_old_decision_is_forgotten_as_it_would_have_been(tmp_path: Path) -> None:
    async with request_path(tmp_path / "killed") as p:
        await decided_unheard(p)
        left = left_by_kill(tmp_path / "killed", tmp_path / "left")
    async with request_path(left) as p:
        p.ahead_seconds = 61.0
        await p.decide(KEYED)
        assert p.gate.asked == 1
