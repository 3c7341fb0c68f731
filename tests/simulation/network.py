"""Connections of bytes between simulated processes and simulated servers, which are event-driven and live in the hub.

Bytes arrive in order, after a latency, and what is under way arrives although its sender has closed. A link between a
host and a server can be *slow*, *stuck* (nothing arrives until it is no more, then everything), *refusing*, or cut.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from simulation.world import World

if TYPE_CHECKING:
    from simulation.machine import SimulatedMachine


class Server(Protocol):
    """What listens at an address."""

    def connected(self, connection: Connection) -> None:
        """Somebody connected."""

    def received(self, connection: Connection, data: bytes) -> None:
        """Somebody sent something."""

    def closed(self, connection: Connection) -> None:
        """Somebody closed."""


@dataclass(slots=True)
class Link:
    """How things are between a host and a server."""

    latency: tuple[float, float] = (5e-5, 3e-4)
    refusing: bool = False
    stuck_there_until: float = 0.0
    """Requests arrive no earlier."""
    stuck_back_until: float = 0.0
    """Replies arrive no earlier."""


class Network:
    """Who listens where, and how the way there is."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._chance = world.random("network")
        self._servers: dict[str, Server] = {}
        self._links: dict[tuple[str, str], Link] = {}
        self.connections: dict[Connection, None] = {}
        """Those that are open."""

    def listen(self, address: str, server: Server) -> None:
        """Lets a server be found at `host:port`."""
        self._servers[address] = server

    def link(self, host: str, address: str) -> Link:
        """The way from a host to an address."""
        return self._links.setdefault((host, address), Link())

    def cut(self, address: str, host: str | None = None) -> None:
        """Resets the connections to an address, those of one host or all."""
        for connection in list(self.connections):
            if connection.address == address and host in (None, connection.machine.host.name):
                connection.reset()

    async def connect(
        self, machine: SimulatedMachine, protocol_factory: Callable[[], asyncio.Protocol], address: str
    ) -> tuple[_Transport, asyncio.Protocol]:
        """Connects a process.

        Raises:
            OSError: Nobody listens there, or nobody may.
        """
        link, server = self.link(machine.host.name, address), self._servers.get(address)
        opened = machine.loop.create_future()
        when = max(self.world.now + 2 * self._chance.uniform(*link.latency), link.stuck_there_until)

        def open_() -> None:
            if not opened.done():
                machine.loop.call_soon(_resolve, opened, not (server is None or link.refusing))

        self.world.at(when, open_)
        if not await opened:
            raise ConnectionRefusedError(111, f"{address} refuses connections")
        assert server is not None
        protocol = protocol_factory()
        connection = Connection(self, machine, address, server, link, protocol)
        self.connections[connection] = None
        machine.on_death.append(connection.client_died)
        protocol.connection_made(connection.transport)
        server.connected(connection)
        return connection.transport, protocol

    def latency(self, link: Link) -> float:
        """Of one packet."""
        return self._chance.uniform(*link.latency)


def _resolve(future: asyncio.Future[bool], value: bool) -> None:
    if not future.done():
        future.set_result(value)


class Connection:
    """One connection of a process to a server."""

    def __init__(
        self,
        network: Network,
        machine: SimulatedMachine,
        address: str,
        server: Server,
        link: Link,
        protocol: Any,
    ) -> None:
        self.machine = machine
        self.address = address
        self.transport = _Transport(self)
        self._network = network
        self._server = server
        self._link = link
        self.protocol = protocol
        self._arrives_there = self._arrives_back = 0.0
        self.open = True
        """Until the process closes it, or it is reset."""
        self.state: Any = None
        """The server's own."""

    def request(self, data: bytes) -> None:
        """From the process to the server."""
        world, link = self._network.world, self._link
        self._arrives_there = max(world.now + self._network.latency(link), self._arrives_there, link.stuck_there_until)
        world.at(self._arrives_there, self._server.received, self, data)

    def reply(self, data: bytes) -> None:
        """From the server to the process."""
        world, link = self._network.world, self._link
        self._arrives_back = max(world.now + self._network.latency(link), self._arrives_back, link.stuck_back_until)
        world.at(self._arrives_back, self._deliver, data)

    def _deliver(self, data: bytes) -> None:
        if self.open:
            self.machine.loop.call_soon(self._receive, data)

    def _receive(self, data: bytes) -> None:
        if self.open:
            self.protocol.data_received(data)

    def close(self) -> None:
        """By the process. What it has sent arrives all the same."""
        if self.open:
            self.open = False
            self._network.connections.pop(self, None)
            self._network.world.at(self._arrives_there, self._server.closed, self)
            self.machine.loop.call_soon(self.protocol.connection_lost, None)

    def reset(self) -> None:
        """By the server or the network: the process hears of it at once."""
        if self.open:
            self.open = False
            self._network.connections.pop(self, None)
            self._server.closed(self)
            error = ConnectionResetError(104, "connection reset by peer")
            self.machine.loop.call_soon(self.protocol.connection_lost, error)

    def client_died(self) -> None:
        """The kernel closes what a dead process had open."""
        if self.open:
            self.open = False
            self._network.connections.pop(self, None)
            self._network.world.at(self._arrives_there, self._server.closed, self)


class _Transport(asyncio.Transport):
    """The process's end of a connection."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def write(self, data: Any) -> None:
        if self._connection.open:
            self._connection.request(bytes(data))

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        self._connection.close()

    def abort(self) -> None:
        self._connection.close()

    def is_closing(self) -> bool:
        return not self._connection.open

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def get_protocol(self) -> Any:
        return self._connection.protocol

    def set_protocol(self, protocol: Any) -> None:
        self._connection.protocol = protocol

    def can_write_eof(self) -> bool:
        return False

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
