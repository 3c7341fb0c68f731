"""A server process ends with its supervisor, however far its start has come and whatever hangs in it."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Final

import pytest

_DRAINS: Final = """
import asyncio, sys
from server.process.stopping import Leash

leash = Leash()

async def serve():
    stop = asyncio.get_running_loop().create_future()
    leash.drain(stop, float(sys.argv[1]))
    print("started", flush=True)
    await stop
    print("draining", flush=True)
    {drain}

asyncio.run(serve())
print("drained", flush=True)
"""
_STARTS: Final = """
import threading
from server.process.stopping import Leash

Leash()
print("started", flush=True)
threading.Event().wait()
"""


def end_of(code: str, seconds: float = 30.0) -> tuple[int, list[str]]:
    """The exit code of a process whose leash is cut when it says that it has started, and what it said after that."""
    argv = [sys.executable, "-c", code, str(seconds)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == "started\n"
            process.stdin.close()
            process.stdin = None
            said, _ = process.communicate(timeout=20)
            return process.returncode, said.split()
        finally:
            process.kill()


def test_a_process_that_serves_drains() -> None:
    assert end_of(_DRAINS.format(drain="pass")) == (0, ["draining", "drained"])


@pytest.mark.parametrize(
    "drain",
    [
        "await asyncio.get_running_loop().create_future()",
        "import threading; threading.Event().wait()",
        "asyncio.get_running_loop().run_in_executor(None, __import__('threading').Event().wait)",
    ],
    ids=["waits for ever", "blocks the loop", "leaves a thread that never ends"],
)
def test_a_process_that_hangs_while_it_drains_is_ended_by_the_kernel(drain: str) -> None:
    code, said = end_of(_DRAINS.format(drain=drain), 0.5)
    assert (code, said) == (-signal.SIGALRM, ["draining"])


def test_a_process_that_hangs_while_it_starts_ends_at_once() -> None:
    assert end_of(_STARTS) == (0, [])
