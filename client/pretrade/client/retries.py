"""How a caller tries again: when, how often, and how long after; and the delay that a refusal asks for.

`policy` keeps to it in `Client` and `AsyncClient`. `POLICY` says the same to gRPC's own retries, for callers in other
languages and for programs that use the stubs: gRPC knows one server, no health, and no share of a deadline.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

import grpc

PUSHBACK: Final = "grpc-retry-pushback-ms"
REPEATED: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""The order may not have been decided; under its idempotency key it is decided once, however often it is asked."""
FIRST_PAUSE_SECONDS: Final = 0.005
LONGEST_PAUSE_SECONDS: Final = 0.1
PAUSE_FACTOR: Final = 4
SPARE_FAILURES: Final = 25
"""Failures that nobody has made up for, from which on nobody tries again. A success makes up for half of one."""
CHANNEL_OPTIONS: Final = (
    # A server that is back is found in 0.1 s, not after gRPC's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
"""How a channel looks for a server that it has lost."""

POLICY: Final[dict[str, Any]] = {
    "methodConfig": [
        {
            "name": [{"service": "pretrade.decision.v1.DecisionService"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": f"{FIRST_PAUSE_SECONDS}s",
                "maxBackoff": f"{LONGEST_PAUSE_SECONDS}s",
                "backoffMultiplier": PAUSE_FACTOR,
                "retryableStatusCodes": ["RESOURCE_EXHAUSTED", *(code.name for code in REPEATED)],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 2 * SPARE_FAILURES, "tokenRatio": 0.5},
}
"""A gRPC service config, with which a call is made again within its deadline.

- RESOURCE_EXHAUSTED: the server has too many orders, and says after how long to ask again. gRPC then waits for exactly
  that time, and not for the backoff.
- UNAVAILABLE, CANCELLED: the server drains. On grpc.aio it resets a call that crosses its GOAWAY.

A call that fails takes a token, one that succeeds gives half of one back. Below half of the tokens nobody tries again,
so that an overloaded server is not asked even more often.
"""
OPTIONS: Final[tuple[tuple[str, Any], ...]] = (("grpc.service_config", json.dumps(POLICY)),)
"""Options of a channel with this policy."""


def retry_delay(error: grpc.RpcError) -> float | None:
    """After how many seconds a call that failed may be made again; infinite if never, None if nobody says.

    For callers that count refusals, or decide on something else meanwhile, and therefore do without gRPC's own retries.
    """
    metadata = getattr(error, "trailing_metadata", lambda: None)()
    for key, value in metadata or ():
        if key == PUSHBACK:
            try:
                milliseconds = int(value)
            except ValueError:
                return math.inf  # what is no number means the same to gRPC
            return milliseconds / 1e3 if milliseconds >= 0 else math.inf
    return None
