"""What a watch writes to its caller: server-sent events, or the messages of a WebSocket.

Both carry the same: events as JSON, each with the place where to go on after it, and in the end why it ended. An
`Outlet` writes them and notices when they are not read. How they look on the wire is a `Framing`, of which there are
two.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import structlog
from google.rpc import code_pb2

from server.errors import DeadlineError, DrainingError, PretradeError, SlowReaderError
from server.http import problems
from server.http.asgi import CallerGoneError, Send
from server.rpc import status
from server.rpc.call import Call
from server.rpc.framing import Header

if TYPE_CHECKING:
    from server.rpc.events import Event

_log = structlog.get_logger(__name__)

Message = dict[str, Any]
"""Of ASGI."""

SUBPROTOCOL: Final = "pretrade.events.v1"
"""What a WebSocket speaks here."""
LAST_EVENT_ID: Final = b"last-event-id"
"""Header in which a reader of server-sent events says after which one to go on."""
_LAST_WORD_SECONDS: Final = 1.0
"""How long it may take to say why a watch ends."""
_RETRY_MS: Final = 1_000
"""How long a browser waits before it comes back. Without a word of ours it is some seconds."""
_NORMAL: Final = 1_000
_POLICY: Final = 1_008
_FAULT: Final = 1_011
_RESTARTS: Final = 1_012
_TRY_LATER: Final = 1_013
CLOSE_CODES: Final = {
    code_pb2.INVALID_ARGUMENT: _POLICY,
    code_pb2.UNAUTHENTICATED: _POLICY,
    code_pb2.PERMISSION_DENIED: _POLICY,
    code_pb2.RESOURCE_EXHAUSTED: _TRY_LATER,
    code_pb2.UNAVAILABLE: _TRY_LATER,
}
"""Codes that close a WebSocket, by gRPC code; `_FAULT` for the others.

Source: https://www.iana.org/assignments/websocket/websocket.xhtml#close-code-number."""


class Framing(Protocol):
    """How a watch looks on the wire, as messages of ASGI."""

    def opening(self) -> Iterable[Message]:
        """What tells the caller that the watch has begun."""
        ...

    def events(self, events: Sequence[Event]) -> Iterable[Message]:
        """Events that are there at once."""
        ...

    def beat(self) -> Iterable[Message]:
        """What shows a caller, and all that stands between, that the watch still goes on."""
        ...

    def ending(self, error: PretradeError) -> Iterable[Message]:
        """Why the watch ends."""
        ...


