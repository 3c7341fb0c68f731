"""Leaves a port that several processes share, before the connections of this one end.

The kernel spreads new connections over all processes that listen (`SO_REUSEPORT`). What it has given to this process,
and this process has not taken yet, is reset when the process stops listening. gRPC tells its callers to go elsewhere in
the same moment in which it stops: they connect again at once, and a connection that comes to this process again, or is
still being made, is reset, too. Then every call of that caller fails until it tries again, a second later. So a process
first stops listening, goes on with the connections that are on their way for a moment, and ends after that.

gRPC has no call for that. Its listening sockets are found among the files of the process, which Linux alone can tell;
elsewhere no port is shared.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import Final

_FILES: Final = Path("/proc/self/fd")


def stop_listening(port: int) -> int:
    """Has this process get no further connections at a TCP port; the number of sockets that listened."""
    stopped = 0
    for number in [int(one.name) for one in _FILES.iterdir()]:
        with contextlib.suppress(OSError):  # closed meanwhile
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                with socket.socket(fileno=os.dup(number)) as found:
                    if _listens_at(found, port):
                        found.shutdown(socket.SHUT_RD)
                        stopped += 1
    return stopped


def _listens_at(found: socket.socket, port: int) -> bool:
    if found.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    return bool(listens) and found.getsockname()[1] == port
