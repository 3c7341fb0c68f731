"""The journal alone, in a process that is killed, cannot write or fails to sync."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from pretrade.audit.v1 import packet_pb2
from server.errors import JournalFullError
from server.journal.journal import Journal, JournalSettings
from server.journal.journal_file import JournalReader

CHILD = Path(__file__).parents[1] / "support" / "audit_child.py"


@contextmanager
def appending(path: Path, prefix: str, *wrapper: str) -> Iterator[subprocess.Popen[str]]:
    """A process that appends to the journal until it is killed."""
    with subprocess.Popen(
        [*wrapper, sys.executable, str(CHILD), str(path), "", prefix],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        process_group=0,
    ) as child:
        try:
            yield child
        finally:
            os.killpg(child.pid, 9)


def lines(child: subprocess.Popen[str]) -> Iterator[str]:
    assert child.stdout is not None
    for line in child.stdout:
        yield line.removesuffix("\n")


def tell(child: subprocess.Popen[str], command: str) -> None:
    assert child.stdin is not None
    child.stdin.write(command + "\n")


def journal_content(path: Path) -> tuple[list[str], set[str]]:
    """The verified journal: the ids of its decisions in order, and of those marked as not durable.

    Of the last ones before a kill the next process cannot know whether the reply was sent, and marks them as `killed`.
    """
    decisions: list[str] = []
    marked: set[str] = set()
    killed: set[str] = set()
    with closing(JournalReader(path)) as journal:
        journal.verify()
        for row in journal.rows_after(0, -1):
            entry = packet_pb2.JournalEntry.FromString(row.entry)
            if entry.HasField("decision"):
                decisions.append(entry.decision.decision.decision_id)
            elif entry.reply_unconfirmed.cause == "killed":
                killed.add(entry.reply_unconfirmed.decision_id)
            else:
                assert entry.reply_unconfirmed.cause == "not_durable"
                marked.add(entry.reply_unconfirmed.decision_id)
    assert killed <= set(decisions)
    return decisions, marked


def assert_told_the_truth(path: Path, events: list[str]) -> None:
    """Every acknowledged decision is there once; every refused one is not there, or marked."""
    decisions, marked = journal_content(path)
    assert len(decisions) == len(set(decisions))
    acknowledged = {event[1:] for event in events if event.startswith("+")}
    refused = {event[1:] for event in events if event.startswith("-")}
    assert acknowledged <= set(decisions)
    assert not acknowledged & marked
    assert refused & set(decisions) <= marked


def told(events: list[str]) -> str:
    acknowledged, refused = (sum(event.startswith(sign) for event in events) for sign in "+-")
    return f"{acknowledged} acknowledged and there, {refused} refused"


@pytest.mark.long
@pytest.mark.fault(
    "D2",
    "The process of a busy journal is killed with SIGKILL ten times",
    "Every acknowledged row is in the journal exactly once.",
)
def test_every_acknowledged_decision_survives_kill_9_at_any_instant(
    tmp_path: Path, seed: int, seen: Callable[[str], None]
) -> None:
    path = tmp_path / "journal.db"
    instants = random.Random(seed)
    events: list[str] = []
    for round_ in range(10):
        kill_after = instants.randrange(1, 1000)
        with appending(path, str(round_)) as child:
            said = lines(child)
            events += itertools.islice(said, kill_after)
            child.kill()
            events += said  # what it managed to say before it died
        assert all(event.startswith("+") for event in events)
        assert_told_the_truth(path, events)
    seen(f"{len(events)} rows acknowledged, all there, the chain verifies")


def run_out_of_space_and_back(child: subprocess.Popen[str], fill: object, free: object) -> list[str]:
    """Events before, during and after an outage that `fill` causes and `free` ends."""
    events: list[str] = []
    seen = lines(child)

    def until(prefix: str, times: int) -> None:
        while times:
            events.append(next(seen))
            times -= events[-1].startswith(prefix)

    assert callable(fill)
    assert callable(free)
    until("+", 200)
    fill()
    until("-", 16)
    free()
    until("writable", 16)
    until("+", 200)
    child.kill()
    events += seen
    return events


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    """A directory that is a file system of 8 MiB."""
    volume = tmp_path / "volume"
    volume.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", volume], check=False).returncode:
        pytest.skip("the kernel forbids mounting a tmpfs")
    yield volume
    subprocess.run(["umount", "--lazy", volume], check=True)


@pytest.mark.fault(
    "D3",
    "The journal fills its own volume, three times",
    "New rows are refused (ABSTAIN) until some rows have been shipped.",
)
async def test_a_journal_that_fills_its_volume_heals_when_rows_are_shipped(
    small_volume: Path, seen: Callable[[str], None]
) -> None:
    async with Journal(
        JournalSettings(path=small_volume / "journal.db", checkpoint_pages=100, queue_rows=100)
    ) as journal:
        for _ in range(3):
            while not journal.problem:
                await asyncio.gather(*(journal.append(bytes(1_000)) for _ in range(50)))
            assert "all that they may" in journal.problem
            assert journal.writable
            with pytest.raises(JournalFullError):
                journal.append(bytes(1_000))
            left = shutil.disk_usage(small_volume).free
            journal.trim(journal.position - 100)
            async with asyncio.timeout(10):
                while journal.problem:  # noqa: ASYNC110 - plain attribute
                    await asyncio.sleep(0.001)
            await journal.append(bytes(1_000))
        seen(f"{journal.position} rows, {left / 2**20:.1f} of 8 MiB left when full; durable again after each trim")


@pytest.mark.fault(
    "D3",
    "Files may not grow any more (RLIMIT_FSIZE)",
    "Rows are refused, and durable again later. No row is reported wrongly.",
)
def test_files_that_may_not_grow_refuse_decisions_until_they_may(tmp_path: Path, seen: Callable[[str], None]) -> None:
    """Needs no rights, other than a full disk."""
    path = tmp_path / "journal.db"
    with appending(path, "d") as child:
        events = run_out_of_space_and_back(child, lambda: tell(child, "limit 4096"), lambda: tell(child, "unlimit"))
    assert_told_the_truth(path, events)
    seen(told(events))


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace to inject the error")
@pytest.mark.fault("D3", "`fdatasync` fails eleven times", "No row whose sync failed counts as durable.")
def test_a_failed_sync_is_never_taken_for_a_durable_row(tmp_path: Path, seen: Callable[[str], None]) -> None:
    path = tmp_path / "journal.db"
    inject = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync", "-e")
    if subprocess.run([*inject, "inject=fdatasync:error=EIO:when=1", "true"], check=False).returncode:
        pytest.skip("the kernel forbids tracing")
    events: list[str] = []
    with appending(path, "d", *inject, "inject=fdatasync:error=EIO:when=50..60") as child:
        said = lines(child)
        durable_again = 0
        while durable_again < 200:
            events.append(next(said))
            durable_again += "writable" in events and events[-1].startswith("+")
    refused = [event for event in events if event.startswith("-")]
    assert refused
    assert_told_the_truth(path, events)
    seen(told(events))