class EventStream:
    """Server-sent events.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html.

    Args:
        headers: Further ones of the answer.
    """

    def __init__(self, headers: Sequence[Header]) -> None:
        self._headers = headers

    def opening(self) -> Iterable[Message]:
        """The answer's head, and when to come back."""
        headers = [
            (b"content-type", b"text/event-stream"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx would keep events back until there are many
            *self._headers,
        ]
        yield {"type": "http.response.start", "status": 200, "headers": headers}
        yield _body(b"retry: %d\n\n" % _RETRY_MS)

    def events(self, events: Sequence[Event]) -> Iterable[Message]:
        """All of them in one piece."""
        yield _body(b"".join(b"id: %s\ndata: %s\n\n" % (one.cursor.encode(), one.text) for one in events))

    def beat(self) -> Iterable[Message]:
        """A comment."""
        yield _body(b":\n\n")

    def ending(self, error: PretradeError) -> Iterable[Message]:
        """The problem as an event of the type `error`."""
        yield _body(b"event: error\ndata: %s\n\n" % problems.refusal(error).body, more=False)


class WebSocket:
    """The messages of a WebSocket, all of them text.

    Args:
        subprotocol: What was agreed; None where the caller offered nothing.
    """

    def __init__(self, subprotocol: str | None) -> None:
        self._subprotocol = subprotocol

    def opening(self) -> Iterable[Message]:
        """Ends the handshake."""
        yield {"type": "websocket.accept", "subprotocol": self._subprotocol}

    def events(self, events: Sequence[Event]) -> Iterable[Message]:
        """A message for each."""
        return ({"type": "websocket.send", "text": one.text.decode()} for one in events)

    def beat(self) -> Iterable[Message]:
        """Nothing: uvicorn pings, and closes the connection where no pong comes."""
        return ()

    def ending(self, error: PretradeError) -> Iterable[Message]:
        """The problem as the last message, and a code."""
        text = b'{"error":%s}' % problems.refusal(error).body
        yield {"type": "websocket.send", "text": text.decode()}
        yield {"type": "websocket.close", "code": close_code(error), "reason": error.reason}


def close_code(error: PretradeError) -> int:
    """The code with which a WebSocket is closed because of an error."""
    if isinstance(error, DrainingError):
        return _RESTARTS
    if isinstance(error, DeadlineError):
        return _NORMAL  # as long as the caller wanted
    return CLOSE_CODES.get(status.code(error), _FAULT)


class Outlet:
    """Writes one watch to its caller.

    uvicorn takes one write more while less than 64 KiB wait for a caller that does not read, and then holds up the next
    one until 16 KiB are left. So a watch costs little memory, and a caller that reads nothing for `write_seconds` loses
    it, as there may be only so many.

    Args:
        name: Of what is watched, for the log.
        send: Takes messages of ASGI.
        framing: Makes them.
        write_seconds: How long a write may take.
        clock: Monotonic seconds.
    """

    def __init__(
        self, name: str, send: Send, framing: Framing, write_seconds: float, clock: Callable[[], float]
    ) -> None:
        self._name = name
        self._send = send
        self._framing = framing
        self._write_seconds = write_seconds
        self._clock = clock
        self._written = clock()
        self._opened = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether the watch has begun. Before, an error is the answer to the call."""
        return self._opened.is_set()

    async def open(self) -> None:
        """Tells the caller that the watch has begun."""
        self._opened.set()
        await self._write(self._framing.opening(), self._write_seconds)

    async def write(self, events: Sequence[Event]) -> None:
        """Writes events, and lets others have their turn.

        Raises:
            SlowReaderError: The caller does not read.
            CallerGoneError: The caller has gone.
        """
        await self._write(self._framing.events(events), self._write_seconds)
        await asyncio.sleep(0)  # a write that nothing holds up does not wait

    async def keep_alive(self, every_seconds: float, end: Callable[[SlowReaderError | CallerGoneError], None]) -> None:
        """Writes something whenever nothing was written for so long, until that fails: then it calls `end`."""
        await self._opened.wait()
        while True:
            silent = self._clock() - self._written
            if silent < every_seconds:
                await asyncio.sleep(every_seconds - silent)
                continue
            try:
                await self._write(self._framing.beat(), self._write_seconds)
            except (SlowReaderError, CallerGoneError) as error:
                end(error)
                return

    async def end(self, error: PretradeError) -> None:
        """Tells the caller why the watch ends, unless he does not read."""
        if not isinstance(error, SlowReaderError):
            with contextlib.suppress(SlowReaderError, CallerGoneError):
                await self._write(self._framing.ending(error), _LAST_WORD_SECONDS)

    async def _write(self, messages: Iterable[Message], seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                for message in messages:
                    await self._send(message)
        except TimeoutError:
            _log.warning("a watcher does not read", watch=self._name, seconds=seconds)
            raise SlowReaderError(seconds) from None
        except OSError:
            raise CallerGoneError from None
        self._written = self._clock()


class WatchCall(Call):
    """A call that watches, as the servicer sees it.

    Args:
        call: As it came.
        outlet: Where its events go.
    """

    __slots__ = ("_outlet",)

    def __init__(self, call: Call, outlet: Outlet) -> None:
        super().__init__(call.deadline, call.metadata, call.caller)
        self._outlet = outlet

    async def accept(self) -> None:
        """Tells the caller that the watch has begun."""
        await self._outlet.open()


def _body(piece: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": piece, "more_body": more}
