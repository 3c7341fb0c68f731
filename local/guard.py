"""Leaves no orphans: a process of its own that outlives the stack's, and ends the children with it.

The stack holds one end of a pipe, the guard the other. However the stack's process ends, `kill -9` included, the kernel
closes its end; the guard then stops every process group that is still registered. Run as a script it is the guard
(standard library alone, so that it starts at once and stays small); imported it starts one.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Final

_KILL_SECONDS: Final = 2.0
"""How long the guard waits after SIGKILL: longer than it takes, short where nobody buries the dead."""


class Guard:
    """The stack's end of the guard.

    Wire, one line a message, written whole: `+GROUP SIGNAL` registers a process group and the signal that stops it,
    `-GROUP` forgets it, `.` ends the guard. Children register themselves (see `launch`), so they inherit `pipe` until
    they execute.
    """

    def __init__(self, *, grace_seconds: float, held: int | None = None) -> None:
        """Starts the guard.

        Args:
            grace_seconds: How long the guard waits between a group's stop signal and SIGKILL.
            held: A file descriptor that the guard keeps open until it ends, such as that of a lock.
        """
        watched, self.pipe = os.pipe()
        inherited = (watched,) if held is None else (watched, held)
        # The mask is inherited, so nothing but SIGKILL ends the guard, from its first instruction on.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and our own file
                [sys.executable, "-I", "-S", __file__, str(watched), str(grace_seconds)],
                stdin=subprocess.DEVNULL,
                pass_fds=inherited,
                start_new_session=True,  # what ends the stack's session must not end its guard
            )
        except BaseException:
            os.close(self.pipe)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(watched)

    @property
    def pid(self) -> int:
        """Process id of the guard."""
        return self._process.pid

    def forget(self, group: int) -> None:
        """Tells the guard that a process group has ended, before its number can mean another."""
        with contextlib.suppress(BrokenPipeError):  # it was killed
            os.write(self.pipe, f"-{group}\n".encode())

    def close(self) -> None:
        """Ends the guard; what is still registered ends first. Blocks until then; safe to call twice."""
        if self.pipe >= 0:
            with contextlib.suppress(BrokenPipeError):  # it was killed
                os.write(self.pipe, b".\n")
            os.close(self.pipe)
            self.pipe = -1
        self._process.wait()


def _read_registrations(pipe: int) -> dict[int, int]:
    """Follows the pipe until the stack has ended; returns the stop signal of each group that is left."""
    parent = os.getppid()
    groups: dict[int, int] = {}
    partial = b""
    # The parent's number is a second sign of its end: a process it forked may hold the pipe open.
    while os.getppid() == parent:
        if not select.select([pipe], [], [], 1.0)[0]:
            continue
        chunk = os.read(pipe, 65536)
        if not chunk:
            break
        *lines, partial = (partial + chunk).split(b"\n")
        for line in lines:
            if line == b".":
                return groups
            numbers = line[1:].split()
            if line.startswith(b"+"):
                groups[int(numbers[0])] = int(numbers[1])
            else:
                groups.pop(int(numbers[0]), None)
    return groups


def signal_group(group: int, number: int) -> bool:
    """Sends a signal to a process group (0: to none); False when no process of it is left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        # macOS says so of a group of which only zombies are left.
        return False
    return True


def _end_within(seconds: float, groups: Mapping[int, int]) -> dict[int, int]:
    """Waits until all groups are gone, at most `seconds`; returns those that are not."""
    left = dict(groups)
    deadline = time.monotonic() + seconds
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = {group: number for group, number in left.items() if signal_group(group, 0)}
    return left


def main(pipe: str, grace_seconds: str) -> None:
    """The guard process: waits for the end of the stack, then ends what it left."""
    groups = _read_registrations(int(pipe))
    for group, stop_signal in groups.items():
        if signal_group(group, stop_signal):
            signal_group(group, signal.SIGCONT)  # one that is stopped cannot end
    groups = _end_within(float(grace_seconds), groups)
    for group in groups:
        signal_group(group, signal.SIGKILL)
    _end_within(_KILL_SECONDS, groups)


if __name__ == "__main__":
    main(*sys.argv[1:])
