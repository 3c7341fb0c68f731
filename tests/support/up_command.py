"""`pretrade up` as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil

from pretrade.client.stack_file import StackFile
from support.harness import eventually, has_ended

DEADLINE_SECONDS: Final = 60.0


class Up:
    """A running `pretrade up`."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes]) -> None:
        self.directory = directory
        self.process = process
        self._seen: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        return (self.directory / "output").read_text()

    def wait_until(self, condition: Callable[[], object], seconds: float = DEADLINE_SECONDS) -> None:
        """Waits for a condition as long as the process lives."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.output
            try:
                self.process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
            assert condition(), self.output

    def wait_until_up(self, seconds: float = DEADLINE_SECONDS) -> StackFile:
        self.wait_until(lambda: StackFile.read(self.directory), seconds)
        self.wait_until(lambda: "Ctrl-C stops it" in self.output, seconds)
        stack = StackFile.read(self.directory)
        assert stack is not None
        return stack

    def children(self) -> list[psutil.Process]:
        """Everything it started, and what that started."""
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def up(directory: Path, *parts: str, prefix: Sequence[str] = (), **environment: str) -> Iterator[Up]:
    """Starts `pretrade up` with these parts, through a command such as `taskset`; it is killed if it still runs."""
    options = [option for part in parts for option in ("--part", part)]
    command = [*prefix, sys.executable, "-m", "local", "up", "--dir", str(directory), *options]
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment
        )
    try:
        yield Up(directory, process)
    finally:
        process.kill()
        process.wait()


def assert_gone(processes: list[psutil.Process]) -> None:
    """Waits until the processes have ended."""
    assert processes
    eventually(lambda: [process for process in processes if not has_ended(process)], lambda left: not left)
