"""Reads what a call carries besides its orders: W3C Trace Context and the caller's correlation id."""

from __future__ import annotations

import random
import re
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

    Args:
        tracing: Whether calls are traced here: one without a trace then begins its own.
    """

    def __init__(self, tracing: bool) -> None:
        self._tracing = tracing

    def of(self, call: Call) -> CallContext:
        """The context of one order of a call."""
        said = said_by(call).context
        if self._tracing and not said.trace_id:
            return said._replace(trace_id=f"{random.getrandbits(128) or 1:032x}")
        return said


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


_NOTHING: Final = Said(NO_CONTEXT, reduce_only=False)
_REDUCING: Final = Said(NO_CONTEXT, reduce_only=True)
_REDUCE_ONLY_KEYS: Final = frozenset((REDUCE_ONLY, REDUCE_ONLY.encode()))
_TRACEPARENT_KEYS: Final = frozenset((TRACEPARENT, TRACEPARENT.encode()))
_KEYS: Final = _REDUCE_ONLY_KEYS | _TRACEPARENT_KEYS | {CORRELATION_ID, CORRELATION_ID.encode()}


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")
