"""`DecisionService`, on both edges alike: it converts, raises and decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, Final, NamedTuple

import grpc
import grpc.aio
import structlog
from pydantic import BaseModel, ConfigDict

from fallback.order import NO_CONTEXT, Order
from feature_cache.constants import Constant
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.explaining import Explaining
from server.decision.convert import OrderReader
from server.decision.decided_block import DecidedBlock, OneDecided
from server.decision.metrics import DecisionMetrics
from server.decision.pending_slice import PendingSlice
from server.decision.plane import DataPlane, Deciding
from server.decision.protowire import prefixed, template
from server.decision.reports import DecisionReports
from server.errors import DeadlineError, InternalError, InvalidOrderError, PretradeError
from server.rpc import status
from server.rpc.call import Call
from server.rpc.call_context import REDUCE_ONLY, CallContexts, said_by
from server.security.orders import OrderAccess

_log = structlog.get_logger(__name__)

SERVICE: Final = pb.DESCRIPTOR.services_by_name["DecisionService"].full_name
MAX_BATCH = 1_024
"""Orders in one `DecideBatch`."""
_BATCH_SLICE = 64
"""Orders of a batch that are decided at once: more would hold up everybody else, and miss their own deadlines."""

_MOST_TOGETHER: Final = 64
"""Results of a stream that are handed to Envoy at once: each hand-over costs as much as half a decision."""
_wire: Final[Callable[[Reply], bytes]] = attrgetter("wire")
_DECIDED: Final = template(pb.DecideResponse.DESCRIPTOR, "decision")
_EXPLANATION: Final = template(pb.DecideResponse.DESCRIPTOR, "explanation")
_RESULTS: Final = template(pb.DecideBatchResponse.DESCRIPTOR, "results")
_RESULT: Final = template(pb.DecideStreamResponse.DESCRIPTOR, "result")
_ORDER_DECIDED: Final = template(pb.OrderResult.DESCRIPTOR, "order_ref", "decision")


Asked = Order | pb.Order
"""A plain order, which has been read, or a message that is still to be read."""


class Begun(NamedTuple):
    """An order of a batch or stream."""

    asked: Asked
    arrived: float
    """When it was taken up, in monotonic seconds."""
    decided: Deciding | PretradeError
    """Its decision to come, or why there will be none."""
    own_seconds: float | None
    """What the order itself allows; None when it does not say."""


class BegunTogether(NamedTuple):
    """Some orders of a batch, as far as possible in columns."""

    orders: Sequence[Order]
    arrived: float
    """When they were taken up, in monotonic seconds."""
    decided: PendingSlice


class Plain(NamedTuple):
    """The plain order of a unary call, which is being decided."""

    order: Order
    arrived: float
    """When it was taken up, in monotonic seconds."""
    decided: Deciding


class Reply:
    """A serialised answer, and the decisions in it."""

    __slots__ = ("deadline", "decisions", "wire")

    def __init__(self, wire: bytes, *decisions: OneDecided | DecidedBlock) -> None:
        self.wire = wire
        self.decisions = decisions
        self.deadline = math.inf
        """Of one order's result, in monotonic seconds: it must not be sent later."""


class Results(Reply):
    """Results of several orders, as they stand in the reply to a batch."""

    __slots__ = ()


def _wires(replies: Sequence[Reply]) -> list[bytes]:
    return [reply.wire for reply in replies]


