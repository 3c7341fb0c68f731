"""The hosts and processes of a simulation: what `server.machine.Machine` is to the composition root.

A host has a disk and a wall clock that may step. A process has an event loop, threads and open connections; it can be
killed, stopped and continued, or lose its host's power.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from server.machine import Machine
from simulation.disk import Disk, SimulatedFiles
from simulation.loop import ProcessLoop
from simulation.replica import ModelChannel, ModelServer
from simulation.threads import SimulatedThreads
from simulation.vfs import SimulatedSqlite
from simulation.world import START_SECONDS, START_WALL_NS, World

if TYPE_CHECKING:
    from simulation.calls import Listeners
    from simulation.network import Network

_CAPACITY_BYTES: Final = 256 * 2**20


class Host:
    """What outlives a process: a disk, and a clock on the wall.

    Args:
        world: Whose time it lives in.
        name: Its disk is mounted under this name.
        sqlite: Gives SQLite the disk.
    """

    def __init__(self, world: World, name: str, sqlite: SimulatedSqlite) -> None:
        self.world = world
        self.name = name
        self._sqlite = sqlite
        self.wall_offset_ns = 0
        """By how much its wall clock is ahead of the true one."""
        self.disk = Disk(world, name, _CAPACITY_BYTES, self.wall_clock_ns)
        sqlite.mount(self.disk)
        self.processes: list[SimulatedMachine] = []
        """Those that live."""

    def wall_clock_ns(self) -> int:
        """Nanoseconds since the Unix epoch, as this host believes."""
        return START_WALL_NS + int((self.world.now - START_SECONDS) * 1e9) + self.wall_offset_ns

    def lose_power(self) -> None:
        """Ends all processes at once, and leaves on the disk what chance leaves."""
        self.world.note(self.name, "loses power")
        for process in list(self.processes):
            process.kill()
        self._sqlite.forget_memory(self.disk)
        self.disk.lose_power()

    def close_files_of(self, process: SimulatedMachine) -> None:
        """Closes what a dead process had open, and gives its locks back."""
        self._sqlite.close_all_of(process)
        for path, owner in list(self.disk.locks.items()):
            if owner is process:
                del self.disk.locks[path]


class SimulatedMachine:
    """One process, and all it gets from its machine.

    Args:
        host: Where it runs.
        name: For the trace.
        network: Whom it can connect to.
        listeners: The gRPC servers there are.
        child: Runs a child process of a module, given its standard input and a way to write to its standard output.
    """

    def __init__(
        self,
        host: Host,
        name: str,
        network: Network,
        listeners: Listeners,
        child: Callable[[SimulatedMachine, Callable[..., Any], tuple[str, ...]], Any] | None = None,
    ) -> None:
        world = host.world
        self.world = world
        self.host = host
        self.name = name
        self.dead = False
        self.threads = SimulatedThreads(world, self)
        self.loop = ProcessLoop(world, self, name)
        self.files = SimulatedFiles(host.disk, self)
        self._network = network
        self._listeners = listeners
        self._child = child
        self.children: list[SimulatedMachine] = []
        self.models: dict[str, ModelServer] = {}
        """The model servers, by address."""
        self.shipments = 0
        """Children started so far."""
        self.on_death: list[Callable[[], object]] = []
        """Called when it dies: whoever is connected to it notices."""
        chance = world.random(f"process/{name}")
        self.machine: Final = Machine(
            host_name=lambda: host.name,
            process_name=lambda: name,
            clock=lambda: world.now,
            wall_clock_ns=host.wall_clock_ns,
            uniform=chance.random,
            random_bytes=chance.randbytes,
            threads=self.threads,
            files=self.files,
            grpc_server=lambda **keywords: listeners.server(self, **keywords),
            grpc_channel=lambda endpoint, **_: self._channel(endpoint),
            dials=False,
            http_server=lambda *_: (_NoServer(), _NoThread()),
        )
        host.processes.append(self)

    def _channel(self, endpoint: str) -> Any:
        model = self.models.get(endpoint)
        return self._listeners.channel(self, endpoint) if model is None else ModelChannel(model)

    def run(self, main: Callable[[], Any]) -> asyncio.Task[Any]:
        """Starts the process's main coroutine."""
        return self.loop.create_task(main(), name=f"main-{self.name}")

    def kill(self) -> None:
        """SIGKILL."""
        if self.dead:
            return
        self.dead = True
        self.world.note(self.name, "killed")
        self.host.processes.remove(self)
        self.loop.kill()
        self.threads.kill()
        self.host.close_files_of(self)
        for notice in self.on_death:
            notice()
        for child in self.children:
            self.world.after(1e-4, child.kill)  # its input has ended

    def stop(self) -> None:
        """SIGSTOP: its event loop stands still. Its threads end what they are at, and then stand still, too."""
        self.world.note(self.name, "stopped")
        self.loop.stop_now()

    def go_on(self) -> None:
        """SIGCONT."""
        self.world.note(self.name, "goes on")
        self.loop.go_on()

    async def connect(
        self, protocol_factory: Callable[[], asyncio.Protocol], host: str, port: int
    ) -> tuple[Any, asyncio.Protocol]:
        """Opens a connection of bytes."""
        return await self._network.connect(self, protocol_factory, f"{host}:{port}")

    async def start_child(self, protocol_factory: Callable[..., Any], arguments: tuple[str, ...]) -> tuple[Any, Any]:
        """Starts a child process; raises OSError where there is no such program."""
        if self._child is None:
            raise FileNotFoundError(2, "no such program", " ".join(arguments))
        protocol = protocol_factory()
        return self._child(self, protocol, arguments), protocol


class _NoServer:
    """Stands for the port of metrics, which nobody asks here."""

    server_port = 0

    def server_close(self) -> None: ...
    def shutdown(self) -> None: ...


class _NoThread:
    def join(self) -> None: ...
