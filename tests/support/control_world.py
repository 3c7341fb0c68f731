"""Servers that share a control state in virtual time, with simulated Redis, replica, disks, clocks and journals.

The control state itself is the real one, including the Redis client and the machine's files.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from server.control.file import ControlFile
from server.control.shared import SharedControl, SharedSettings
from server.control.state import ControlSettings, ControlState, Wanted
from server.errors import JournalUnwritableError
from server.journal.journal import Journal, JournalSettings
from server.machine import Files, Identity, Machine

TRADES = ControlSettings(initial_trading_state="ACTIVE")
WALL_SECONDS = 1_700_000_000.0


class MadeUpRedis:
    """A master and its replica, of one stream."""

    def __init__(self) -> None:
        self.state: bytes = b""
        """What the master holds; empty without an entry."""
        self.replica: bytes = b""
        self.entry = 0
        self.is_up = True
        self.news = asyncio.Event()

    def replicate(self) -> None:
        """The replica has what the master has."""
        self.replica = self.state

    def fail_over(self) -> None:
        """The master dies, and the replica takes its place with what it has."""
        self._put(self.replica)

    def replace(self, digest: str, text: bytes) -> bytes | None:
        """What the script does."""
        if hashlib.sha1(self.state, usedforsecurity=False).hexdigest() != digest:
            return self.state
        self._put(text)
        return None

    def _put(self, text: bytes) -> None:
        self.state, self.entry = text, self.entry + 1
        self.news.set()
        self.news = asyncio.Event()


class Line:
    """The connection of one process to Redis."""

    def __init__(self, redis: MadeUpRedis, latency: Callable[[], float]) -> None:
        self.redis = redis
        self._latency = latency
        self.is_cut = False
        self.loses_requests = self.loses_answers = False
        self.loses_answers_to_writes = False
        """The same from the next write on."""

    def connect(self, _url: str, _seconds: float) -> Redis:
        return _Client(self)

    async def carry(self, ask: Callable[[], Any]) -> Any:
        """The answer to a question, where the network brings it."""
        await asyncio.sleep(self._latency())
        if self.is_cut or not self.redis.is_up:
            raise RedisConnectionError("cut")
        if self.loses_requests:
            await asyncio.Event().wait()
        answer = ask()
        if self.loses_answers:
            await asyncio.Event().wait()
        await asyncio.sleep(self._latency())
        return answer


class _Client(Redis):
    def __init__(self, line: Line) -> None:
        self._line = line

    def __del__(self, *_: object) -> None:
        return

    async def ping(self, **_: Any) -> bool:
        return bool(await self._line.carry(lambda: True))

    async def xrevrange(self, *_: Any, **__: Any) -> Any:
        return await self._line.carry(self._entries)

    async def xread(self, streams: Any, *, block: int) -> Any:  # type: ignore[override]
        redis, (last,) = self._line.redis, streams.values()
        if redis.entry == int(last):
            news = asyncio.ensure_future(redis.news.wait())
            await asyncio.wait((news,), timeout=block / 1e3)
            news.cancel()
        if redis.entry == int(last):
            return await self._line.carry(list)
        return await self._line.carry(lambda: [[b"key", self._entries()]])

    async def eval(self, _script: str, _keys: int, *arguments: Any) -> Any:
        _, digest, text = arguments
        self._line.loses_answers = self._line.loses_answers or self._line.loses_answers_to_writes
        return await self._line.carry(lambda: self._line.redis.replace(digest, text))

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        return

    def _entries(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        redis = self._line.redis
        return [(str(redis.entry).encode(), {b"state": redis.state})] if redis.state else []


class MadeUpFiles(Files):
    """The disk of a server. What was not synced is gone when the power is."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._contents: dict[Path, tuple[bytes, Identity]] = {}
        self._durable: dict[Path, tuple[bytes, Identity]] = {}
        self.is_full = self.is_unsynced = False

    def read(self, path: Path) -> tuple[bytes, Identity]:
        if path not in self._contents:
            raise FileNotFoundError(path)
        return self._contents[path]

    def identity(self, path: Path) -> Identity:
        return self.read(path)[1]

    def write(self, path: Path, content: bytes) -> Identity:
        if self.is_full:
            raise OSError(28, "no space left on device")
        identity = Identity(next(self._numbers), 0, len(content))
        self._contents[path] = content, identity
        return identity

    def replace(self, source: Path, target: Path) -> None:
        self._contents[target] = self._contents.pop(source)

    def sync_directory(self, path: Path) -> None:
        if self.is_unsynced:
            raise OSError(5, "input/output error")
        self._durable = dict(self._contents)

    def lose_power(self) -> None:
        self._contents = dict(self._durable)

    def lock(self, path: Path) -> int | None:
        return 1

    def unlock(self, lock: int) -> None:
        return


