"""The lock that the processes of a server record outcomes under; two open files contend as two processes do."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from server.journal.lock import FileLock

HOLDER = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


async def test_one_holder_at_a_time_among_all_files_and_tasks(tmp_path: Path) -> None:
    inside = 0
    most = 0

    async def enter(lock: FileLock) -> None:
        nonlocal inside, most
        async with lock.held():
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    locks = [FileLock(tmp_path / "lock") for _ in range(3)]
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            for lock in locks:
                group.create_task(enter(lock))
    assert (inside, most) == (0, 1)


async def test_giving_up_the_waiting_leaves_the_lock_to_others_and_a_dead_holder_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    lock = FileLock(path)
    argv = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:  # noqa: ASYNC220 - a line
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), lock.held():
                pytest.fail("the lock has a holder")
        holder.kill()
    async with asyncio.timeout(5), lock.held():
        pass
    async with asyncio.timeout(5), lock.held():
        pass
