"""Which decisions are written to the log and to traces: slow, failed or degraded ones, and one in N of the others.

The choice is made when a decision is over, because only then is it known how it went. It costs the decision path a few
comparisons. A *sink* is the log or the traces. A chosen decision goes into the bounded queue of its sink, and a thread
of that sink writes it a little later. A sink that is slow or down, or that gets more reports a second than its limit,
loses reports. They are counted, and no decision waits.
"""

from __future__ import annotations

import contextvars
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, Self, TypeVar

import structlog

from fallback.order import Case, Order
from feature_cache.token_bucket import TokenBucket
from pretrade.decision.v1 import decision_pb2 as pb
from server.errors import InvalidOrderError, KeyReusedError, PretradeError
from server.machine import REAL, Machine

if TYPE_CHECKING:
    from fallback.order import CallContext
    from server.decision.decided_block import DecidedBlock
    from server.decision.pending import Pending
    from server.decision.record import Decided

_log = structlog.get_logger(__name__)

Cause = Literal["failed", "degraded", "slow", "caller", "sample"]
"""Why a decision is reported; `caller`: the caller sampled its trace. The first that holds."""

CaseT = TypeVar("CaseT", bound=Case)

_DRAIN_SECONDS: Final = 0.1
"""Between two looks at the queue: a thread that woke up for every report would take the decision path's time."""
_MOST_WAITING: Final = 1_000
_STOP_SECONDS: Final = 1.5
_BURST_SECONDS: Final = 1.0
"""As many reports as a sink takes in this time may come at once."""


@dataclass(frozen=True, slots=True)
class Report:
    """One decision, or one call that got none."""

    cause: Cause
    order: pb.Order
    context: CallContext
    arrived: float
    """Monotonic seconds."""
    ended: float
    ended_wall_ns: int
    case: Case | None
    """What was known; None when the call ended before the order was looked at, or as a whole."""
    decision: Decided | None
    """None when there is none."""
    error: str
    """Why there is none; empty when there is one."""


