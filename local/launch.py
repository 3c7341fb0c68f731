"""Becomes a child of the stack: registers with the guard, gives up root if told to, then executes the program.

Run as a script, with the standard library alone. Registering before `exec` leaves no instant in which the program runs
and the guard does not know it. Arguments: the guard's pipe, the signal that stops the program, the user to become or an
empty string, and the program with its arguments.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import struct
import sys

_PR_SET_KEEPCAPS = 8
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 47, 2
_CAP_DAC_OVERRIDE = 1
_CAPABILITY_VERSION_3 = 0x20080522


def become(user: str) -> None:
    """Becomes `user`, keeping on Linux only the right to pass through directories that are closed to it.

    PostgreSQL refuses to run as root, yet its programs and data may lie below root's home. An ambient capability
    reaches them without opening anyone's directories and survives `exec`.
    """
    entry = pwd.getpwnam(user)
    linux = sys.platform == "linux"
    libc = ctypes.CDLL(None, use_errno=True)
    if linux:
        libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    if linux:
        mask = 1 << _CAP_DAC_OVERRIDE
        header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
        sets = struct.pack("=6I", mask, mask, mask, 0, 0, 0)  # effective, permitted, inheritable: low words, high words
        # Where the capability was not ours to keep, the program runs without it and reaches what is open to its user.
        if libc.capset(header, sets) == 0:
            libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_OVERRIDE, 0, 0)


def main(pipe: str, stop_signal: str, user: str, *argv: str) -> None:
    """Registers this process and its stop signal with the guard and turns into `argv`; returns never."""
    guard = int(pipe)
    os.write(guard, f"+{os.getpid()} {int(stop_signal)}\n".encode())
    # A child that kept the pipe open would hide the end of the stack from the guard.
    os.set_inheritable(guard, False)
    if user:
        become(user)
    os.execvp(argv[0], argv)  # noqa: S606 - no shell: the arguments are passed as they are


if __name__ == "__main__":
    main(*sys.argv[1:])
