"""How a caller tries again: gRPC's retry policy for `DecisionService`, and the delay that a refusal asks for."""

from __future__ import annotations

import json
import math
from typing import Any, Final

import grpc

_PUSHBACK: Final = "grpc-retry-pushback-ms"

POLICY: Final[dict[str, Any]] = {
    "methodConfig": [
        {
            "name": [{"service": "pretrade.decision.v1.DecisionService"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.005s",
                "maxBackoff": "0.1s",
                "backoffMultiplier": 4,
                "retryableStatusCodes": ["RESOURCE_EXHAUSTED", "UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": 50, "tokenRatio": 0.5},
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
        if key == _PUSHBACK:
            try:
                milliseconds = int(value)
            except ValueError:
                return math.inf  # what is no number means the same to gRPC
            return milliseconds / 1e3 if milliseconds >= 0 else math.inf
    return None
