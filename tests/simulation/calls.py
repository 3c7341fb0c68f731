"""gRPC calls in memory, and the two edges that serve them: grpc.aio's server and Envoy with the application inside.

`Call` is one call from end to end, with a latency each way, a deadline on both ends, and a reader who may not read. It
knows the truth that audit and caller are compared with: which bytes were *handed* to the transport, and when.

`GrpcServer` does what grpc.aio does around a handler, `Envoy` what Envoy and `pyvoy` do around an ASGI application.

Source: `src/python/grpcio/grpc/_cython/_cygrpc/aio/server.pyx.pxi` of gRPC.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from server.rpc.framing import ARRIVED, PEER, framed
from simulation.network import Network

if TYPE_CHECKING:
    from simulation.machine import SimulatedMachine

_BUFFER_BYTES: Final = 65_536
"""What Envoy takes from the application while the caller does not read."""
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}
Metadata = Sequence[tuple[str, str | bytes]]


class Call:
    """One call.

    Args:
        network: The way there and back.
        client: The process that calls.
        listeners: Who may serve it.
        address: Whom it is for.
        path: `/service/method`.
        timeout: What it may take, in seconds; None for any time.
        metadata: What it brings along.
    """

    def __init__(
        self,
        network: Network,
        client: SimulatedMachine,
        listeners: Listeners,
        address: str,
        path: str,
        timeout: float | None,
        metadata: Metadata = (),
    ) -> None:
        self.world = network.world
        self.client = client
        self.address = address
        self.path = path
        self.timeout = timeout
        self.metadata = tuple(metadata)
        self._network = network
        self._listeners = listeners
        self._link = network.link(client.host.name, address.partition(":")[0])
        self._there = self._back = 0.0
        self.on_message: Callable[[bytes], None] = lambda message: None
        self.on_status: Callable[[grpc.StatusCode, str, Metadata], None] = lambda code, details, trailers: None
        self.server: _ServerEnd | None = None
        self.ended = False
        """On the client's end: it has a status, or gave up."""
        self.on_handed: Callable[[bytes], None] = lambda message: None
        """Called with every message that is handed to the transport, in the hub."""
        self.window: float = float("inf")
        """Bytes that the caller is willing to read."""
        self._blocked: deque[tuple[bytes, bool, Callable[[], None]]] = deque()
        self._status: tuple[grpc.StatusCode, str, Metadata] | None = None
        """How it ends, behind what waits."""
        if timeout is not None:
            self.world.after(timeout, self._out_of_time)
        client.on_death.append(self._client_died)
        self._go(lambda: listeners.accept(self))

    def _go(self, there: Callable[[], object]) -> None:
        """Something travels to the server, in order."""
        link = self._link
        self._there = max(self.world.now + self._network.latency(link), self._there, link.stuck_there_until)
        self.world.at(self._there, there)

    def _come(self, back: Callable[[], object]) -> None:
        """Something travels to the client, in order."""
        link = self._link
        self._back = max(self.world.now + self._network.latency(link), self._back, link.stuck_back_until)
        self.world.at(self._back, back)

    # The client's end. Its callbacks are called in the client's event loop.

    def send(self, message: bytes, *, last: bool = False) -> None:
        """Sends a message, and says whether it was the last."""
        self._go(lambda: self.server is not None and self.server.message(message))
        if last:
            self.half_close()

    def half_close(self) -> None:
        """Sends no more."""
        self._go(lambda: self.server is not None and self.server.half_closed())

    def cancel(self) -> None:
        """Gives up; the server hears of it."""
        if not self.ended:
            self._end(grpc.StatusCode.CANCELLED, "Locally cancelled by application!", ())
            self._go(self._cancelled_there)

    def read_more(self, window: float = float("inf")) -> None:
        """Is willing to read so many bytes more."""
        self.window += window
        self._flush()

    def _out_of_time(self) -> None:
        if not self.ended:
            self._end(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", ())
            self._go(self._cancelled_there)

    def _client_died(self) -> None:
        if not self.ended:
            self.ended = True
            self._go(self._cancelled_there)

    def _cancelled_there(self) -> None:
        self._blocked.clear()
        if self.server is not None:
            self.server.cancelled()

    def _end(self, code: grpc.StatusCode, details: str, trailers: Metadata) -> None:
        if not self.ended:
            self.ended = True
            self.client.loop.call_soon(self.on_status, code, details, trailers)

    def _hear(self, message: bytes) -> None:
        if not self.ended:
            self.client.loop.call_soon(self.on_message, message)

    # The server's end.

    def hand(self, message: bytes, sent: Callable[[], None] = lambda: None, *, buffered: bool = False) -> None:
        """Hands a message to the transport; it leaves as soon as the caller's window lets it pass.

        Args:
            message: The message.
            sent: Called when it leaves.
            buffered: Whether the transport takes it at once, to keep it until then. If not, it counts as handed over
                when it leaves.
        """
        if buffered:
            self.on_handed(message)
        self._blocked.append((message, buffered, sent))
        self._flush()

    def _flush(self) -> None:
        """Lets go what the window lets pass."""
        while self._blocked and len(self._blocked[0][0]) <= self.window:
            message, handed, sent = self._blocked.popleft()
            if not handed:
                self.on_handed(message)
            self.window -= len(message)
            self._come(functools.partial(self._hear, message))
            sent()
        if not self._blocked and self._status is not None:
            status, self._status = self._status, None
            self._come(functools.partial(self._end, *status))

    def finish(self, code: grpc.StatusCode, details: str = "", trailers: Metadata = ()) -> None:
        """Ends the call with a status, behind what was sent."""
        self._status = (code, details, trailers)
        self._flush()

    def broken(self) -> None:
        """The server's process is gone, and the connection with it."""
        self._blocked.clear()
        self._come(lambda: self._end(grpc.StatusCode.UNAVAILABLE, "connection reset by peer", ()))

    @property
    def buffered(self) -> int:
        """Bytes that wait for the caller to read."""
        return sum(len(message) for message, _, _ in self._blocked)


class _ServerEnd:
    """What a server makes of a call; called from the hub."""

    def message(self, message: bytes) -> object: ...
    def half_closed(self) -> object: ...
    def cancelled(self) -> object: ...


class Listeners:
    """Which server listens at which address, several processes at one address among them."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._chance = network.world.random("listeners")
        self._at: dict[str, list[Any]] = {}

    def server(self, machine: SimulatedMachine, **keywords: Any) -> Any:
        """What `grpc.aio.server` makes."""
        return GrpcServer(machine, self, keywords.get("interceptors") or ())

    def channel(self, machine: SimulatedMachine, endpoint: str) -> Any:
        """What `grpc.aio.insecure_channel` makes."""
        return Channel(self, machine, endpoint)

    def listen(self, address: str, server: Any) -> None:
        """Lets calls to an address reach a server, or one of several."""
        self._at.setdefault(address, []).append(server)

    def leave(self, server: Any) -> None:
        """Lets no further calls reach a server."""
        for servers in self._at.values():
            if server in servers:
                servers.remove(server)

    def accept(self, call: Call) -> None:
        """A call has arrived."""
        servers = self._at.get(call.address)
        if not servers:
            call.finish(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses")
            return
        (servers[0] if len(servers) == 1 else self._chance.choice(servers)).accept(call)


# grpc.aio


class _ExecuteBatchError(grpc.aio.InternalError):
    """An operation on a call that is over."""


class _HandlerCallDetails:
    def __init__(self, method: str, invocation_metadata: Metadata) -> None:
        self.method = method
        self.invocation_metadata = invocation_metadata


class GrpcServer:
    """A server on grpc.aio."""

    def __init__(self, machine: SimulatedMachine, listeners: Listeners, interceptors: Sequence[Any]) -> None:
        self.machine = machine
        self._listeners = listeners
        self._interceptors = tuple(interceptors)
        self._generic: list[Any] = []
        self._registered: dict[str, Any] = {}
        self._addresses: list[str] = []
        self._calls: dict[GrpcCall, None] = {}
        self._stopping = False
        self._empty = asyncio.Event()
        self._empty.set()
        machine.on_death.append(self._die)

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        self._generic.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        self._registered.update({f"/{service}/{name}": handler for name, handler in handlers.items()})

    def add_insecure_port(self, address: str) -> int:
        port = address.rpartition(":")[2]
        self._addresses.append(f"{self.machine.host.name}:{port}")
        return int(port) if port.isdecimal() else 1

    async def start(self) -> None:
        for address in self._addresses:
            self._listeners.listen(address, self)

    async def stop(self, grace: float | None) -> None:
        """No further calls; those under way get their time."""
        self._listeners.leave(self)
        self._stopping = True
        if self._calls and grace:
            try:
                async with asyncio.timeout(grace):
                    await self._empty.wait()
            except TimeoutError:
                pass
        for call in list(self._calls):
            call.cancelled()
            call.call.finish(grpc.StatusCode.UNAVAILABLE, "the server has stopped")
        await self._empty.wait()

    def accept(self, call: Call) -> None:
        """A call has arrived, from the hub."""
        served = GrpcCall(self, call)
        self._calls[served] = None
        self._empty.clear()
        self.machine.loop.call_soon(served.begin)

    def ended(self, call: GrpcCall) -> None:
        """A call's task has ended."""
        self._calls.pop(call, None)
        if not self._calls:
            self._empty.set()

    def _die(self) -> None:
        self._listeners.leave(self)
        for served in self._calls:
            served.call.broken()
        self._calls.clear()

    async def handler(self, details: _HandlerCallDetails) -> Any:
        """Asks the interceptors, and then those who registered methods."""

        async def ask(interceptors: Sequence[Any], details: Any) -> Any:
            if interceptors:
                return await interceptors[0].intercept_service(functools.partial(ask, interceptors[1:]), details)
            if (found := self._registered.get(details.method)) is not None:
                return found
            return next((found for one in self._generic if (found := one.service(details)) is not None), None)

        return await ask(self._interceptors, details)


class GrpcCall(_ServerEnd):
    """A call as grpc.aio serves it."""

    def __init__(self, server: GrpcServer, call: Call) -> None:
        self.call = call
        self._server = server
        self._machine = server.machine
        self._inbox: deque[bytes] = deque()
        self._no_more = False
        self._reader: asyncio.Future[bytes | None] | None = None
        self._senders: dict[asyncio.Future[None], None] = {}
        self.over = False
        """The transport knows that the call was cancelled, or that its time is up."""
        self._task: asyncio.Task[None] | None = None
        self.metadata: Metadata = tuple(call.metadata)
        self.deadline_wall: float | None = None
        self._given_up = False
        """By its caller, before its time was up."""
        if call.timeout is not None:
            self.deadline_wall = self._machine.host.wall_clock_ns() / 1e9 + call.timeout
            call.world.after(call.timeout, self._end)
        self.status_sent = self.metadata_sent = False
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.trailers: Metadata = ()
        self.abort_error: BaseException | None = None
        self.callbacks: list[Callable[[], object]] = []
        call.server = self

    # What the transport learns, in the hub.

    def message(self, message: bytes) -> None:
        self._inbox.append(message)
        self._wake_reader()

    def half_closed(self) -> None:
        self._no_more = True
        self._wake_reader()

    def cancelled(self) -> None:
        self._given_up = self._given_up or not self.over
        self._end()

    def _end(self) -> None:
        if self.over:
            return
        self.over = True
        self._wake_reader()
        for sender in self._senders:
            self._machine.loop.call_soon(_fail, sender)
        self._senders.clear()
        self._machine.loop.call_soon(self._cancel_task)

    def _cancel_task(self) -> None:
        if self._task is not None and not self._task.done() and not self.status_sent:
            self._task.cancel()

    def _wake_reader(self) -> None:
        reader = self._reader
        if reader is not None and (self._inbox or self._no_more or self.over):
            self._reader = None
            self._machine.loop.call_soon(self._read_into, reader)

    def _read_into(self, reader: asyncio.Future[bytes | None]) -> None:
        if not reader.done():
            reader.set_result(self._inbox.popleft() if self._inbox else None)

    # What the server does, in its event loop.

    def begin(self) -> None:
        self._task = self._machine.loop.create_task(self._serve(), name="rpc")
        self._task.add_done_callback(self._done)

    def _done(self, _task: object) -> None:
        self._server.ended(self)
        for callback in self.callbacks:
            callback()

    async def _serve(self) -> None:
        try:
            await self._handle()
        except (grpc.aio.AbortError, asyncio.CancelledError, _ExecuteBatchError):
            return
        except Exception as error:
            self._machine.loop.problems.append(f"unexpected {error!r} in {self.call.path}")
            if not self.status_sent:
                self.status_sent = True
                await self._send_status(grpc.StatusCode.UNKNOWN, f"Unexpected {type(error)}: {error}", ())

    async def _handle(self) -> None:
        handler = await self._server.handler(_HandlerCallDetails(self.call.path, self.metadata))
        if handler is None:
            self.status_sent = True
            await self._send_status(grpc.StatusCode.UNIMPLEMENTED, "Method not found!", ())
            return
        context = Context(self, handler)
        if handler.response_streaming:
            behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
        else:
            behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
        if handler.request_streaming:
            request: Any = _Requests(context)
        else:
            raw = await self.receive()
            if raw is None:
                return
            request = handler.request_deserializer(raw) if handler.request_deserializer else raw
        if not handler.response_streaming:
            response = await behaviour(request, context)
            self.check()
            wire = handler.response_serializer(response) if handler.response_serializer else response
            self.metadata_sent = self.status_sent = True
            await self.send(wire, finishing=True)
            return
        if asyncio.iscoroutinefunction(behaviour):
            await behaviour(request, context)
        else:
            async for response in behaviour(request, context):
                self.check()
                await context.write(response)
        self.check()
        self.status_sent = True
        await self._send_status(self.code or grpc.StatusCode.OK, self.details, self.trailers)

    def check(self) -> None:
        """Raises when the handler has ended the call already."""
        if self.abort_error is not None:
            raise self.abort_error
        if self.status_sent:
            raise grpc.aio.UsageError("RPC already finished.")

    async def receive(self) -> bytes | None:
        """The next message; None when there is none."""
        if self._inbox or self._no_more or self.over:
            await asyncio.sleep(0)
            return self._inbox.popleft() if self._inbox and not self.over else None
        self._reader = self._machine.loop.create_future()
        return await self._reader

    async def send(self, message: bytes, *, finishing: bool = False) -> None:
        """Sends a message; returns when the transport has it.

        The library takes the last message of a call that its caller has given up, and drops it: until the handler hears
        of that, a moment later, it has no way to tell. Such a message counts as handed over. That the time is up the
        handler can see by itself.
        """
        if self.over:
            if finishing and self._given_up:
                self.call.on_handed(message)
            await asyncio.sleep(0)
            raise _ExecuteBatchError("the call is over")
        done = self._machine.loop.create_future()
        self._senders[done] = None

        def sent() -> None:
            self._senders.pop(done, None)
            self._machine.loop.call_soon(_resolve, done)
            if finishing:
                self.call.finish(self.code or grpc.StatusCode.OK, self.details, self.trailers)

        self.call.hand(message, sent)
        await done

    async def _send_status(self, code: grpc.StatusCode, details: str, trailers: Metadata) -> None:
        await asyncio.sleep(0)
        if self.over:
            raise _ExecuteBatchError("the call is over")
        self.call.finish(code, details, trailers)

    async def abort(self, code: grpc.StatusCode, details: str, trailers: Metadata) -> None:
        """Ends the call with a status, and the handler with an error."""
        self.abort_error = grpc.aio.AbortError("Locally aborted.")
        self.code, self.details = code, details
        self.status_sent = True
        await self._send_status(code, details, trailers or self.trailers)
        raise self.abort_error


class Context:
    """`grpc.aio.ServicerContext`, as far as handlers use it."""

    def __init__(self, served: GrpcCall, handler: Any) -> None:
        self._served = served
        self._handler = handler

    async def read(self) -> Any:
        self._served.check()
        raw = await self._served.receive()
        self._served.check()
        if raw is None:
            return grpc.aio.EOF
        return self._handler.request_deserializer(raw) if self._handler.request_deserializer else raw

    async def write(self, message: Any) -> None:
        self._served.check()
        serialize = self._handler.response_serializer
        await self._served.send(serialize(message) if serialize else message)
        self._served.metadata_sent = True

    async def send_initial_metadata(self, _metadata: Metadata) -> None:
        self._served.metadata_sent = True

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> None:
        await self._served.abort(code, details, trailing_metadata)

    async def abort_with_status(self, status: Any) -> None:
        await self._served.abort(status.code, status.details, status.trailing_metadata)

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        self._served.trailers = tuple(metadata)

    def trailing_metadata(self) -> Metadata:
        return self._served.trailers

    def invocation_metadata(self) -> Metadata:
        return self._served.metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self._served.code = code

    def code(self) -> grpc.StatusCode | None:
        return self._served.code

    def set_details(self, details: str) -> None:
        self._served.details = details

    def details(self) -> str:
        return self._served.details

    def peer(self) -> str:
        return f"ipv4:{self._served.call.client.name}:1"

    def peer_identities(self) -> None:
        return None

    def peer_identity_key(self) -> None:
        return None

    def auth_context(self) -> dict[str, Any]:
        return {}

    def time_remaining(self) -> float | None:
        served = self._served
        if served.deadline_wall is None:
            return None
        return max(0.0, served.deadline_wall - served._machine.host.wall_clock_ns() / 1e9)

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        self._served.callbacks.append(functools.partial(callback, self))

    def done(self) -> bool:
        return self._served.status_sent

    def cancelled(self) -> bool:
        return self._served.code is grpc.StatusCode.CANCELLED


class _Requests:
    """The requests of a stream."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        message = await self._context.read()
        if message is grpc.aio.EOF:
            raise StopAsyncIteration
        return message


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _fail(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_exception(_ExecuteBatchError("the call is over"))


# Envoy


class Envoy:
    """Envoy with the application in its process: what `server.envoy.edge.EnvoyEdge` is to the composition root."""

    def __init__(self, machine: SimulatedMachine, listeners: Listeners, port: int) -> None:
        self.machine = machine
        self._listeners = listeners
        self._address = f"{machine.host.name}:{port}"
        self._application: Any = None
        self._calls: dict[EnvoyCall, None] = {}
        machine.on_death.append(self._die)

    def serve(self, application: Any) -> None:
        """Hands calls to the application from now on."""
        self._application = application
        self._listeners.listen(self._address, self)

    def publish(self, _material: object) -> None:
        """Nothing: calls here have no TLS."""

    async def watch_gate(self, _admission: object, _metrics: object) -> None:
        """Nothing is refused here."""
        await asyncio.Event().wait()

    async def steer_gate(self, _settings: object, _admission: object) -> None:
        """There is no gate here."""
        await asyncio.Event().wait()

    async def refuse(self, grace_seconds: float) -> None:
        """As `EnvoyEdge.refuse`."""
        self._listeners.leave(self)
        loop = self.machine.loop
        until = loop.time() + grace_seconds
        while loop.time() < until and self._application.in_flight:  # noqa: ASYNC110 - as the original does
            await asyncio.sleep(0.01)
        self._application.end_all()

    def accept(self, call: Call) -> None:
        """A call has arrived, from the hub."""
        served = EnvoyCall(self, call)
        self._calls[served] = None
        self.machine.loop.call_soon(served.begin, self._application)

    def ended(self, call: EnvoyCall) -> None:
        """The application has returned."""
        self._calls.pop(call, None)

    def _die(self) -> None:
        self._listeners.leave(self)
        for served in self._calls:
            served.call.broken()
        self._calls.clear()


class EnvoyCall(_ServerEnd):
    """A call as Envoy hands it to the application."""

    def __init__(self, envoy: Envoy, call: Call) -> None:
        self.call = call
        self._envoy = envoy
        self._machine = envoy.machine
        self._body = bytearray()
        self._no_more = False
        self.over = False
        self._receiver: asyncio.Future[None] | None = None
        self._sender: asyncio.Future[None] | None = None
        self._arrived = self._machine.host.wall_clock_ns() / 1e9
        self._buffer = bytearray()
        call.server = self

    # What Envoy learns, in the hub.

    def message(self, message: bytes) -> None:
        self._body += framed(message)
        self._wake()

    def half_closed(self) -> None:
        self._no_more = True
        self._wake()

    def cancelled(self) -> None:
        self.over = True
        self._wake()
        sender, self._sender = self._sender, None
        if sender is not None:
            self._machine.loop.call_soon(_resolve, sender)

    def _wake(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            self._machine.loop.call_soon(_resolve, receiver)

    # What the application is given, in its event loop.

    def begin(self, application: Any) -> None:
        call = self.call
        headers = [
            (b":path", call.path.encode()),
            (b"content-type", b"application/grpc"),
            (ARRIVED, b"%.6f" % self._arrived),
            (PEER, call.client.name.encode()),
        ]
        if call.timeout is not None:
            headers.append((b"grpc-timeout", b"%du" % max(1, int(call.timeout * 1e6))))
        headers += [
            (name.encode(), value if isinstance(value, bytes) else value.encode()) for name, value in call.metadata
        ]
        scope = {"type": "http", "path": call.path, "headers": headers}
        task = self._machine.loop.create_task(application(scope, self._receive, self._send), name="asgi")
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._envoy.ended(self)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._machine.loop.problems.append(f"unexpected {error!r} in {self.call.path}")

    async def _receive(self) -> dict[str, Any]:
        while not (self._body or self._no_more or self.over):
            self._receiver = self._machine.loop.create_future()
            await self._receiver
        if self._said_all and not self._body:  # only a disconnect is left to hear of
            while not self.over:
                self._receiver = self._machine.loop.create_future()
                await self._receiver
        if self.over:
            return {"type": "http.disconnect"}
        body, self._body = bytes(self._body), bytearray()
        self._said_all = self._no_more
        return {"type": "http.request", "body": body, "more_body": not self._no_more}

    _said_all = False

    async def _send(self, message: dict[str, Any]) -> None:
        if self.over:
            raise ConnectionResetError("the client has disconnected")
        kind = message["type"]
        if kind == "http.response.start":
            self._trailers = dict(message["headers"])
            return
        if kind == "http.response.trailers":
            self._finish({**self._trailers, **dict(message["headers"])})
            return
        self._buffer += message["body"]
        while len(self._buffer) >= 5 and len(self._buffer) >= 5 + (size := int.from_bytes(self._buffer[1:5], "big")):
            frame = bytes(self._buffer[5 : 5 + size])
            del self._buffer[: 5 + size]
            self.call.hand(frame, buffered=True)
        if not message.get("more_body") and b"grpc-status" in self._trailers:
            self._finish(self._trailers)
        while self.call.buffered > _BUFFER_BYTES and not self.over:  # noqa: ASYNC110 - virtual time costs nothing
            await asyncio.sleep(0.001)

    _trailers: dict[bytes, bytes]

    def _finish(self, headers: Mapping[bytes, bytes]) -> None:
        code = _CODES[int(headers.get(b"grpc-status", b"2"))]
        trailers = [(name.decode(), value.decode()) for name, value in headers.items()]
        self.call.finish(code, headers.get(b"grpc-message", b"").decode(), trailers)


# The calling side, for generated stubs


class Channel:
    """`grpc.aio.Channel`, as far as stubs and codecs use it."""

    def __init__(self, listeners: Listeners, machine: SimulatedMachine, endpoint: str) -> None:
        self._listeners = listeners
        self._machine = machine
        self._endpoint = endpoint

    def unary_unary(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: object
    ) -> Any:
        """A method with one request and one answer."""

        async def ask(request: Any, timeout: float | None = None, metadata: Metadata | None = None) -> Any:  # noqa: ASYNC109
            wire = request_serializer(request) if request_serializer else request
            call = Call(
                self._listeners.network, self._machine, self._listeners, self._endpoint, method, timeout, metadata or ()
            )
            answer: asyncio.Future[bytes] = self._machine.loop.create_future()
            found: list[bytes] = []
            call.on_message = found.append

            def ended(code: grpc.StatusCode, details: str, trailers: Metadata) -> None:
                if answer.done():
                    return
                if code is grpc.StatusCode.OK and found:
                    answer.set_result(found[0])
                else:
                    pairs = tuple((str(name), value) for name, value in trailers)
                    answer.set_exception(
                        grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*pairs), details)
                    )

            call.on_status = ended
            call.send(wire, last=True)
            try:
                raw = await answer
            except asyncio.CancelledError:
                call.cancel()
                raise
            return response_deserializer(raw) if response_deserializer else raw

        return ask

    def unary_stream(self, *_: object, **__: object) -> None:
        """Not needed by any codec."""

    stream_stream = stream_unary = unary_stream

    async def close(self, grace: float | None = None) -> None:
        """Nothing is kept open."""

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
