"""A TCP proxy that disturbs the network between two real processes: it delays, holds, drops, cuts or refuses.

It runs in a thread of its own. Faults are set and healed while connections are open. Bytes that a fault holds back are
delivered after it, as TCP would retransmit them; bytes that a fault loses end their connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")

LOOPBACK: Final = "127.0.0.1"
_CHUNK_BYTES: Final = 65_536
_BACKLOG: Final = 128
_SYN_FILLERS: Final = 16
_CALL_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What the network does to connections, open ones and new ones alike."""

    latency_seconds: float = 0.0
    """Added to every byte of a reply."""
    hold_requests: bool = False
    """Bytes towards the server do not arrive."""
    hold_replies: bool = False
    """Bytes towards the client do not arrive; with `hold_requests` a black hole, alone a half-open connection."""
    reset_replies_after: int | None = None
    """The connection is reset (RST) once this many further bytes of replies have passed."""
    truncate_replies_after: int | None = None
    """The connection is closed (FIN) towards the client once this many further bytes of replies have passed."""
    close_delay_seconds: float = 0.0
    """The end of one side is passed on to the other this much later."""


HEALTHY: Final = Fault()
BLACK_HOLE: Final = Fault(hold_requests=True, hold_replies=True)
HALF_OPEN: Final = Fault(hold_replies=True)


def through(url: str, address: str) -> str:
    """The same URL, with its password and path, by way of `address` (`host:port`)."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user}{at}{address}").geturl()


class TcpProxy:
    """Forwards one port of the loopback interface to `target` (`host:port`); also a context manager."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)
        self._fault = HEALTHY
        self._healed = asyncio.Event()
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self._port = 0
        self._swallower: _SynSwallower | None = None
        self.accepted = 0
        """Connections taken from clients since the start."""

    @property
    def address(self) -> str:
        """`host:port` for clients."""
        return f"{LOOPBACK}:{self._port}"

    @property
    def open_links(self) -> int:
        """Client connections that are open now."""
        return len(self._links)

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self.heal()
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def apply(self, fault: Fault) -> None:
        """Puts a fault in place of the one in force, for open connections and new ones."""
        self._run(self._apply(fault))

    def heal(self) -> None:
        """Undoes every fault: held bytes are delivered, the port listens again."""
        self._run(self._heal())

    def refuse(self) -> None:
        """Ends every connection with a reset and refuses new ones, as a machine without the server does."""
        self._run(self._refuse())

    def reset_all(self) -> None:
        """Ends every connection with a reset; new ones are welcome."""
        self._run(self._reset_all())

    def point_to(self, target: str) -> None:
        """Ends every connection with a reset; new ones go to another `host:port`."""
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self.reset_all()

    def strand(self) -> None:
        """Loses the connections that are open, for ever and without a word, as a router does that forgets them."""
        self._run(self._strand())

    def drop_syns(self) -> None:
        """Holds open connections both ways and lets new ones go unanswered: no RST, no SYN-ACK.

        The listener's queue of accepted connections is kept full, so that the kernel drops every further SYN.
        """
        self._run(self._drop_syns())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_SECONDS)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(
            self._accept, LOOPBACK, self._port, backlog=_BACKLOG, reuse_address=True
        )
        self._port = self._server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        link = _Link(self, reader, writer)
        self._links.add(link)
        try:
            await link.run(self._target)
        except asyncio.CancelledError:
            link.reset()  # the proxy closes; asyncio's own callback cannot bear a cancelled handler
        finally:
            self._links.discard(link)

    async def _apply(self, fault: Fault) -> None:
        self._fault = fault
        for link in self._links:
            link.replied = 0
        self._wake()

    async def _heal(self) -> None:
        if self._swallower is not None:
            self._swallower.close()
            self._swallower = None
        if self._server is None:
            await self._listen()
        await self._apply(HEALTHY)

    async def _refuse(self) -> None:
        await self._stop_listening()
        await self._reset_all()

    async def _reset_all(self) -> None:
        for link in list(self._links):
            link.reset()

    async def _strand(self) -> None:
        for link in self._links:
            link.is_stranded = True
        self._wake()

    async def _drop_syns(self) -> None:
        await self._stop_listening()
        await self._apply(BLACK_HOLE)
        self._swallower = _SynSwallower(self._port)

    async def _close(self) -> None:
        await self._stop_listening()
        await self._reset_all()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _wake(self) -> None:
        """Lets whoever waits for the fault to change look at it again."""
        self._healed.set()
        self._healed = asyncio.Event()

    @property
    def fault(self) -> Fault:
        """The fault in force."""
        return self._fault

    async def changed(self) -> None:
        """Waits until the fault changes."""
        await self._healed.wait()


