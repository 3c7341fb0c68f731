"""A Redis with a replica, as far as pretrade uses one. The control state's Lua script runs as it is, in Lua.

A write is acknowledged by the master alone. The replica has it a little later, so a master that dies may take writes
with it that their writers were told of. Everything runs in the hub: a Redis does one thing after the other, too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any, Final

import hiredis
import lupa.lua51

from simulation.network import Connection, Network
from simulation.world import World

ADDRESS: Final = "redis:6379"
_NOTHING: Final = object()
"""The reply to a command that answers later."""


class CommandError(Exception):
    """What Redis answers with an error."""


class _Data:
    """What one Redis holds."""

    def __init__(self) -> None:
        self.streams: dict[bytes, list[tuple[bytes, list[bytes]]]] = {}
        self.strings: dict[bytes, bytes] = {}
        self.last_ids: dict[bytes, bytes] = {}


class _Client:
    """The server's side of a connection."""

    def __init__(self) -> None:
        self.reader = hiredis.Reader()
        self.resp = 2
        self.waiting: _Block | None = None
        self.commands: list[list[bytes]] = []
        self.channels: set[bytes] = set()


class _Block:
    """An XREAD that waits."""

    def __init__(self, key: bytes, after: bytes) -> None:
        self.key = key
        self.after = after