class StreamSettings(BaseModel):
    """Bounds of one `DecideStream`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_in_flight: Constant[int] = 256
    """Orders of one stream under way at once; the server reads no further until one is answered."""


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
        self._orders = orders
        self._metrics = metrics
        self._stream_settings = stream_settings
        self._explaining = explaining
        self._contexts = contexts
        self._reports = reports
        self._clock = clock
        self._access = access

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
            "Decide": grpc.unary_unary_rpc_method_handler(self.Decide, self._orders.request, _wire),
            "DecideBatch": grpc.unary_unary_rpc_method_handler(self.DecideBatch, self._orders.batch, _wire),
            "DecideStream": grpc.stream_stream_rpc_method_handler(
                decide_stream, self._orders.streamed, serialize_streamed
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        server.add_registered_method_handlers(SERVICE, handlers)

    def sent(self, answer: object) -> None:
        """The transport has all of an answer."""
        if isinstance(answer, Reply):  # else it is of a service that decides nothing
            self._dataplane.heard(answer.decisions)

    def in_doubt(self, answer: object) -> None:
        """An answer's deadline passed while the transport wrote it."""
        if isinstance(answer, Reply):
            self._dataplane.in_doubt(answer.decisions)

    def too_late(self, answer: object) -> DeadlineError:
        """Takes an answer back that cannot be sent in time; the error to send instead."""
        for decided in answer.decisions if isinstance(answer, Reply) else ():
            self._dataplane.unheard(decided, "deadline")
        return DeadlineError("DEADLINE_EXCEEDED", "the answer could not be sent in time")

    def not_sent(self, answer: object) -> None:
        """An answer's caller did not wait for it."""
        if isinstance(answer, Reply):
            for decided in answer.decisions:
                self._dataplane.unheard(decided, "cancelled")

    async def Decide(self, request: Order | pb.DecideRequest, call: Call) -> Reply:
        """One order."""
        order = request if isinstance(request, Order) else request.order
        self._check_lane(call, (order,))
        if call.deadline is None and not (_has_timeout(order) or order.reduce_only):
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
            raise self.too_late(reply)
        reply.wire += _EXPLANATION % prefixed(explanation.SerializeToString())

    def begin(self, request: bytes, call: Call, *, in_company: bool) -> Plain | None:
        """Begins with the order of a unary call at once, if it is plain and need not wait; else it is for `Decide`.

        Args:
            request: The message.
            call: Who waits.
            in_company: More calls follow in this turn of the event loop.

        Raises:
            PretradeError: It gets no decision, and that was told of.
        """
        order = self._orders.plain(request)
        if order is None or (call.deadline is None and self._must_wait(order)):
            return None
        arrived = self._clock()
        try:
            self._read(order, call)
            deadline = _earlier(order.timeout_seconds, arrived, call.deadline)
            return Plain(order, arrived, self._dataplane.begin(order, arrived, deadline, in_company=in_company))
        except Exception as error:
            raise self._failed(error, order, arrived, call) from error

    def _must_wait(self, order: Asked) -> bool:
        """Whether the order of a call without a deadline waits for a place."""
        return self._dataplane.must_wait and not (_has_timeout(order) or order.reduce_only)

    def reply(self, decided: OneDecided) -> Reply:
        """The answer with a decision."""
        return Reply(_DECIDED % prefixed(decided.wire), decided)

    def failed(self, error: Exception, begun: Plain, call: Call) -> PretradeError:
        """Tells of an order that was begun and got no decision; what its caller hears."""
        return self._failed(error, begun.order, begun.arrived, call)

    def give_up(self, begun: Plain) -> None:
        """A caller does not wait any more for an order that was begun."""
        self._dataplane.give_up(begun.decided)

    async def DecideBatch(self, request: Sequence[Asked] | pb.DecideBatchRequest, call: Call) -> Reply:
        """Many orders under one deadline, each with its own result."""
        orders = request.orders if isinstance(request, pb.DecideBatchRequest) else request
        if not 0 < len(orders) <= MAX_BATCH:
            rule = f"must be 1 to {MAX_BATCH}, not {len(orders)}"
            raise InvalidOrderError("BATCH_SIZE", f"orders: {rule}", "orders")
        self._check_lane(call, orders)
        call.orders = min(len(orders), _BATCH_SLICE)
        results = await self._decide_all(orders, call)
        if call.deadline is not None and self._clock() >= call.deadline:
            late = [self.too_late(result) for result in results]
            raise late[0]
        sent = [self._in_time(result) for result in results]
        wire = b"".join([one.wire if isinstance(one, Results) else _RESULTS % prefixed(one.wire) for one in sent])
        return Reply(wire, *(decided for result in sent for decided in result.decisions))

    async def _decide_all(self, orders: Sequence[Asked], call: Call) -> list[Reply]:
        """The results of a batch, in the order of its orders. It is taken up slice by slice.

        A slice begins while those before it wait for the model and for the disk, where there are places for its orders;
        otherwise it begins when there are, or when those before it have ended. A call of which nothing is under way
        waits in line for places, and its next slice has as many orders as it finds places. Other calls have a turn in
        between.

        Raises:
            OverloadedError: There was no place for any of its orders.
        """
        begun: list[Begun | BegunTogether] = []
        results: list[Reply] = []
        is_patient = not any(order.reduce_only for order in orders)  # those have places of their own, and need not wait
        try:
            first = 0
            while first < len(orders):
                number = min(len(orders) - first, _BATCH_SLICE)
                if first:
                    await asyncio.sleep(0)
                while len(results) < len(begun) and not self._dataplane.has_places(number):
                    await _end_of(begun[len(results)])
                    results.append(self._result_in_batch(begun[len(results)], call))
                if is_patient and len(results) == len(begun):
                    arrived = self._clock()
                    places = await self._dataplane.places(number, call.deadline, has_begun=first > 0)
                    if not first and not places:
                        raise self._failed(self._dataplane.refused(len(orders)), orders[0], arrived, call)
                    is_patient = places > 0  # else it has waited long enough: what finds no place is refused
                    number = places or number
                begun += self._begin_slice(orders[first : first + number], call)
                first += number
            for one in begun[len(results) :]:
                await _end_of(one)
                results.append(self._result_in_batch(one, call))
            return results
        except BaseException:
            for result in results:
                self.not_sent(result)
            for one in begun[len(results) :]:
                self._give_up(one)
            raise

    def _begin_slice(self, some: Sequence[Asked], call: Call) -> Sequence[Begun | BegunTogether]:
        """Begins with some orders of a batch: together where all of them are plain."""
        taken_up = self._clock()
        orders = [one for one in some if isinstance(one, Order) and not one.idempotency_key and not _has_timeout(one)]
        if len(orders) == len(some) and call.caller is None and self._contexts.of(call) is NO_CONTEXT:
            begun = self._dataplane.begin_together(orders, taken_up, call.deadline)
            if begun is not None:
                return [BegunTogether(orders, taken_up, begun)]
        return [self._begin(order, taken_up, call.deadline, call, in_company=True) for order in some]

    def _result_in_batch(self, begun: Begun | BegunTogether, call: Call) -> Reply:
        """What became of an order, or of some of them together, as it stands in the reply."""
        if isinstance(begun, BegunTogether):
            return self._results_together(begun, call)
        result = self._result(begun, call)
        if result.decisions and begun.own_seconds is not None:
            # The server's cap is for deciding, the call's deadline for all.
            result.deadline = begun.arrived + begun.own_seconds
        return result

    def _results_together(self, begun: BegunTogether, call: Call) -> Reply:
        decisions: list[OneDecided | DecidedBlock] = []
        wires = []
        for order, outcome in zip(begun.orders, begun.decided.outcomes(), strict=True):
            if isinstance(outcome, bytes):
                wires.append(_ORDER_DECIDED % (prefixed(order.order_ref.encode()), prefixed(outcome)))
            else:
                result = self._result(Begun(order, begun.arrived, outcome, None), call)
                decisions += result.decisions
                wires.append(result.wire)
        decisions += begun.decided.take_decided()
        return Results(b"".join([_RESULTS % prefixed(wire) for wire in wires]), *decisions)

    async def DecideStream(self, requests: AsyncIterator[Asked], call: Call) -> AsyncIterator[Reply]:
        """Orders as they come, results as they are ready."""
        async with contextlib.aclosing(self._decide_stream(requests, call, most=1)) as answers:
            async for (reply,) in answers:
                yield reply

    async def _decide_stream(
        self, requests: AsyncIterator[Asked], call: Call, most: int = _MOST_TOGETHER
    ) -> AsyncGenerator[list[Reply]]:
        """The same, with the results that are ready at one instant together, up to so many."""
        ready: asyncio.Queue[Reply | None] = asyncio.Queue()
        room = asyncio.Semaphore(self._stream_settings.max_in_flight)
        deciding: dict[Deciding, Begun] = {}

        def decided(future: Deciding) -> None:
            begun = deciding.pop(future, None)
            if begun is not None:  # else it was given up
                ready.put_nowait(self._result_in_stream(begun, call))

        async def read() -> None:
            async for order in requests:
                arrived = self._clock()
                await room.acquire()
                begun = self._begin_in_stream(order, arrived, call)
                if isinstance(begun.decided, PretradeError):
                    ready.put_nowait(self._result_in_stream(begun, call))
                else:
                    deciding[begun.decided] = begun
                    begun.decided.add_done_callback(decided)

        reader = asyncio.create_task(read())
        reader.add_done_callback(lambda _: ready.put_nowait(None))
        under_way: list[Reply] = []
        try:
            while deciding or not reader.done() or not ready.empty():
                result = await ready.get()
                while result is not None:  # else there are no more orders
                    room.release()
                    under_way.append(self._in_time(result))
                    result = ready.get_nowait() if len(under_way) < most and not ready.empty() else None
                if under_way:
                    yield [Reply(_RESULT % prefixed(one.wire)) for one in under_way]
                self._dataplane.heard([decided for one in under_way for decided in one.decisions])
                under_way = []
            await reader
        finally:
            reader.cancel()
            for reply in under_way:
                self.not_sent(reply)
            while not ready.empty():
                self.not_sent(ready.get_nowait())
            for begun in deciding.values():
                self._give_up(begun)
            deciding.clear()

    def _begin_in_stream(self, asked: Asked, arrived: float, call: Call) -> Begun:
        if asked.order_ref:
            return self._begin(asked, arrived, None, call, in_company=True)
        missing = InvalidOrderError("MISSING_ORDER_REF", "order_ref: required in a stream", "order_ref")
        return Begun(asked, arrived, missing, None)

    def _result_in_stream(self, begun: Begun, call: Call) -> Reply:
        result = self._result(begun, call)
        if result.decisions:
            own = _earlier(begun.own_seconds, begun.arrived, None)
            result.deadline = self._dataplane.capped(begun.arrived, own)
        return result

    def _check_lane(self, call: Call, orders: Iterable[Asked]) -> None:
        """Refuses a call that came in past Envoy's gate, as calls with reduce-only orders may, with another order."""
        if said_by(call).reduce_only and not all(order.reduce_only for order in orders):
            rule = f"must be true of every order of a call with `{REDUCE_ONLY}`"
            raise InvalidOrderError("NOT_REDUCE_ONLY", f"reduce_only: {rule}", "reduce_only")

    def _in_time(self, result: Reply) -> Reply:
        """An order's result, or DEADLINE_EXCEEDED when it waited past the order's deadline."""
        if result.deadline == math.inf or self._clock() < result.deadline:
            return result
        (decided,) = result.decisions
        assert not isinstance(decided, DecidedBlock), "a block has no deadline but its call's"
        return self._refused(decided.order_ref, self.too_late(result))

    def _refused(self, order_ref: str, error: PretradeError) -> Reply:
        """The result of an order of a batch or stream that got no decision; it is counted here alone."""
        self._metrics.errors[error.reason] += 1
        return Reply(pb.OrderResult(order_ref=order_ref, error=status.order_error(error)).SerializeToString())

    def _result(self, begun: Begun, call: Call) -> Reply:
        """What became of an order of a batch or stream that has ended."""
        asked, decided = begun.asked, begun.decided
        if isinstance(decided, PretradeError):
            return self._refused(asked.order_ref[:64], decided)
        try:
            made = decided.result()
        except Exception as error:
            return self._refused(asked.order_ref[:64], self._failed(error, asked, begun.arrived, call))
        return Reply(_ORDER_DECIDED % (prefixed(asked.order_ref.encode()), prefixed(made.wire)), made)

    def _give_up(self, begun: Begun | BegunTogether) -> None:
        if isinstance(begun, BegunTogether):
            self._dataplane.give_up_together(begun.decided)
        elif not isinstance(begun.decided, PretradeError):
            self._dataplane.give_up(begun.decided)

    def _begin(
        self, asked: Asked, arrived: float, deadline: float | None, call: Call, in_company: bool = False
    ) -> Begun:
        """Begins with an order of a batch or stream; see `DataPlane.begin`."""
        try:
            order = self._read(asked, call)
            own = _earlier(order.timeout_seconds, arrived, deadline)
            decided = self._dataplane.begin(order, arrived, own, in_company=in_company)
            return Begun(asked, arrived, decided, order.timeout_seconds)
        except Exception as error:
            return Begun(asked, arrived, self._failed(error, asked, arrived, call), None)

    async def _decide(self, asked: Asked, arrived: float, call: Call) -> OneDecided:
        """Decides the order of a call."""
        try:
            order = self._read(asked, call)
            deadline = _earlier(order.timeout_seconds, arrived, call.deadline)
            return await self._dataplane.decide(order, arrived, deadline)
        except PretradeError as error:
            self._failed(error, asked, arrived, call)
            raise
        except Exception as error:
            raise self._failed(error, asked, arrived, call) from error

    def _read(self, asked: Asked, call: Call) -> Order:
        """An order that meets every rule, and that its caller may ask about."""
        caller = call.caller
        self._access.charge(caller)
        order = asked if isinstance(asked, Order) else self._orders.read(asked)
        self._access.check_strategy(caller, order.strategy)
        order.context = self._contexts.of(call)
        order.caller = "" if caller is None else caller.name
        return order

    def _failed(self, error: Exception, asked: Asked, arrived: float, call: Call) -> PretradeError:
        """Tells of an order that gets no decision; what its caller hears."""
        called = self._contexts.of(call)
        if not isinstance(error, PretradeError):
            _log.error(
                "decision failed",
                order_ref=asked.order_ref[:64],
                trace_id=called.trace_id,
                correlation_id=called.correlation_id,
                exc_info=error,
            )
            error = InternalError("the decision failed; see the server's log")
        self._reports.failed(asked, called, error, arrived, self._clock())
        return error


async def _end_of(begun: Begun | BegunTogether) -> None:
    """Waits until what was begun has its decisions, or gets none."""
    decided = begun.decided
    if isinstance(decided, PendingSlice):
        await decided.ended()
    elif not isinstance(decided, PretradeError) and not decided.done():
        with contextlib.suppress(Exception):  # the result says so
            await decided


def _has_timeout(order: Asked) -> bool:
    return order.timeout_seconds is not None if isinstance(order, Order) else order.HasField("timeout")


def _earlier(own_seconds: float | None, arrived: float, of_call: float | None) -> float | None:
    """The earlier of an order's own deadline and its call's; None without either."""
    if own_seconds is None:
        return of_call
    return arrived + own_seconds if of_call is None else min(arrived + own_seconds, of_call)
