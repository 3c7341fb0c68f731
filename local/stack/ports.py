"""Free ports on the loopback interface."""

from __future__ import annotations

import functools
import itertools
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from pretrade.client.file_lock import take_lock

LOOPBACK: Final = "127.0.0.1"

# Below the ranges from which Linux and macOS choose the source port of an outgoing connection. A port inside them
# cannot be relied on for a restart: while the server is down a reconnecting client may be given it, or even connect to
# itself.
_FIRST: Final = 20_000
_COUNT: Final = 12_000
_BLOCK: Final = 400


def default_port(port: int, held: ExitStack) -> int | None:
    """The port, unless it is in use or reserved by another stack of this machine. Reserved until `held` is closed."""
    try:
        claim = take_lock(Path(tempfile.gettempdir()) / f"pretrade-{port}.lock")
    except OSError:  # another user's
        return None
    if claim is None:
        return None
    held.callback(os.close, claim)
    return port if is_free(port) else None


def is_free(port: int) -> bool:
    """Whether the port is free at this moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


@functools.cache
def _own_ports() -> Iterator[int]:
    """Ports to try, in turn: a block that no other process of this machine picks from while this one lives.

    Between being picked and being bound a port is nobody's. So two processes that pick from one range, as tests that
    run side by side do, sooner or later pick the same one.
    """
    blocks = list(range(_FIRST, _FIRST + _COUNT, _BLOCK))
    secrets.SystemRandom().shuffle(blocks)
    for first in blocks:
        try:
            claim = take_lock(Path(tempfile.gettempdir()) / f"pretrade-ports-{first}.lock")
        except OSError:  # another user's
            continue
        if claim is not None:  # and never closed: the process keeps it
            return itertools.cycle(range(first, first + _BLOCK))
    start = _FIRST + secrets.randbelow(_COUNT)
    return itertools.cycle([*range(start, _FIRST + _COUNT), *range(_FIRST, start)])


def free_run(count: int) -> int:
    """The first of so many TCP ports, one after the other, that are free at this moment.

    Raises:
        OSError: There are not so many.
    """
    run = 0
    for port in itertools.islice(_own_ports(), 2 * _BLOCK):
        run = run + 1 if is_free(port) and port % _BLOCK else 0  # after the last port of a block comes its first
        if run == count:
            return port - count + 1
    raise OSError(f"found no {count} free ports in a row between {_FIRST} and {_FIRST + _COUNT}")


def free_ports(count: int) -> list[int]:
    """Returns `count` different TCP ports that are free at this moment.

    Raises:
        OSError: Too few ports are free.
    """
    ports: list[int] = []
    with ExitStack() as held:
        for port in itertools.islice(_own_ports(), _BLOCK):
            if len(ports) == count:
                break
            candidate = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            # As servers do: a connection that lingers in TIME_WAIT does not make a port taken.
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                candidate.bind((LOOPBACK, port))
            except OSError:
                candidate.close()
            else:
                if port not in ports:  # SO_REUSEADDR would let it be bound twice
                    ports.append(port)
    if len(ports) < count:
        raise OSError(f"found {len(ports)} free ports of {count} between {_FIRST} and {_FIRST + _COUNT}")
    return ports
