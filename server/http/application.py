"""JSON over HTTP: the methods of the services, and a few pages. Plain ASGI, which both edges mount.

On the Envoy edge the application answers what comes to the decision port and is not gRPC. On both edges it answers the
HTTP port (`server/http/port.py`). The steps of a call are those of a call over gRPC::

    path → origin → deadline → who calls → request → the servicer's method → the answer, or a problem

A framework would bring nothing to this: the paths are a table, and each method needs the call as the servicers know it,
with its deadline, its caller and what became of its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from server.errors import (
    DeadlineError,
    HttpMethodError,
    InvalidOrderError,
    MessageTooLargeError,
    OriginError,
    PretradeError,
    UnknownMethodError,
)
from server.http import problems, query, transcoding
from server.http.asgi import (
    AsgiCall,
    CallerGoneError,
    Delivery,
    Lateness,
    Scope,
    Send,
    attempt_of,
    deadline_passed,
    failed,
    header,
)
from server.http.events import LAST_EVENT_ID, SUBPROTOCOL, EventStream, Framing, Outlet, WatchCall, WebSocket
from server.http.methods import PATHS, Method, Path
from server.rpc.framing import Header, call_headers, decompressed

if TYPE_CHECKING:
    from server.decision.metrics import DecisionMetrics
    from server.security.access import AccessControl

JSON: Final = b"application/json"


class Reply(NamedTuple):
    """An answer that is no message of the contract."""

    body: bytes
    content_type: bytes = JSON
    http_status: int = 200
    headers: tuple[Header, ...] = ()


class Question(NamedTuple):
    """What a page is asked."""

    scope: Scope
    call: AsgiCall


@dataclass(frozen=True, slots=True)
class Page:
    """A path that is no method of the contract.

    Attributes:
        answer: Answers a GET.
        as_method: The method whose role its callers need; empty for everybody's.
    """

    answer: Callable[[Question], Awaitable[Reply]]
    as_method: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may take."""

    max_message_bytes: int
    """Largest request."""
    read_seconds: float
    """How long its body may take to come."""
    cors_origins: frozenset[str] = frozenset()
    """The origins whose web pages may call."""
    write_seconds: float = 20.0
    """How long a write may wait for a watcher to read 48 KiB. Slower than 3 KiB/s is no reading."""
    beat_seconds: float = 15.0
    """How long a watch may be silent. Proxies end what is silent for 30 to 60 s."""


@dataclass(slots=True)
class _Answer:
    """Where the answer to a call goes."""

    send: Send
    headers: list[Header] = field(default_factory=list)
    """What every answer has besides its own."""
    outlet: Outlet | None = None
    """Where the events go, where there are some."""


