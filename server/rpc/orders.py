"""The orders of calls on their way into the data plane, and what became of them on their way out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import structlog

from fallback.order import NO_CONTEXT, CallContext, Order
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.convert import OrderReader
from server.decision.decided_block import DecidedBlock, OneDecided
from server.decision.decision_wire import ORDER_DECIDED
from server.decision.metrics import DecisionMetrics
from server.decision.plane import DataPlane, Deciding
from server.decision.reports import DecisionReports
from server.errors import DeadlineError, InternalError, PretradeError
from server.journal.protowire import prefixed
from server.rpc import status
from server.rpc.call import Call
from server.rpc.call_context import CallContexts, said_by
from server.security.orders import OrderAccess

_log = structlog.get_logger(__name__)

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


class Reply:
    """A serialised answer, and the decisions in it."""

    __slots__ = ("deadline", "decisions", "wire")

    def __init__(self, wire: bytes, *decisions: OneDecided | DecidedBlock) -> None:
        self.wire = wire
        self.decisions = decisions
        self.deadline = math.inf
        """Of one order's result, in monotonic seconds: it must not be sent later."""


class Orders:
    """Reads orders, begins with them, and says what became of each; the same for unary calls, batches and streams.

    Args:
        dataplane: Decides.
        reader: Reads and checks orders.
        metrics: Counts the orders of batches and streams that got no decision; other errors are the edges' to count.
        contexts: Reads what calls carry besides.
        reports: Told of orders that get no decision.
        clock: Monotonic seconds.
        access: Checks for every order that its caller may ask about it.
    """

    def __init__(
        self,
        dataplane: DataPlane,
        reader: OrderReader,
        metrics: DecisionMetrics,
        contexts: CallContexts,
        reports: DecisionReports,
        clock: Callable[[], float],
        access: OrderAccess,
    ) -> None:
        self._dataplane = dataplane
        self._reader = reader
        self._metrics = metrics
        self._contexts = contexts
        self._reports = reports
        self._clock = clock
        self._access = access

    def context_of(self, call: Call) -> CallContext:
        """The context of one order of a call."""
        return self._contexts.of(call)

    def contexts_of(self, call: Call, orders: int) -> tuple[CallContext, Mapping[int, CallContext]]:
        """See `CallContexts.of_some`."""
        return self._contexts.of_some(call, orders)

    def chosen(self, orders: int) -> Mapping[int, CallContext]:
        """See `CallContexts.of_bare`."""
        return self._contexts.of_bare(orders)

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

    def in_time(self, result: Reply) -> Reply:
        """An order's result, or DEADLINE_EXCEEDED when it waited past the order's deadline."""
        if result.deadline == math.inf or self._clock() < result.deadline:
            return result
        (decided,) = result.decisions
        assert not isinstance(decided, DecidedBlock), "a block has no deadline but its call's"
        return self.refused(decided.order_ref, self.too_late(result))

    def refused(self, order_ref: str, error: PretradeError) -> Reply:
        """The result of an order of a batch or stream that got no decision; it is counted here alone."""
        self._metrics.errors[error.reason] += 1
        return Reply(pb.OrderResult(order_ref=order_ref, error=status.order_error(error)).SerializeToString())

    def result(self, begun: Begun, call: Call) -> Reply:
        """What became of an order of a batch or stream that has ended."""
        asked, decided = begun.asked, begun.decided
        if isinstance(decided, PretradeError):
            return self.refused(asked.order_ref[:64], decided)
        try:
            made = decided.result()
        except Exception as error:
            return self.refused(asked.order_ref[:64], self.failed(error, asked, begun.arrived, call))
        return Reply(ORDER_DECIDED % (prefixed(asked.order_ref.encode()), prefixed(made.wire)), made)

    def give_up(self, begun: Begun) -> None:
        """Nobody waits for an order any more."""
        if not isinstance(begun.decided, PretradeError):
            self._dataplane.give_up(begun.decided)

    def begin(
        self,
        asked: Asked,
        arrived: float,
        deadline: float | None,
        call: Call,
        context: CallContext,
        in_company: bool = False,
    ) -> Begun:
        """Begins with an order of a batch or stream; see `DataPlane.begin`."""
        try:
            order = self.read(asked, call, context)
        except Exception as error:
            return Begun(asked, arrived, self.failed(error, asked, arrived, call), None)
        return self.begun(asked, order, arrived, deadline, call, in_company)

    def begun(
        self,
        asked: Asked,
        order: Order,
        arrived: float,
        deadline: float | None,
        call: Call,
        in_company: bool = True,
    ) -> Begun:
        """The same for one that was read."""
        try:
            own = earlier(order.timeout_seconds, arrived, deadline)
            decided = self._dataplane.begin(order, arrived, own, in_company=in_company)
            return Begun(asked, arrived, decided, order.timeout_seconds)
        except Exception as error:
            return Begun(asked, arrived, self.failed(error, order, arrived, call), None)

    def read(self, asked: Asked, call: Call, context: CallContext) -> Order:
        """An order that meets every rule, and that its caller may ask about."""
        caller = call.caller
        self._access.charge(caller)
        order = asked if isinstance(asked, Order) else self._reader.read(asked)
        self._access.check_strategy(caller, order.strategy)
        order.context = context
        order.caller = "" if caller is None else caller.name
        return order

    def failed(self, error: Exception, asked: Asked, arrived: float, call: Call) -> PretradeError:
        """Tells of an order that gets no decision; what its caller hears."""
        own = asked.context if isinstance(asked, Order) else NO_CONTEXT
        called = self._reports.traced(said_by(call).context if own is NO_CONTEXT else own)
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


async def end_of(begun: Begun) -> None:
    """Waits until an order that was begun has its decision, or gets none."""
    decided = begun.decided
    if not isinstance(decided, PretradeError) and not decided.done():
        with contextlib.suppress(Exception):  # the result says so
            await decided


def own_seconds(order: Asked) -> float | None:
    """How long an order itself says that it may take, not yet checked; None when it does not say."""
    if isinstance(order, Order):
        return order.timeout_seconds
    return order.timeout.seconds + order.timeout.nanos / 1e9 if order.HasField("timeout") else None


def earlier(own_seconds: float | None, arrived: float, of_call: float | None) -> float | None:
    """The earlier of an order's own deadline and its call's; None without either."""
    if own_seconds is None:
        return of_call
    return arrived + own_seconds if of_call is None else min(arrived + own_seconds, of_call)