class SimulatedRedis:
    """A master, its replica, and the address under which whichever is the master is found.

    Args:
        world, network: Where it lives.
        wall_clock_ns: Of the master's host; ids of stream entries are made of it.
    """

    def __init__(self, world: World, network: Network, wall_clock_ns: Callable[[], int]) -> None:
        self.world = world
        self._network = network
        self._wall_clock_ns = wall_clock_ns
        self._chance = world.random("redis")
        self._master, self._replica = _Data(), _Data()
        self._epoch = 0
        self.up = True
        self.stalled_until = 0.0
        """SIGSTOP: commands wait."""
        self.replication_seconds = (1e-4, 5e-3)
        """How long the replica takes to have a write."""
        self.read_only = self.loading = False
        self._clients: dict[Connection, _Client] = {}
        self.history: list[tuple[float, bytes, bytes]] = []
        """Everything that was ever added to a stream: when, key, and its last field."""
        self.cut_before: Callable[[list[bytes]], bool] = lambda command: False
        """Whether to cut the connection instead of doing a command: a lost request."""
        self.cut_after: Callable[[list[bytes]], bool] = lambda command: False
        """The same after having done it: a lost reply."""
        self.commands = 0
        self.asking = ""
        """The host whose script is being done."""
        network.listen(ADDRESS, self)

    # What happens to it.

    def fail_over(self, down_seconds: float) -> None:
        """The master dies with what its replica lacks; the replica is the master after so long."""
        self.world.note("redis", "master dies")
        self._go_down()
        self._master, self._replica = self._replica, _Data()
        self._epoch += 1
        self.world.after(down_seconds, self._come_up)

    def restart(self, down_seconds: float, *, wipe: bool) -> None:
        """Goes away and comes back, with its data or without."""
        self.world.note("redis", "restarts", "wiped" if wipe else "")
        self._go_down()
        if wipe:
            self._master, self._replica = _Data(), _Data()
            self._epoch += 1
        self.world.after(down_seconds, self._come_up)

    def wipe(self) -> None:
        """FLUSHALL."""
        self.world.note("redis", "wiped")
        self._master, self._replica = _Data(), _Data()
        self._epoch += 1

    def _go_down(self) -> None:
        self.up = False
        self._network.cut(ADDRESS)

    def _come_up(self) -> None:
        self.world.note("redis", "is back")
        self.up = True
        self.stalled_until = 0.0
        self._replica.streams = {key: list(entries) for key, entries in self._master.streams.items()}
        self._replica.strings = dict(self._master.strings)

    # What the feature worker does, past the network.

    def put(self, key: str, value: bytes) -> None:
        """Stores a string."""
        if self.up:
            self._master.strings[key.encode()] = self._replica.strings[key.encode()] = value

    def publish(self, channel: str, message: bytes) -> None:
        """Sends a message to all who listen."""
        if not self.up or self.world.now < self.stalled_until:
            return
        name = channel.encode()
        for connection, client in list(self._clients.items()):
            if name in client.channels and connection.open:
                kind = b">" if client.resp >= 3 else b"*"
                connection.reply(kind + b"3\r\n" + b"".join(map(_bulk, (b"message", name, message))))

    def last(self, key: str) -> bytes | None:
        """The last field of a stream's last entry."""
        entries = self._master.streams.get(key.encode())
        return entries[-1][1][-1] if entries else None

    # A server of the network.

    def connected(self, connection: Connection) -> None:
        """See `Server`."""
        if not self.up:
            connection.reset()
            return
        self._clients[connection] = _Client()

    def closed(self, connection: Connection) -> None:
        """See `Server`."""
        self._clients.pop(connection, None)

    def received(self, connection: Connection, data: bytes) -> None:
        """See `Server`. What was sent before a connection closed is done all the same."""
        if not self.up:
            return
        if self.world.now < self.stalled_until:
            self.world.at(self.stalled_until, self.received, connection, data)
            return
        client = self._clients.get(connection)
        if client is None:
            return
        client.reader.feed(data)
        while (command := client.reader.gets()) is not False:
            client.commands.append(command)
        self._work(connection, client)

    def _work(self, connection: Connection, client: _Client) -> None:
        """Does a connection's commands, until one waits."""
        while client.commands and client.waiting is None:
            command = client.commands.pop(0)
            name = command[0].upper()
            self.commands += 1
            if name in (b"EVAL", b"EVALSHA"):
                self.asking = connection.machine.host.name
                self.world.note("redis", "EVAL", connection.machine.name, *command[3:-1])
                if self.cut_before(command):
                    self.world.note("redis", "request lost")
                    connection.reset()
                    return
            try:
                answer = self._do(connection, client, name, command[1:])
            except CommandError as error:
                answer = error
            if name in (b"EVAL", b"EVALSHA") and self.cut_after(command):
                self.world.note("redis", "reply lost")
                connection.reset()
                return
            if answer is not _NOTHING:
                connection.reply(_encoded(answer, client.resp))

    # Commands.

    def _do(self, connection: Connection, client: _Client, name: bytes, arguments: list[bytes]) -> Any:  # noqa: PLR0911, PLR0912 - a command a case
        if self.loading and name not in (b"HELLO", b"CLIENT", b"AUTH"):
            raise CommandError("LOADING Redis is loading the dataset in memory")
        match name:
            case b"HELLO":
                client.resp = int(arguments[0]) if arguments else client.resp
                return {b"server": b"redis", b"version": b"7.2.0", b"proto": client.resp, b"id": 1, b"role": b"master"}
            case b"CLIENT" | b"SELECT" | b"AUTH":
                return "OK"
            case b"PING":
                if client.channels and client.resp < 3:
                    return [b"pong", arguments[0] if arguments else b""]
                return arguments[0] if arguments else "PONG"
            case b"GET":
                return self._master.strings.get(arguments[0])
            case b"MGET":
                return [self._master.strings.get(key) for key in arguments]
            case b"SUBSCRIBE":
                for channel in arguments:
                    client.channels.add(channel)
                    kind = b">" if client.resp >= 3 else b"*"
                    connection.reply(
                        kind + b"3\r\n" + _bulk(b"subscribe") + _bulk(channel) + f":{len(client.channels)}\r\n".encode()
                    )
                return _NOTHING
            case b"UNSUBSCRIBE":
                client.channels.clear()
                return _NOTHING
            case b"XREVRANGE":
                return self._newest(arguments[0], _count(arguments))
            case b"XREAD":
                return self._read(connection, client, arguments)
            case b"XADD":
                return self._add(arguments)
            case b"EVAL":
                return self._evaluate(arguments)
            case _:
                raise CommandError(f"ERR unknown command '{name.decode()}'")

    def _newest(self, key: bytes, count: int) -> list[Any]:
        entries = self._master.streams.get(key, [])
        return [[entry, list(fields)] for entry, fields in entries[::-1][:count]]

    def _read(self, connection: Connection, client: _Client, arguments: list[bytes]) -> Any:
        block = None
        if arguments[0].upper() == b"BLOCK":
            block = int(arguments[1]) / 1e3
            arguments = arguments[2:]
        elif arguments[0].upper() == b"COUNT":
            arguments = arguments[2:]
        key, after = arguments[-2], arguments[-1]
        found = self._after(key, after)
        if found or block is None:
            return {key: found} if found else None
        waiting = client.waiting = _Block(key, after)

        def give_up() -> None:
            if client.waiting is waiting:
                self._unblock(connection, client, None)

        self.world.after(block or math.inf, give_up)
        return _NOTHING

    def _after(self, key: bytes, after: bytes) -> list[Any]:
        entries = self._master.streams.get(key, [])
        return [[entry, list(fields)] for entry, fields in entries if _id(entry) > _id(after)]

    def _unblock(self, connection: Connection, client: _Client, answer: Any) -> None:
        if not self.up or connection not in self._clients:
            return
        if self.world.now < self.stalled_until:
            self.world.at(self.stalled_until, self._unblock, connection, client, answer)
            return
        client.waiting = None
        connection.reply(_encoded(answer, client.resp))
        self._work(connection, client)

    def _add(self, arguments: list[bytes]) -> bytes:
        if self.read_only:
            raise CommandError("READONLY You can't write against a read only replica.")
        key, rest = arguments[0], arguments[1:]
        most = math.inf
        if rest[0].upper() == b"MAXLEN":
            most, rest = int(rest[1]), rest[2:]
        data = self._master
        last = data.last_ids.get(key, b"0-0")
        now_ms = self._wall_clock_ns() // 1_000_000
        last_ms, last_sequence = _id(last)
        entry_id = (now_ms, 0) if now_ms > last_ms else (last_ms, last_sequence + 1)
        entry = f"{entry_id[0]}-{entry_id[1]}".encode()
        fields = rest[1:]
        self._store(data, key, entry, fields, most)
        self.history.append((self.world.now, key, fields[-1]))
        self.world.note("redis", "XADD", key, *fields[:-1])
        epoch, replica = self._epoch, self._replica

        def replicate() -> None:
            if self._epoch == epoch and self.up:
                self._store(replica, key, entry, fields, most)

        self.world.after(self._chance.uniform(*self.replication_seconds), replicate)
        for connection, client in list(self._clients.items()):
            block = client.waiting
            if block is not None and block.key == key and _id(entry) > _id(block.after):
                self._unblock(connection, client, {key: [[entry, list(fields)]]})
        return entry

    @staticmethod
    def _store(data: _Data, key: bytes, entry: bytes, fields: list[bytes], most: float) -> None:
        entries = data.streams.setdefault(key, [])
        entries.append((entry, fields))
        data.last_ids[key] = entry
        while len(entries) > most:
            entries.pop(0)

    def _evaluate(self, arguments: list[bytes]) -> Any:
        if self.read_only:
            raise CommandError("READONLY You can't write against a read only replica.")
        script, count = arguments[0], int(arguments[1])
        keys, rest = arguments[2 : 2 + count], arguments[2 + count :]

        _asked.append(self)
        try:
            return _from_lua(_compiled(script)(_call, _sha1hex, _table(keys), _table(rest)))
        finally:
            _asked.clear()

    def _do_in_script(self, name: bytes, arguments: list[bytes]) -> Any:
        match name:
            case b"XREVRANGE":
                return self._newest(arguments[0], _count(arguments))
            case b"XADD":
                return self._add(arguments)
            case b"GET":
                return self._master.strings.get(arguments[0])
            case _:
                raise CommandError(f"ERR unknown command '{name.decode()}' in a script")


