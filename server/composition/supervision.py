"""Several server processes on one port: what they share, for the composition root."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pretrade.client.file_lock import take_lock
from pretrade.client.operator_token import token_path
from server.audit.shipping.leftovers import ship_leftovers
from server.composition.process import seconds_to_end
from server.control.file import ControlFile, control_path
from server.control.start import halt_at_start
from server.decision.ids import Ids
from server.decision.left_keys import LeftKeys
from server.decision.shared_keys import SharedKeys, make_memory
from server.envoy import gate
from server.envoy.edge import Envoy
from server.journal.journal_file import journals_of
from server.machine import REAL
from server.process.private_directory import private_directory
from server.process.slot import journal_path
from server.process.supervisor import Command, Group, Supervisor
from server.security import operator
from server.settings import Settings


async def supervise(settings: Settings) -> int:
    """Runs `settings.processes` server processes until it is stopped; returns the exit code, as `Supervisor.run`.

    Raises:
        OSError: A port or the journal belongs to another server, or the control state cannot be written.
    """
    assert settings.processes is not None
    return await Supervisor(settings.processes, lambda: open_group(settings, settings.processes or 1)).run()


@contextlib.contextmanager
def open_group(settings: Settings, processes: int) -> Iterator[Group]:
    """Takes what the processes share: their lock, memory, folder and ports.

    Args:
        settings: Shared by all; every process narrows them to its slot.
        processes: How many there are to be.

    Raises:
        OSError: A port or the journal belongs to another server, or the control state cannot be written.
    """
    # Once chosen, the edge is the same for each process.
    environment, envoy = os.environ | {"PRETRADE_GRPC__EDGE": settings.grpc.edge}, None
    with contextlib.ExitStack() as held:
        lock = _lock(settings.journal.path)
        held.callback(os.close, lock)
        keys = make_memory(settings.idempotency.max_keys)
        held.callback(os.close, keys)
        left = _left_keys(settings, keys)
        sockets = held.enter_context(private_directory(lock))
        if settings.grpc.edge == "envoy":
            http_filter = gate.http_filter(settings.admission, settings.budget.cap_seconds)
            envoy = Envoy(settings.grpc, http_filter, settings.access, settings.tls, sockets)
        if settings.access.admin == "operator_token":
            operator.make_token(token_path(settings.journal.path), REAL)
        for section, name in ((settings.grpc, "GRPC"), (settings.admin, "ADMIN")):
            reservation = held.enter_context(_reserve(section.host, section.port))
            environment[f"PRETRADE_{name}__PORT"] = str(reservation.getsockname()[1])
        control = ControlFile(control_path(settings.journal.path))
        halt_at_start(settings.control, control, Ids(), time.time_ns)
        port, database_url = int(environment["PRETRADE_GRPC__PORT"]), settings.database_url.get_secret_value()

        def command(slot: int, restarts: int) -> Command:
            if envoy is not None:
                argv, added = envoy.command(slot, restarts, keys, port)
                return Command(argv, environment | added, (keys,), frozenset((signal.SIGTERM,)), process_group=0)
            argv = [sys.executable, "-m", "server", "--slot", str(slot)]
            argv += ["--restarts", str(restarts), "--keys", str(keys), "--sockets", str(sockets)]
            return Command(argv, environment, (keys,))

        yield Group(
            decision_port=port,
            command=command,
            journal=lambda slot: journal_path(settings.journal.path, slot),
            ship=lambda journal: ship_leftovers(journal, database_url, settings.shipping, left.take_over),
            left_behind=_left_behind(settings.journal.path, processes),
            patience_seconds=settings.startup_patience_seconds,
            seconds_to_end=seconds_to_end(settings),
        )


def _left_keys(settings: Settings, keys: int) -> LeftKeys:
    """Brings into the table of keys what ended processes had decided."""
    window_seconds = settings.idempotency.window_seconds
    table = SharedKeys(keys, window_seconds, time.monotonic)
    return LeftKeys(table, window_seconds, lambda slot: journal_path(settings.journal.path, slot))


def _left_behind(journal: Path, processes: int) -> tuple[tuple[int, Path], ...]:
    """Journals of slots that no process takes now, and that of a server of one process, each with a slot's number."""
    ours = {journal_path(journal, slot): slot for slot in range(processes + 1)}
    numbered = ((ours.get(one, processes + 1 + number), one) for number, one in enumerate(journals_of(journal)))
    return tuple((slot, one) for slot, one in numbered if slot >= processes)


def _reserve(host: str, port: int) -> socket.socket:
    """A socket that holds a port for our processes and never listens.

    Raises:
        OSError: Somebody else has it.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    # Whoever listens there now is not one of ours: with SO_REUSEPORT alone we would join it.
    with socket.socket(family, kind, protocol) as alone:
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            alone.bind(address)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    held = socket.socket(family, kind, protocol)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(address)
    return held


def _lock(journal: Path) -> int:
    """Takes the right to supervise servers of this journal, held until the process ends.

    Raises:
        OSError: Another supervisor has it.
    """
    lock = take_lock(journal.with_name(f"{journal.name}.supervisor.lock"))
    if lock is None:
        raise OSError(f"another supervisor runs servers on the audit journal {journal}")
    return lock
