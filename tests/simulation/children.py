"""The children of a server: the process that ships its journal. The others, which only read, cannot be started here."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from server.audit.shipping.shipping import CLOSE, Progress, Task
from server.audit.shipping.shipping_process import Shipping
from simulation.machine import SimulatedMachine

if TYPE_CHECKING:
    from simulation.database import Database

_PIPE_SECONDS = 1e-4


def starts_children(database: Database) -> Callable[[SimulatedMachine, Any, tuple[str, ...]], Any]:
    """Starts child processes that ship to a database."""

    def start(parent: SimulatedMachine, protocol: Any, arguments: tuple[str, ...]) -> _Child:
        if arguments != ("-m", "server.audit"):
            raise FileNotFoundError(2, "no such program", " ".join(arguments))
        return _Child(parent, protocol, database)

    return start


class _Child(asyncio.SubprocessTransport):
    """A child process, as asyncio sees it."""

    def __init__(self, parent: SimulatedMachine, protocol: Any, database: Database) -> None:
        super().__init__()
        self._parent = parent
        self._protocol = protocol
        self._database = database
        self._code: int | None = None
        self._waiting: list[asyncio.Future[int]] = []
        self._closing = threading.Event()
        self._input = _Input(self)
        self._output = _Output()
        parent.shipments += 1
        self.machine = SimulatedMachine(
            parent.host, f"{parent.name}/ship{parent.shipments}", parent._network, parent._listeners
        )
        parent.children.append(self.machine)
        self.machine.on_death.append(self._ended)
        protocol.connection_made(self)

    def hear(self, line: bytes) -> None:
        """What is written to its standard input: first its task, later that there is nothing more to come."""
        if line == CLOSE:
            self._closing.set()
        else:
            self._take_task(line)

    def _take_task(self, line: bytes) -> None:
        task = Task.model_validate_json(line)
        machine, world = self.machine, self.machine.world

        def report(progress: Progress) -> None:
            line = progress.model_dump_json().encode() + b"\n"
            world.after(_PIPE_SECONDS, self._say, line)

        shipping = Shipping(
            task,
            report,
            machine.threads.sleep,
            lambda _url: self._database.open(machine.threads.sleep),
            machine.machine.clock,
            machine.machine.uniform,
            machine.machine.wall_clock_ns,
            self._closing,
        )
        machine.threads.start(shipping.run, "shipping")

    def _say(self, line: bytes) -> None:
        if not self._parent.dead:
            self._parent.loop.call_soon(self._protocol.pipe_data_received, 1, line)

    def end(self) -> None:
        """Its input has ended, and it with that."""
        self.machine.world.after(_PIPE_SECONDS, self.machine.kill)

    def _ended(self) -> None:
        if self._code is None:
            self._code = 0
            if not self._parent.dead:
                self._parent.loop.call_soon(self._tell)

    def _tell(self) -> None:
        self._protocol.pipe_connection_lost(1, None)
        self._protocol.pipe_connection_lost(0, None)
        self._protocol.process_exited()
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(self._code or 0)
        self._waiting.clear()

    # What `asyncio.subprocess.Process` uses.

    def get_pid(self) -> int:
        return 1 << 30  # no process of this machine has this number

    def get_returncode(self) -> int | None:
        return self._code

    def get_pipe_transport(self, fd: int) -> Any:
        return {0: self._input, 1: self._output}.get(fd)

    async def _wait(self) -> int:
        if self._code is None:
            waiting = self._parent.loop.create_future()
            self._waiting.append(waiting)
            await waiting
        return self._code or 0

    def kill(self) -> None:
        self.end()

    terminate = close = kill


class _Input(asyncio.WriteTransport):
    """The child's standard input."""

    def __init__(self, child: _Child) -> None:
        super().__init__()
        self._child = child
        self._closed = False

    def write(self, data: Any) -> None:
        self._child.hear(bytes(data))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._child.end()

    def is_closing(self) -> bool:
        return self._closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


class _Output(asyncio.ReadTransport):
    """The child's standard output."""

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self) -> None: ...