class Sink:
    """A destination of reports: the log or the traces. A context manager that runs its thread.

    Args:
        name: For its thread and its metrics.
        write: Writes one report, on the sink's thread.
        one_in: One in this many decisions is reported without a cause; 0: none.
        slow_seconds: A decision that takes longer is reported.
        follows_traces: Whether a decision is reported because its caller sampled its trace, or this server chose it.
        max_per_second: More reports than this are lost; a second's worth may come at once.
        machine: Whose threads it uses.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[Report], None],
        *,
        one_in: int,
        slow_seconds: float,
        follows_traces: bool,
        max_per_second: float,
        machine: Machine = REAL,
    ) -> None:
        self.name = name
        self._threads = machine.threads
        self._write = write
        self._one_in = one_in
        self._slow_seconds = slow_seconds
        self._follows_traces = follows_traces
        self._rate = max_per_second
        self._bucket = TokenBucket(_BURST_SECONDS)
        self._seen = 0
        self._queue: deque[Report] = deque()
        self._stopped = machine.threads.event()
        self.chosen: Counter[Cause] = Counter()
        """Decisions to tell of, by cause, lost ones included."""
        self.lost = 0
        """Of these, those beyond the rate or the queue's bound, and those that could not be written."""

    def __enter__(self) -> Self:
        # A thread begins with an empty context, and the log's fields are in ours.
        context = contextvars.copy_context()
        self._thread = self._threads.start(lambda: context.run(self._drain), f"reports-{self.name}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Writes what waits, for a bounded time."""
        self._stopped.set()
        self._thread.join(_STOP_SECONDS)

    def choose(self, cases: Sequence[CaseT], now: float) -> list[tuple[CaseT, Cause]]:
        """The decisions to tell of, with the reason why, of those that are about to be sent at the instant `now`."""
        chosen, slow, follows, one_in, seen = [], self._slow_seconds, self._follows_traces, self._one_in, self._seen
        for case in cases:
            seen += 1
            if case.degradations or seen == one_in or now - case.budget.arrived > slow or follows:
                self._seen = seen - 1
                cause = self._cause(case, now - case.budget.arrived)
                seen = self._seen
                if cause is not None and self.admits(cause, now):
                    chosen.append((case, cause))
        self._seen = seen
        return chosen

    def choose_block(self, decided: DecidedBlock, now: float) -> list[tuple[int, Cause]]:
        """The same of decisions that were made in columns, by their places: all are degraded or none is; no traces."""
        places: Sequence[int] = range(len(decided))
        if decided.block.degradations:
            return [(place, "degraded") for place in places if self.admits("degraded", now)]
        slow: Sequence[int] = ()
        if now - decided.arrived > self._slow_seconds:
            is_slow = [now - arrived > self._slow_seconds for arrived, _ in decided.block.times()]
            slow = [place for place in places if is_slow[place]]
            places = [place for place in places if not is_slow[place]]
        first = self._one_in - self._seen - 1 if self._one_in else len(places)
        self._seen += len(places)
        sampled = places[first :: self._one_in or 1]
        if self._one_in:
            self._seen %= self._one_in
        causes: list[tuple[int, Cause]] = [(place, "slow") for place in slow]
        causes += [(place, "sample") for place in sampled]
        return [one for one in causes if self.admits(one[1], now)]

    def _cause(self, case: Case, used_seconds: float) -> Cause | None:
        """Why to tell of a decision; None to pass it over."""
        if case.degradations:
            return "degraded"
        if used_seconds > self._slow_seconds:
            return "slow"
        if self._follows_traces:
            if case.order.context.sampled:
                return "caller"
            if case.order.context.is_chosen:
                return "sample"
        self._seen += 1
        if self._seen == self._one_in:
            self._seen = 0
            return "sample"
        return None

    def admits(self, cause: Cause, now: float) -> bool:
        """Takes a report's place, if there is one."""
        self.chosen[cause] += 1
        if len(self._queue) >= _MOST_WAITING or not self._bucket.take(now, self._rate):
            self.lost += 1
            return False
        return True

    def put(self, report: Report) -> None:
        """Leaves a report for the thread."""
        self._queue.append(report)

    def _drain(self) -> None:
        while True:
            last = self._stopped.wait(_DRAIN_SECONDS)
            while self._queue:
                try:
                    self._write(self._queue.popleft())
                except Exception:  # a report that cannot be written must not end all others
                    self.lost += 1
                    _log.exception("a report could not be written", sink=self.name)
            if last:
                return


class DecisionReports:
    """Chooses which decisions to report, for every sink by its own rules.

    Args:
        sinks: Running ones.
        machine: Whose clock says when a decision ended.
        traces: Whether one of the sinks is the traces.
    """

    def __init__(self, sinks: tuple[Sink, ...], machine: Machine = REAL, traces: bool = False) -> None:
        self.sinks = sinks
        self._traces = traces
        self._wall_clock_ns = machine.wall_clock_ns

    def decided(self, cases: Sequence[Pending], now: float) -> None:
        """Decisions are about to be sent, at the monotonic instant `now`."""
        for sink in self.sinks:
            for case, cause in sink.choose(cases, now):
                assert case.decided is not None
                self._put(sink, cause, case, case.decided, now)

    def decided_block(self, decided: DecidedBlock, now: float) -> None:
        """The same of decisions that were made in columns."""
        for sink in self.sinks:
            for place, cause in sink.choose_block(decided, now):
                self._put(sink, cause, decided.block.case(place), decided.one(place), now)

    def _put(self, sink: Sink, cause: Cause, case: Case, decided: Decided, now: float) -> None:
        order, arrived, ended_ns = case.order, case.budget.arrived, self._wall_clock_ns()
        context = self.traced(order.context, decided.decision_id)
        sink.put(Report(cause, order.message, context, arrived, now, ended_ns, case, decided, ""))

    def traced(self, context: CallContext, decision_id: str = "") -> CallContext:
        """The context of an order that is told of: where calls are traced it has a trace.

        An order whose caller sent none, and which was not chosen before it was decided, has the digits of its
        decision's id as the id of its trace, so that each leads to the other; without a decision it has a new one.
        """
        if not self._traces or context.trace_id:
            return context
        return context._replace(trace_id=decision_id.replace("-", "") or f"{random.getrandbits(128) or 1:032x}")

    def failed(
        self, order: Order | pb.Order, context: CallContext, error: PretradeError, arrived: float, now: float
    ) -> None:
        """A call gets no decision; orders that are wrong are their callers' affair."""
        if isinstance(error, InvalidOrderError | KeyReusedError):
            return
        for sink in self.sinks:
            if sink.admits("failed", now):
                message = order.message if isinstance(order, Order) else order
                ended_at_ns = self._wall_clock_ns()
                sink.put(Report("failed", message, context, arrived, now, ended_at_ns, error.case, None, error.reason))