class _Link:
    """One client connection and its connection to the server."""

    def __init__(self, proxy: TcpProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._upstream: asyncio.StreamWriter | None = None
        self.replied = 0
        """Bytes of replies passed since the fault in force was set."""
        self.is_stranded = False

    @property
    def _fault(self) -> Fault:
        return BLACK_HOLE if self.is_stranded else self._proxy.fault

    async def run(self, target: tuple[str, int]) -> None:
        try:
            reader, self._upstream = await asyncio.open_connection(*target)
        except OSError:
            self.reset()
            return
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump_requests())
                pumps.create_task(self._pump_replies(reader))
        except* (OSError, _CutError):
            self.reset()
        finally:
            for writer in (self._writer, self._upstream):
                writer.close()

    def reset(self) -> None:
        """Ends both sides at once, with RST."""
        for writer in (self._writer, self._upstream):
            if writer is None or writer.transport.is_closing():
                continue
            opened = writer.get_extra_info("socket")
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _pump_requests(self) -> None:
        assert self._upstream is not None
        while data := await self._reader.read(_CHUNK_BYTES):
            while self._fault.hold_requests:
                await self._proxy.changed()
            self._upstream.write(data)
            await self._upstream.drain()
        await self._pass_end(self._upstream)

    async def _pump_replies(self, reader: asyncio.StreamReader) -> None:
        """Reads and writes in tasks of their own, so that a delay delays every byte but slows down none."""
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        async def read() -> None:
            while data := await reader.read(_CHUNK_BYTES):
                late.put_nowait((loop.time(), data))
            late.put_nowait((loop.time(), b""))

        reading = asyncio.create_task(read())
        try:
            while True:
                came, data = await late.get()
                await self._wait_for_latency(came)
                while self._fault.hold_replies:
                    await self._proxy.changed()
                if not data:
                    await reading
                    await self._pass_end(self._writer)
                    return
                await self._reply(data)
        finally:
            reading.cancel()

    async def _wait_for_latency(self, came: float) -> None:
        loop = asyncio.get_running_loop()
        while (left := came + self._fault.latency_seconds - loop.time()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._proxy.changed(), left)

    async def _reply(self, data: bytes) -> None:
        """Passes one piece of a reply on, or as much of it as the fault lets through.

        Raises:
            _CutError: The fault cut the connection.
        """
        fault = self._fault
        bounds = [bound for bound in (fault.reset_replies_after, fault.truncate_replies_after) if bound is not None]
        room = min(bounds) - self.replied if bounds else len(data)
        passed = data[: max(0, room)]
        self._writer.write(passed)
        await self._writer.drain()
        self.replied += len(passed)
        if len(passed) == len(data):
            return
        if fault.reset_replies_after is None:
            self._writer.close()
            await self._writer.wait_closed()
        raise _CutError

    async def _pass_end(self, writer: asyncio.StreamWriter) -> None:
        if delay := self._fault.close_delay_seconds:
            await asyncio.sleep(delay)
        if writer.can_write_eof() and not writer.transport.is_closing():
            writer.write_eof()


class _CutError(Exception):
    """The fault cut a connection."""


class _SynSwallower:
    """A listener that accepts nothing and whose queue is full."""

    def __init__(self, port: int) -> None:
        self._sockets = [socket.socket() for _ in range(1 + _SYN_FILLERS)]
        listener, *fillers = self._sockets
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen(0)
        for filler in fillers:
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect((LOOPBACK, port))

    def close(self) -> None:
        for opened in self._sockets:
            opened.close()
