"""`DecisionService`, on both edges alike: it converts, raises and decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, Final, TypeAlias

import grpc
import grpc.aio

from fallback.order import Order
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.explaining import Explaining
from server.decision.convert import OrderReader
from server.decision.decided_block import OneDecided
from server.decision.decision_wire import RESULTS
from server.decision.metrics import DecisionMetrics
from server.decision.plane import DataPlane, Deciding
from server.decision.reports import DecisionReports
from server.errors import DeadlineError, InvalidOrderError, PretradeError
from server.journal.protowire import prefixed, template
from server.rpc.batch import BATCH_SLICE, Batches, Results
from server.rpc.call import Call
from server.rpc.call_context import REDUCE_ONLY, CallContexts, said_by
from server.rpc.orders import Asked, Orders, Reply, earlier, own_seconds
from server.rpc.stream import Streams, StreamSettings
from server.security.orders import OrderAccess

SERVICE: Final = pb.DESCRIPTOR.services_by_name["DecisionService"].full_name
MAX_BATCH = 1_024
"""Orders in one `DecideBatch`."""

_MOST_TOGETHER: Final = 64
"""Results of a stream that are handed to Envoy at once: each hand-over costs as much as half a decision."""
_wire: Final[Callable[[Reply], bytes]] = attrgetter("wire")
_DECIDED: Final = template(pb.DecideResponse.DESCRIPTOR, "decision")
_EXPLANATION: Final = template(pb.DecideResponse.DESCRIPTOR, "explanation")


Plain: TypeAlias = tuple[Order, Deciding]
"""The plain order of a unary call, and its decision to come."""


def _wires(replies: Sequence[Reply]) -> list[bytes]:
    return [reply.wire for reply in replies]


class DecisionServicer:
    """Serves the contract. Its answers are already serialised, because the bytes of a decision are written only once.

    It reports every decision as heard or as unheard. A decision is heard when the transport has taken the bytes of its
    reply in time. Of a unary reply the edge says when that is so; on a stream the transport asks for the next answer. A
    decision is unheard when the deadline has passed before that, or when the call ends without it. Of a few unary
    replies on grpc.aio, those whose deadline passed while they were written, nobody knows.

    Args:
        dataplane: Decides.
        orders: Reads and checks orders.
        metrics: Counts the orders of batches and streams that got no decision; other errors are the edges' to count.
        stream_settings: Bounds of a stream.
        clock: Monotonic seconds.
        access: Checks for every order that its caller may ask about it.
    """

    def __init__(
        self,
        dataplane: DataPlane,
        orders: OrderReader,
        metrics: DecisionMetrics,
        stream_settings: StreamSettings,
        contexts: CallContexts,
        reports: DecisionReports,
        explaining: Explaining,
        clock: Callable[[], float],
        access: OrderAccess,
    ) -> None:
        self._dataplane = dataplane
        self._reader = orders
        self._orders = Orders(dataplane, orders, metrics, contexts, reports, clock, access)
        self._batches = Batches(dataplane, self._orders, clock)
        self._streams = Streams(dataplane, self._orders, stream_settings, clock)
        self._explaining = explaining
        self._clock = clock

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serves the methods of the contract on a grpc.aio server, whose edge says what became of unary replies."""
        self._add_to(server, self.DecideStream, _wire)

    def add_to_application(self, application: grpc.aio.Server) -> None:
        """Serves them in Envoy, by an application that says what became of unary replies."""
        self._add_to(application, self._decide_stream, _wires)

    def _add_to(
        self,
        server: grpc.aio.Server,
        decide_stream: Callable[[AsyncIterator[Asked], Call], AsyncIterator[Any]],
        serialize_streamed: Callable[[Any], Any],
    ) -> None:
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Decide": grpc.unary_unary_rpc_method_handler(self.Decide, self._reader.request, _wire),
            "DecideBatch": grpc.unary_unary_rpc_method_handler(self.DecideBatch, self._reader.batch, _wire),
            "DecideStream": grpc.stream_stream_rpc_method_handler(
                decide_stream, self._reader.streamed, serialize_streamed
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        server.add_registered_method_handlers(SERVICE, handlers)

    def sent(self, answer: object) -> None:
        """The transport has all of an answer."""
        if isinstance(answer, Reply):  # else it is of a service that decides nothing
            self._dataplane.heard(answer.decisions)

    def heard(self, decisions: Sequence[OneDecided]) -> None:
        """The transport has all of the answers that these decisions are."""
        self._dataplane.heard(decisions)

    def unheard(self, decided: OneDecided) -> None:
        """The caller did not wait for the answer that a decision is."""
        self._dataplane.unheard(decided, "cancelled")

    def in_doubt(self, answer: object) -> None:
        """An answer's deadline passed while the transport wrote it."""
        if isinstance(answer, Reply):
            self._dataplane.in_doubt(answer.decisions)

    def too_late(self, answer: object) -> DeadlineError:
        """Takes an answer back that cannot be sent in time; the error to send instead."""
        return self._orders.too_late(answer)

    def not_sent(self, answer: object) -> None:
        """An answer's caller did not wait for it."""
        self._orders.not_sent(answer)

    async def Decide(self, request: Order | pb.DecideRequest, call: Call) -> Reply:
        """One order."""
        order = request if isinstance(request, Order) else request.order
        self._check_lane(call, (order,))
        if call.deadline is None and own_seconds(order) is None and not order.reduce_only:
            await self._dataplane.place()
        arrived = self._clock()
        decided = await self._decide(order, arrived, call)
        reply = self.reply(decided)
        if not isinstance(request, Order) and request.explain:
            await self._explain(reply, decided, call.deadline)
        return reply

    async def _explain(self, reply: Reply, decided: OneDecided, deadline: float | None) -> None:
        """Adds the explanation of its decision to a reply, or the reason why that is not there."""
        try:
            explanation = await self._explaining.explanation(decided, deadline)
        except asyncio.CancelledError:
            self.not_sent(reply)
            raise
        if deadline is not None and self._clock() >= deadline:
            raise self._orders.too_late(reply)
        reply.wire += _EXPLANATION % prefixed(explanation.SerializeToString())

    def begin(self, request: bytes, call: Call, arrived: float, *, in_company: bool) -> Plain | None:
        """Begins with the order of a unary call at once, if it is plain and need not wait; else it is for `Decide`.

        Args:
            request: The message.
            call: Who waits.
            arrived: When it was taken up, in monotonic seconds.
            in_company: More calls follow in this turn of the event loop.

        Raises:
            PretradeError: It gets no decision, and that was told of.
        """
        order = self._reader.plain(request)
        if order is None or (call.deadline is None and self._must_wait(order)):
            return None
        try:
            self._orders.read(order, call, self._orders.context_of(call))
            deadline = earlier(order.timeout_seconds, arrived, call.deadline)
            return order, self._dataplane.begin(order, arrived, deadline, in_company=in_company)
        except Exception as error:
            raise self._orders.failed(error, order, arrived, call) from error

    def begin_together(
        self, requests: Sequence[bytes], deadlines: Sequence[float | None], arrived: float
    ) -> list[Plain | None]:
        """Begins with the orders of unary calls that came together and say nothing but until when their callers wait.

        None stands for those that `begin` is for: orders that are not plain, or that have a time of their own, those
        without a deadline where these may have to wait, and all of them where there is no place for all.

        Args:
            requests: The messages.
            deadlines: Until when each caller waits, in monotonic seconds; None for ever.
            arrived: When they were taken up, in monotonic seconds.
        """
        orders: list[Order] = []
        until: list[float] = []
        places: list[int] = []
        begun: list[Plain | None] = [None] * len(requests)
        plain = self._reader.plain
        patient = math.inf if self._dataplane.has_places_at_once(len(requests)) else -math.inf
        for place, (request, deadline) in enumerate(zip(requests, deadlines, strict=True)):
            order = plain(request)
            latest = patient if deadline is None else deadline
            if order is not None and order.timeout_seconds is None and latest > arrived:
                orders.append(order)
                until.append(latest)
                places.append(place)
        for place, context in self._orders.chosen(len(orders)).items():
            orders[place].context = context
        promises = self._dataplane.begin_each(orders, arrived, until) if orders else ()
        for place, order, promise in zip(places, orders, promises, strict=False):
            begun[place] = (order, promise)
        return begun

    def _must_wait(self, order: Asked) -> bool:
        """Whether the order of a call without a deadline waits for a place."""
        return self._dataplane.must_wait and own_seconds(order) is None and not order.reduce_only

    def reply(self, decided: OneDecided) -> Reply:
        """The answer with a decision."""
        return Reply(_DECIDED % prefixed(decided.wire), decided)

    def failed(self, error: Exception, begun: Plain, arrived: float, call: Call) -> PretradeError:
        """Tells of an order that was begun and got no decision; what its caller hears."""
        return self._orders.failed(error, begun[0], arrived, call)

    def give_up(self, begun: Plain) -> None:
        """A caller does not wait any more for an order that was begun."""
        self._dataplane.give_up(begun[1])

    async def DecideBatch(self, request: Sequence[Asked] | pb.DecideBatchRequest, call: Call) -> Reply:
        """Many orders under one deadline, each with its own result."""
        orders = request.orders if isinstance(request, pb.DecideBatchRequest) else request
        if not 0 < len(orders) <= MAX_BATCH:
            rule = f"must be 1 to {MAX_BATCH}, not {len(orders)}"
            raise InvalidOrderError("BATCH_SIZE", f"orders: {rule}", "orders")
        self._check_lane(call, orders)
        call.orders = min(len(orders), BATCH_SLICE)
        results = await self._batches.decide_all(orders, call)
        if call.deadline is not None and self._clock() >= call.deadline:
            late = [self._orders.too_late(result) for result in results]
            raise late[0]
        sent = [self._orders.in_time(result) for result in results]
        wire = b"".join([one.wire if isinstance(one, Results) else RESULTS % prefixed(one.wire) for one in sent])
        return Reply(wire, *(decided for result in sent for decided in result.decisions))

    async def DecideStream(self, requests: AsyncIterator[Asked], call: Call) -> AsyncIterator[Reply]:
        """Orders as they come, results as they are ready."""
        async with contextlib.aclosing(self._streams.decide(requests, call, most=1)) as answers:
            async for (reply,) in answers:
                yield reply

    def _decide_stream(self, requests: AsyncIterator[Asked], call: Call) -> AsyncGenerator[list[Reply]]:
        """The same, with the results that are ready at one instant together."""
        return self._streams.decide(requests, call, most=_MOST_TOGETHER)

    async def _decide(self, asked: Asked, arrived: float, call: Call) -> OneDecided:
        """Decides the order of a call."""
        try:
            order = self._orders.read(asked, call, self._orders.context_of(call))
            deadline = earlier(order.timeout_seconds, arrived, call.deadline)
            return await self._dataplane.decide(order, arrived, deadline)
        except PretradeError as error:
            self._orders.failed(error, asked, arrived, call)
            raise
        except Exception as error:
            raise self._orders.failed(error, asked, arrived, call) from error

    def _check_lane(self, call: Call, orders: Iterable[Asked]) -> None:
        """Refuses a call that came in past Envoy's gate, as calls with reduce-only orders may, with another order."""
        if said_by(call).reduce_only and not all(order.reduce_only for order in orders):
            rule = f"must be true of every order of a call with `{REDUCE_ONLY}`"
            raise InvalidOrderError("NOT_REDUCE_ONLY", f"reduce_only: {rule}", "reduce_only")
