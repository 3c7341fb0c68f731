"""Leaves no orphans: a process of its own that outlives the stack's process, and ends the children with it.

The stack holds one end of a pipe, the guard the other. However the stack's process ends, `kill -9` included, the kernel
closes its end; the guard then stops every program that is still registered, with everything it started. Run as a script
it is the guard (standard library alone, so that it starts at once and stays small); imported it starts one.

No instant of a start is left out. A child registers before it executes its program, and executes it only if the stack
still lives *after* that. So every child that executes a program has registered before the stack's end. The guard reads
the pipe once more after that end, and therefore knows it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_KILL_SECONDS: Final = 2.0
"""How long the guard waits after SIGKILL: longer than it takes."""
_LOOK_SECONDS: Final = 0.02
_PARENT_SECONDS: Final = 0.2
"""How often the guard looks whether the stack lives, besides waiting for the end of its pipe."""


class Guard:
    """The stack's end of the guard.

    Wire, one line a message, written whole: `+LEADER SIGNAL` registers a program, which leads a session of its own, and
    the signal that stops it; `-LEADER` forgets it; `~FILE` registers a folder, named by a file in it that the guard
    locks as long as the folder is used, to be removed in the end; `.` ends the guard. Children register themselves (see
    `launch`), so they inherit `pipe` until they execute.
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
                [sys.executable, "-I", "-S", __file__, str(watched), str(os.getpid()), str(grace_seconds)],
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

    def launcher(self, stop_signal: signal.Signals = signal.SIGTERM, user: str | None = None) -> list[str]:
        """What to put before the arguments of a program, so that it ends with us.

        The program is to be started in a session of its own (`start_new_session`) that inherits `pipe` (`pass_fds`).

        Args:
            stop_signal: What asks it to end.
            user: The user to become, when we are root; None to stay who we are.
        """
        script = str(Path(__file__).with_name("launch.py"))
        told = [str(self.pipe), str(os.getpid()), str(int(stop_signal)), user or ""]
        return [sys.executable, "-I", "-S", script, *told]

    def forget(self, leader: int) -> None:
        """Tells the guard that a program and all that it started has ended, before its number can mean another."""
        self._tell(f"-{leader}\n")

    def remove_at_end(self, file: Path) -> None:
        """Makes the guard remove this file's folder, which is created if missing, when everything has ended.

        The file is locked until then, so that no other stack takes the folder for one that was left behind.
        """
        file.touch()
        self._tell(f"~{file}\n")

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it was killed
            os.write(self.pipe, line.encode())

    def close(self) -> None:
        """Ends the guard; what is still registered ends first. Blocks until then; safe to call twice."""
        if self.pipe >= 0:
            self._tell(".\n")
            os.close(self.pipe)
            self.pipe = -1
        self._process.wait()


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


class Family:
    """A program that leads a session of its own, and everything it started.

    On Linux that is its session and group, all descendants of those, and what was one when it was last looked for. So a
    process that left the session, as Envoy's group and PostgreSQL's backends do, is known also when its parent is gone.
    Elsewhere it is the group: what leaves it there are PostgreSQL's processes alone, which end with their postmaster.

    Args:
        leader: Process id of the program.
    """

    def __init__(self, leader: int) -> None:
        self.leader = leader
        self._known: dict[int, int] = {}

    def signal(self, number: int) -> bool:
        """Sends a signal (0: none, just looks) to all of it; False when nothing of it lives. Zombies do not live."""
        if sys.platform != "linux":
            return signal_group(self.leader, number)
        self._look()
        for member in self._known:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, number)
        return bool(self._known)

    def _look(self) -> None:
        living = dict(_living())
        members = {
            process
            for process, (started, _, group, session) in living.items()
            if self.leader in (group, session) or self._known.get(process) == started
        }
        found = -1
        while len(members) != found:
            found = len(members)
            members.update(process for process, (_, parent, *_) in living.items() if parent in members)
        self._known = {process: living[process][0] for process in members}


def _living() -> Iterator[tuple[int, tuple[int, int, int, int]]]:
    """Every process of a Linux machine but zombies: its id; when it was started, its parent, group and session."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The second field is the name in brackets, which may hold anything.
            fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            state, parent, group, session, started = *fields[:4], fields[19]
        except (OSError, ValueError, IndexError):  # it has just ended
            continue
        if state not in (b"Z", b"X"):
            yield int(entry.name), (int(started), int(parent), int(group), int(session))


class _Registrations:
    """The registrations that the guard has received.

    Args:
        pipe: Where.
        parent: Process id of the stack.
    """

    def __init__(self, pipe: int, parent: int) -> None:
        self.leaders: dict[int, int] = {}
        """The signal that stops each program."""
        self.folders: dict[Path, int] = {}
        """Folders to remove, with the descriptor that locks each."""
        self._pipe = pipe
        self._parent = parent
        self._partial = b""

    def follow(self) -> None:
        """Reads until the stack has ended or says so, and all that was written until then."""
        # The parent's number is a second sign of its end: a process that it forked may hold the pipe open.
        while os.getppid() == self._parent:
            if self._read(_PARENT_SECONDS):
                return
        while select.select([self._pipe], [], [], 0)[0]:
            if self._read(0):
                return

    def _read(self, seconds: float) -> bool:
        """Reads once, if there is something within so many seconds; True when that was the last."""
        if not select.select([self._pipe], [], [], seconds)[0]:
            return False
        chunk = os.read(self._pipe, 65536)
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        for line in lines:
            if line == b".":
                return True
            self._take(line[:1], line[1:])
        return not chunk

    def _take(self, kind: bytes, value: bytes) -> None:
        if kind == b"+":
            leader, stop_signal = value.split()
            self.leaders[int(leader)] = int(stop_signal)
        elif kind == b"-":
            self.leaders.pop(int(value), None)
        elif kind == b"~":
            with contextlib.suppress(OSError):  # it has been removed since
                lock = os.open(value, os.O_RDONLY)
                fcntl.flock(lock, fcntl.LOCK_SH)
                self.folders[Path(os.fsdecode(value)).parent] = lock


def _end_within(seconds: float, families: list[Family], number: int) -> list[Family]:
    """Waits until all are gone, at most `seconds`, and sends a signal (0: none) again and again meanwhile.

    Returns:
        Those that are not gone.
    """
    deadline = time.monotonic() + seconds
    while (families := [family for family in families if family.signal(number)]) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    return families


def main(pipe: str, parent: str, grace_seconds: str) -> None:
    """The guard process: waits for the end of the stack, then ends what it left."""
    told = _Registrations(int(pipe), int(parent))
    told.follow()
    families = [Family(leader) for leader in told.leaders]
    for family in families:
        family.signal(0)  # who is who, before their parents end
        signal_group(family.leader, told.leaders[family.leader])
        family.signal(signal.SIGCONT)  # one that is stopped cannot end
    left = _end_within(float(grace_seconds), families, 0)
    _end_within(_KILL_SECONDS, left, signal.SIGKILL)
    for folder in told.folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