_lua: Final = lupa.lua51.LuaRuntime(encoding=None)
_scripts: dict[bytes, Any] = {}


_asked: Final[list[SimulatedRedis]] = []
"""Whose script runs: Lua would keep what a function of its own refers to for long."""


def _call(name: bytes, *parts: Any) -> Any:
    """`redis.call`."""
    words = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return _to_lua(_asked[0]._do_in_script(name.upper(), words))


def _sha1hex(text: bytes) -> bytes:
    """`redis.sha1hex`."""
    return hashlib.sha1(text, usedforsecurity=False).hexdigest().encode()


def _compiled(script: bytes) -> Any:
    found = _scripts.get(script)
    if found is None:
        source = (
            b"return function(call, sha1hex, KEYS, ARGV) "
            b"local redis = {call = call, pcall = call, sha1hex = sha1hex}; "
            b"return (function()\n" + script + b"\nend)() end"
        )
        found = _scripts[script] = _lua.execute(source)
    return found


def _table(values: list[bytes]) -> Any:
    return _lua.table_from(values)


def _to_lua(value: Any) -> Any:
    if isinstance(value, list):
        return _lua.table_from([_to_lua(one) for one in value])
    return False if value is None else value


def _from_lua(value: Any) -> Any:
    if value is None or value is False:
        return None
    if isinstance(value, (bytes, int)):
        return value
    if isinstance(value, float):
        return int(value)
    return [_from_lua(value[place + 1]) for place in range(len(value))]


def _count(arguments: list[bytes]) -> int:
    words = [word.upper() for word in arguments]
    return int(arguments[words.index(b"COUNT") + 1]) if b"COUNT" in words else 1_000_000


def _id(entry: bytes) -> tuple[int, int]:
    milliseconds, _, sequence = entry.partition(b"-")
    return int(milliseconds), int(sequence or 0)


def _bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


def _encoded(value: Any, resp: int) -> bytes:  # noqa: PLR0911 - a type a case
    match value:
        case None:
            return b"_\r\n" if resp >= 3 else b"*-1\r\n"
        case CommandError():
            return f"-{value}\r\n".encode()
        case int():
            return b":%d\r\n" % value
        case str():
            return f"+{value}\r\n".encode()
        case bytes():
            return _bulk(value)
        case dict():
            if resp >= 3:
                return b"%%%d\r\n" % len(value) + b"".join(
                    _encoded(key, resp) + _encoded(one, resp) for key, one in value.items()
                )
            return _encoded([[key, one] for key, one in value.items()], resp)
        case _:
            return b"*%d\r\n" % len(value) + b"".join(_encoded(one, resp) for one in value)
