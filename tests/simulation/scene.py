"""Everything that a simulation consists of, put together: servers, Redis, database, model servers, market and desk."""

from __future__ import annotations

import asyncio
import gc
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import greenlet
import structlog

from feature_cache import feature_sets
from server.decision import blocks
from server.inference import model_sets
from simulation import guest
from simulation.calls import Listeners
from simulation.children import starts_children
from simulation.database import Database
from simulation.desk import Desk
from simulation.history import History
from simulation.loop import number_from_zero
from simulation.machine import Host, SimulatedMachine
from simulation.market import Market
from simulation.network import Network
from simulation.plan import POOL
from simulation.redis import SimulatedRedis
from simulation.replica import CHALLENGER, CHAMPION, ModelServer
from simulation.server import Edge, Server
from simulation.vfs import simulated_sqlite
from simulation.world import World

PRIMARY, SECONDARY, CHALLENGER_AT = "127.0.0.1:7070", "127.0.0.1:7170", "127.0.0.1:7270"
_LEAST_IN_BLOCK: Final = blocks.LEAST


class Scene:
    """One simulation's parts.

    Args:
        seed: Determines everything.
        keep_trace: Whether to keep the trace's lines.
    """

    def __init__(self, seed: int, *, keep_trace: bool = False) -> None:
        number_from_zero()
        feature_sets.load(Path(guest.__file__))
        model_sets._known.clear()  # what another simulation of this process has learnt
        self.world = World(seed, keep_trace=keep_trace)
        self.history = History()
        self.sqlite = simulated_sqlite()
        self.sqlite.begin(self.world.random("sqlite"))
        self.network = Network(self.world)
        self.listeners = Listeners(self.network)
        self._redis_host = Host(self.world, "redis", self.sqlite)
        self.redis = SimulatedRedis(self.world, self.network, self._redis_host.wall_clock_ns)
        self.database = Database(self.world, self.sqlite)
        self.sqlite.reseed(self.world.random("sqlite's own"))  # after what only the first simulation of a process does
        self.start_child = starts_children(self.database)
        self.models = {
            PRIMARY: ModelServer("primary", CHAMPION, self.world.random("primary")),
            SECONDARY: ModelServer("secondary", CHAMPION, self.world.random("secondary")),
            CHALLENGER_AT: ModelServer("challenger", CHALLENGER, self.world.random("challenger")),
        } | {
            at: ModelServer(f"primary-{number}", CHAMPION, self.world.random(f"primary-{number}"))
            for number, at in enumerate(POOL[1:], 2)
        }
        self.market = Market(self.world, self.redis)
        machine = SimulatedMachine(Host(self.world, "desk", self.sqlite), "desk", self.network, self.listeners)
        self.desk = Desk(
            self.world, machine, self.listeners, self.history, lambda name: self.servers[name].operator_token
        )
        self.servers: dict[str, Server] = {}
        self.log: list[tuple[float, str, dict[str, Any]]] = []
        """What processes logged: when, which, and the line."""

    def add_server(self, name: str, edge: Edge, changes: dict[str, dict[str, Any]] | None = None) -> Server:
        """Adds a server, which does not run yet."""
        server = self.servers[name] = Server(self, name, edge, changes)
        return server

    def logged(self, line: dict[str, Any]) -> None:
        """Keeps a line that a process has logged."""
        owner = getattr(greenlet.getcurrent(), "owner", None)
        self.log.append((self.world.now, "" if owner is None else owner.name, line))

    def close(self) -> None:
        """Ends every process that still runs, and gives SQLite its own files back."""
        for server in self.servers.values():
            for process in list(server.host.processes):
                process.kill()
        self.desk.machine.kill()
        self.sqlite.end()


@contextmanager
def scene(seed: int, *, keep_trace: bool = False) -> Iterator[Scene]:
    """A scene that is taken down when the context is left."""
    made = Scene(seed, keep_trace=keep_trace)
    # Few orders come in one turn of a simulated event loop. In half of the seeds each that may be in a block is in one.
    blocks.LEAST = made.world.random("blocks").choice((1, _LEAST_IN_BLOCK))

    def keep(_logger: object, _method: str, line: Any) -> Any:
        made.logged(dict(line))
        raise structlog.DropEvent

    structlog.configure(processors=[keep])
    try:
        yield made
    finally:
        made.close()
        blocks.LEAST = _LEAST_IN_BLOCK
        structlog.reset_defaults()


def prepare_process() -> None:
    """Makes this operating-system process fit for simulations, and for nothing else.

    What the garbage collector calls would come at other moments in other runs, so there is none. The coroutines of dead
    processes end in the middle of something, which Python complains about when it frees them. And redis-py closes what
    it finds open in whatever event loop there is, which here is one that does nothing.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    sys.unraisablehook = lambda _: None
    warnings.simplefilter("ignore")
    asyncio.set_event_loop(_DeafLoop())


class _DeafLoop(asyncio.SelectorEventLoop):
    """Takes tasks and never runs them."""

    def create_task(self, coro: Any, **_: object) -> Any:
        coro.close()
        return self.create_future()
