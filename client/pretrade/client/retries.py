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
    # A server that listens again is found within 0.12 s, not after gRPC's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
    # Despite its name, how long one attempt to connect may take: TLS to another continent takes four round trips.
    ("grpc.min_reconnect_backoff_ms", 1_500),
    # A server that was replaced may have another address: it is looked up again as soon.
    ("grpc.dns_min_time_between_resolutions_ms", 300),
    # A connection that swallows everything stays open for many minutes without these. The first two find it where
    # nothing was under way, and the third where a ping of gRPC's own was, for which it waits a minute by default.
    # A server of ours closes connections that are pinged more often than every 10 s.
    ("grpc.keepalive_time_ms", 12_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
)
"""How a channel looks for a server that it has lost, and notices that it has lost it."""

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
