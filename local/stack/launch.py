"""Becomes a child of the stack: registers with the guard, gives up root if told to, then executes the program.

It runs as a script, with the standard library alone. It registers before `exec` and checks after that whether the stack
still lives, so there is no instant in which the program runs and the guard does not know it (see `guard`). Arguments:
the guard's pipe, the process id of the stack, the signal that stops the program, the user to become or an empty string,
and the program with its arguments.
"""

from __future__ import annotations

import os
import pwd
import sys
from typing import Final

_HERE: Final = 9
HERE: Final = f"/proc/self/fd/{_HERE}"
"""Path of its working directory for a program that became another user, on Linux. It passes by the directories above,
which may be closed to that user: those of a clone in root's home are."""


def become(user: str) -> None:
    """Becomes `user`, with no right but those of that user. The working directory stays open as `HERE`."""
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    if here != _HERE:
        os.dup2(here, _HERE)
        os.close(here)
    os.set_inheritable(_HERE, True)
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


def main(pipe: str, stack: str, stop_signal: str, user: str, *argv: str) -> None:
    """Registers this process and its stop signal with the guard, and executes `argv`; never returns."""
    guard = int(pipe)
    os.write(guard, f"+{os.getpid()} {int(stop_signal)}\n".encode())
    if os.getppid() != int(stack):
        raise SystemExit("the stack has ended")  # and its guard may have read what we wrote, or not
    os.close(guard)  # a child that kept the pipe open would hide the end of the stack from the guard
    if user:
        become(user)
    os.execvp(argv[0], argv)  # noqa: S606 - no shell: the arguments are passed as they are


if __name__ == "__main__":
    main(*sys.argv[1:])
