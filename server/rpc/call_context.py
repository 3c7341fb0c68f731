"""Reads what a call carries besides its orders: W3C Trace Context and the caller's correlation id."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Final

from fallback.order import NO_CONTEXT, CallContext
from server.rpc.call import Call, CallMetadata, Said

CORRELATION_ID: Final = "x-correlation-id"
"""Metadata key of the caller's own id for the work that a call is part of; 1 to 64 printable ASCII characters."""
TRACEPARENT: Final = "traceparent"
REDUCE_ONLY: Final = "pretrade-reduce-only"
"""Metadata, with any value, of a unary call all of whose orders are reduce-only: Envoy lets it in in an overload."""

_TRACEPARENT: Final = re.compile(
    r"(?!ff)(?:00(?=.{53}\Z)|(?!00)[0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]([0-9a-f])(?:-.*)?"
)
_CORRELATION: Final = re.compile(r"[!-~]{1,64}")


class CallContexts:
    """Reads contexts from metadata. What is not well formed counts as not sent: no order fails for it.

    One order in so many is chosen before anything is known of it, so that the calls to model servers carry its trace.
    Other orders without a caller's trace have none until somebody tells of them (`DecisionReports.traced`).

    Args:
        one_in: One order in so many is chosen to be traced; 0: none, or no calls are traced here.
    """

    def __init__(self, one_in: int = 0) -> None:
        self._one_in = one_in
        self._seen = 0

    def of(self, call: Call) -> CallContext:
        """The context of one order of a call."""
        if not self._one_in:
            return said_by(call).context
        said, chosen = self.of_some(call, 1)
        return chosen.get(0, said)

    def of_some(self, call: Call, orders: int) -> tuple[CallContext, Mapping[int, CallContext]]:
        """The context of so many orders of a call, and those of the chosen ones among them, by their places."""
        said = said_by(call).context
        return said, self._chosen(said, orders)

    def of_bare(self, orders: int) -> Mapping[int, CallContext]:
        """The contexts of the chosen ones among so many orders of calls that carry nothing, by their places.

        The others have none, as an order that nothing was said of.
        """
        return self._chosen(NO_CONTEXT, orders)

    def _chosen(self, said: CallContext, orders: int) -> Mapping[int, CallContext]:
        """Those of the chosen ones among the next orders, which are of calls that say this."""
        one_in = self._one_in
        if not one_in:
            return _NONE
        first = one_in - self._seen - 1
        self._seen = (self._seen + orders) % one_in
        if first >= orders:
            return _NONE
        return {place: _traced(said) for place in range(first, orders, one_in)}


def _traced(said: CallContext) -> CallContext:
    return said._replace(trace_id=said.trace_id or f"{random.getrandbits(128) or 1:032x}", is_chosen=True)


def said_by(call: Call) -> Said:
    """What a call says of itself; its metadata is read once."""
    if call.said is None:
        call.said = _read(call.metadata)
    return call.said


def _read(metadata: CallMetadata) -> Said:
    trace_id = span_id = correlation_id = ""
    sampled = reduce_only = False
    for key, value in metadata or ():
        if key not in _KEYS:
            continue
        if key in _TRACEPARENT_KEYS:
            if found := _TRACEPARENT.fullmatch(_text(value)):
                trace_id, span_id = found[1], found[2]
                sampled = bool(int(found[3], 16) & 1)
        elif key in _REDUCE_ONLY_KEYS:
            reduce_only = True
        elif _CORRELATION.fullmatch(_text(value)):
            correlation_id = _text(value)
    if not trace_id and not correlation_id:
        return _REDUCING if reduce_only else _NOTHING
    return Said(CallContext(trace_id, span_id, sampled, correlation_id), reduce_only)


_NONE: Final[Mapping[int, CallContext]] = {}
_NOTHING: Final = Said(NO_CONTEXT, reduce_only=False)
_REDUCING: Final = Said(NO_CONTEXT, reduce_only=True)
_REDUCE_ONLY_KEYS: Final = frozenset((REDUCE_ONLY, REDUCE_ONLY.encode()))
_TRACEPARENT_KEYS: Final = frozenset((TRACEPARENT, TRACEPARENT.encode()))
_KEYS: Final = _REDUCE_ONLY_KEYS | _TRACEPARENT_KEYS | {CORRELATION_ID, CORRELATION_ID.encode()}


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")
