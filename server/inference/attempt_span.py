"""The span id of an attempt, chosen before the span exists, so that it can be sent to the model server."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fallback.order import Case


def attempt_span(case: Case) -> tuple[str, str]:
    """The id of an attempt's span, and the `traceparent` that leads to it; both empty without tracing."""
    trace_id = case.order.context.trace_id
    if not trace_id:
        return "", ""
    span_id = f"{random.getrandbits(64) or 1:016x}"
    return span_id, f"00-{trace_id}-{span_id}-01"