class Rows(Journal):
    """Keeps what is appended; it has no thread and no file, which know no virtual time."""

    def __init__(self) -> None:
        super().__init__(JournalSettings())
        self.changes: list[packet_pb2.ControlChange] = []
        self.is_broken = False

    def append(self, entry: bytes, *, even_if_full: bool = False) -> asyncio.Future[bool]:
        if self.is_broken:
            raise JournalUnwritableError("broken")
        self.changes.append(packet_pb2.JournalEntry.FromString(entry).control_change)
        written: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        written.set_result(True)
        return written


class Process:
    """A process of a server, from its start to its end."""

    def __init__(self, server: Server) -> None:
        loop = asyncio.get_running_loop()
        machine = Machine(clock=loop.time, wall_clock_ns=server.wall_clock_ns, files=server.files)
        self.line = Line(server.redis, server.latency)
        self.shared = SharedControl("redis://made-up", SharedSettings(), loop.time, self.line.connect)
        self.control = ControlState(
            server.settings,
            ControlFile(Path(f"/{server.name}/control.json"), machine),
            {},
            server.journal,
            f"{server.name}-{next(server.numbers)}",
            server.new_id,
            server.wall_clock_ns,
            loop.time,
            self.shared,
        )
        self._tasks: list[asyncio.Task[Any]] = []

    async def run(self) -> None:
        """Starts it."""
        await self.control.synchronise()
        self.spawn(self.control.watch())

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Does something as long as the process lives."""
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    @property
    def state(self) -> str:
        return self.control.trading_state_name

    async def kill(self) -> None:
        """Ends it at once, whatever it does."""
        tasks = [*self._tasks, *self.control._finishing]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Server:
    """A server of one process, which may die and start again."""

    def __init__(
        self,
        name: str,
        redis: MadeUpRedis,
        settings: ControlSettings = TRADES,
        latency: Callable[[], float] = lambda: 0.001,
    ) -> None:
        self.name = name
        self.redis = redis
        self.settings = settings
        self.latency = latency
        self.files, self.journal = MadeUpFiles(), Rows()
        self.wall_ahead = 0.0
        """Seconds by which its wall clock is wrong."""
        self.numbers = itertools.count()
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        assert self._process is not None, "it does not run"
        return self._process

    @property
    def is_up(self) -> bool:
        return self._process is not None

    @property
    def state(self) -> str:
        return self.process.state

    def wall_clock_ns(self) -> int:
        return int((WALL_SECONDS + asyncio.get_running_loop().time() + self.wall_ahead) * 1e9)

    def new_id(self) -> str:
        """As UUIDv7: the time by the wall clock comes first."""
        return f"{self.wall_clock_ns() // 1_000_000:016}-{self.name}-{next(self.numbers)}"

    async def start(self) -> None:
        self._process = Process(self)
        await self._process.run()

    async def kill(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            await process.kill()

    async def set(
        self,
        subject: str,
        value: str,
        author: str = "test",
        seconds: float | None = None,
        lifts: tuple[str, ...] = (),
        expected: int | None = None,
        needs_all: bool = False,
    ) -> admin_pb2.Change:
        wanted = Wanted(subject, value, author, "test", seconds, expected, needs_all=needs_all, lifts=lifts)
        return await self.process.control.change(wanted)