class HttpApplication:
    """Answers the calls of one port that are not gRPC.

    Args:
        methods: By path.
        pages: By path.
        accesses: Asked about every call, by `/package.Service`, of which all are named: None where callers need no
            credentials.
        limits: Of a call.
        lateness: Knows the callers' deadlines.
        delivery: Told what became of every answer.
        metrics: Counts the calls that end with an error, by reason.
    """

    def __init__(
        self,
        methods: Iterable[tuple[Path, Method]],
        pages: Mapping[str, Page],
        accesses: Mapping[str, AccessControl | None],
        limits: Limits,
        lateness: Lateness,
        delivery: Delivery,
        metrics: DecisionMetrics,
    ) -> None:
        self._routes: dict[str, tuple[str, Method | Page]] = {path: ("GET", page) for path, page in pages.items()}
        self._branches: dict[str, tuple[str, str]] = {}
        """The paths of which the last part is a field of the request, by what stands before it: path and field."""
        for (verb, path, last), method in methods:
            self._routes[path] = verb, method
            if last:
                self._branches[path.rpartition("/")[0]] = path, last
        self._accesses = accesses
        self._limits = limits
        self._lateness = lateness
        self._delivery = delivery
        self._metrics = metrics

    async def serve(self, call: AsgiCall, scope: Scope, send: Send) -> None:
        """Answers a call."""
        answer = _Answer(send)
        try:
            await self._serve(call, scope, answer)
        except PretradeError as error:
            await self._refuse(answer, error)
        except CallerGoneError:
            pass
        except asyncio.CancelledError:
            if call.ended is None:
                raise  # not by us
            if isinstance(call.ended, PretradeError):
                await self._refuse(answer, call.ended)
        except Exception as error:
            await self._refuse(answer, failed(scope["path"], error))

    async def _serve(self, call: AsgiCall, scope: Scope, answer: _Answer) -> None:
        """Answers a call; raises what it ends with instead."""
        answer.headers += self._origin(scope)
        if scope["method"] == "OPTIONS":
            await self._describe(scope, answer)
            return
        route = self._route(scope)
        timeout, _, arrived = call_headers(scope["headers"])
        await self._lateness.set_deadline(call, timeout, arrived)
        with _ended_in_time(call):
            await self._admit(call, scope, route)
            if isinstance(route, Page):
                await self._show(call, scope, answer, route)
            elif _is_watched(route, scope):
                await self._watch(call, scope, answer, route)
            else:
                await self._answer(call, scope, answer, route)

    def _route(self, scope: Scope) -> Method | Page:
        """What a path leads to."""
        verb, route = self._found(scope["path"])
        is_watch = isinstance(route, Method) and route.watch is not None and verb == "GET"
        if scope["type"] == "websocket" and not is_watch:
            raise UnknownMethodError("no events are at this path; docs/http.md says where there are some")
        if scope["method"] != verb and ((scope["method"], verb) != ("HEAD", "GET") or is_watch):
            raise HttpMethodError(scope["method"], (verb,))
        return route

    def _found(self, path: str) -> tuple[str, Method | Page]:
        branch, _ = self._branches.get(path.rpartition("/")[0], ("", ""))
        found = self._routes.get(path) or self._routes.get(branch)
        if found is None:
            raise UnknownMethodError("nothing is at this path of this port; docs/http.md says what is where")
        return found

    def _origin(self, scope: Scope) -> list[Header]:
        """The headers that let a web page read the answer.

        A browser sends the page's origin. Pages of other sites may not call: also on loopback, where everybody's
        browser is, and also where they could not read the answer.

        Raises:
            OriginError: The page is of a site that was not allowed.
        """
        origin = header(scope["headers"], b"origin").decode("latin-1")
        if not origin:
            return []
        if origin in self._limits.cors_origins:
            return [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin")]
        if origin.partition("://")[2] != header(scope["headers"], b"host").decode("latin-1"):
            raise OriginError
        return []

    async def _describe(self, scope: Scope, answer: _Answer) -> None:
        """Says what a path allows: to a browser, before the call that a page of an allowed site wants to make."""
        verb, _ = self._found(scope["path"])
        headers = [(b"allow", f"{verb}, OPTIONS".encode())]
        if answer.headers:
            headers += [
                (b"access-control-allow-methods", verb.encode()),
                (
                    b"access-control-allow-headers",
                    b"authorization, content-type, grpc-timeout, last-event-id, "
                    b"pretrade-reduce-only, traceparent, tracestate, x-correlation-id",
                ),
                (b"access-control-max-age", b"600"),
            ]
        await _send(answer, 204, headers, b"")

    async def _admit(self, call: AsgiCall, scope: Scope, route: Method | Page) -> None:
        """Asks whether a call may pass, before anything of it but its headers is read."""
        name = route.as_method if isinstance(route, Page) else route.name
        access = self._accesses[name.rpartition("/")[0]] if name else None
        if access is not None:
            call.caller = await access.admit(attempt_of(name, scope["headers"]))

    async def _show(self, call: AsgiCall, scope: Scope, answer: _Answer, page: Page) -> None:
        """Answers with a page."""
        reply = await page.answer(Question(scope, call))
        body = b"" if scope["method"] == "HEAD" else reply.body
        await _send(answer, reply.http_status, [(b"content-type", reply.content_type), *reply.headers], body)

    async def _watch(self, call: AsgiCall, scope: Scope, answer: _Answer, method: Method) -> None:
        """Answers with the events of a method, until its caller has gone or may not watch any more."""
        assert method.watch is not None
        call.is_unary = False
        if scope["type"] == "http":
            # Nothing follows a watch, nor what refuses it: the port closes the connection a little later.
            answer.headers.append((b"connection", b"close"))
            await self._body(call, b"")  # it means nothing, and whoever still sends would not be seen to go
            framing: Framing = EventStream(answer.headers)
        else:
            framing = WebSocket(SUBPROTOCOL if SUBPROTOCOL in scope["subprotocols"] else None)
        wanted = await transcoding.request_of(json.dumps(self._asked(scope, method)).encode(), method.request)
        outlet = answer.outlet = Outlet(
            method.name, answer.send, framing, self._limits.write_seconds, asyncio.get_running_loop().time
        )
        alive = asyncio.create_task(outlet.keep_alive(self._limits.beat_seconds, call.end), name="watch")
        try:
            with self._watched(call, method):
                async with contextlib.aclosing(method.watch(wanted, WatchCall(call, outlet))) as watch:
                    async for events in watch:
                        await outlet.write(events)
        finally:
            alive.cancel()

    def _watched(self, call: AsgiCall, method: Method) -> contextlib.AbstractContextManager[None]:
        """Ends a watch whose caller would not be let in any more."""
        access = self._accesses[method.name.rpartition("/")[0]]
        return contextlib.nullcontext() if access is None else access.watched(call.caller, call.end)

    async def _answer(self, call: AsgiCall, scope: Scope, answer: _Answer, method: Method) -> None:
        """Answers with what a method answers."""
        if method.answer is None:
            others = " or ".join(f"{path.verb} {path.path}" for path in PATHS.get(method.name, ()))
            raise InvalidOrderError(
                "STREAM_IN_JSON", f"{method.name[1:]} is a stream: call it by gRPC{others and f', or {others}'}"
            )
        if scope["query_string"] and scope["method"] == "POST":
            raise InvalidOrderError("QUERY_STRING", "a request has no query: its fields belong into its body")
        body = await self._body(call, header(scope["headers"], b"content-encoding"))
        call.is_watched = True
        if scope["method"] != "POST":
            body = json.dumps(self._asked(scope, method)).encode()
        request: Any = await transcoding.request_of(body, method.request)
        made = await method.answer(request.SerializeToString() if method.takes_bytes else request, call)
        try:
            wire = made if method.serialize is None else method.serialize(made)
            text = await transcoding.answer_of(method.response.FromString(wire))
        except BaseException:
            self._delivery.not_sent(made)
            raise
        call.is_watched = False
        try:
            await _send(answer, 200, [(b"content-type", JSON)], b"" if scope["method"] == "HEAD" else text)
        except (OSError, asyncio.CancelledError):
            self._delivery.not_sent(made)
            raise CallerGoneError from None
        self._delivery.sent(made)

    def _asked(self, scope: Scope, method: Method) -> dict[str, Any]:
        """The request that path, query and headers of a GET stand for; a body means nothing there."""
        kind: Any = method.request.DESCRIPTOR
        document = query.document_of(scope["query_string"], kind)
        before, _, last = scope["path"].rpartition("/")
        if scope["path"] not in self._routes and before in self._branches:
            _, field = self._branches[before]
            document[field] = [last] if kind.fields_by_name[field].is_repeated else last
        if method.watch is not None and (seen := header(scope["headers"], LAST_EVENT_ID)):
            # A browser that comes back asks for the same URL again, with the cursor that the watch began at.
            document["cursor"] = seen.decode("latin-1")
        return document

    async def _body(self, call: AsgiCall, encoding: bytes) -> bytes:
        """A request's body to its end, decompressed."""
        try:
            async with asyncio.timeout(self._limits.read_seconds):
                body = await self._whole(call)
        except TimeoutError:
            raise DeadlineError("REQUEST_TOO_SLOW", "the request's message did not arrive in time") from None
        if encoding in (b"", b"identity"):
            return body
        plain = decompressed(body, encoding, self._limits.max_message_bytes)
        self._check_size(len(plain))
        return plain

    async def _whole(self, call: AsgiCall) -> bytes:
        body, more = bytearray(), True
        while more:
            message = await call.receive()
            if message["type"] == "http.disconnect":
                raise CallerGoneError
            body += message.get("body", b"")
            more = message.get("more_body", False)
            self._check_size(len(body))
        return bytes(body)

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_message_bytes:
            raise MessageTooLargeError(size, self._limits.max_message_bytes)

    async def _refuse(self, answer: _Answer, error: PretradeError) -> None:
        """Ends a call with an error."""
        self._metrics.errors[error.reason] += 1
        if answer.outlet is not None and answer.outlet.is_open:
            await answer.outlet.end(error)
            return
        refusal = problems.refusal(error)
        with contextlib.suppress(OSError):
            await _send(answer, refusal.http_status, refusal.headers, refusal.body)


@contextlib.contextmanager
def _ended_in_time(call: AsgiCall) -> Iterator[None]:
    """Ends a call at its deadline, where it has one."""
    if call.deadline is None:
        yield
        return
    timer = asyncio.get_running_loop().call_at(call.deadline, call.end, deadline_passed())
    try:
        yield
    finally:
        timer.cancel()


def _is_watched(method: Method, scope: Scope) -> bool:
    """Whether a call is for the events of a method, and not for its only answer."""
    return method.watch is not None and scope["method"] == "GET"


async def _send(answer: _Answer, http_status: int, headers: list[Header], body: bytes) -> None:
    """Sends all of an answer."""
    headers = [*headers, *answer.headers]
    if http_status != HTTPStatus.NO_CONTENT:
        headers.append((b"content-length", str(len(body)).encode()))
    await answer.send({"type": "http.response.start", "status": http_status, "headers": headers})
    await answer.send({"type": "http.response.body", "body": body, "more_body": False})
