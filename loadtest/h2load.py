"""Closed-loop load by h2load, which takes a fraction of the CPU that callers in Python take from the server.

It sends one request again and again and takes every HTTP 200 for a success, gRPC errors included: whoever uses it asks
the server how many there were.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np

from pretrade.decision.v1 import decision_pb2 as pb

_DECIDE: Final = "/pretrade.decision.v1.DecisionService/Decide"
_MOST_CONNECTIONS: Final = 16
_DONE: Final = re.compile(r"requests: .*?(\d+) done, (\d+) succeeded")
_FATAL_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Run:
    """What h2load saw."""

    seconds: float
    answers: int
    p50_ms: float
    p99_ms: float
    p999_ms: float


def is_installed() -> bool:
    """Whether there is an h2load (Debian: `nghttp2-client`)."""
    return shutil.which("h2load") is not None


def call_decide(target: str, order: pb.Order, callers: int, seconds: float) -> Run:
    """`callers` calls of `Decide` under way at once, on up to 16 connections.

    Args:
        target: `HOST:PORT`.
        order: Sent again and again.
        callers: Calls under way at once.
        seconds: How long.

    Raises:
        RuntimeError: It failed, or got no answer.
    """
    message = pb.DecideRequest(order=order).SerializeToString()
    connections = min(callers, _MOST_CONNECTIONS)
    with TemporaryDirectory() as folder:
        body, log = Path(folder, "body"), Path(folder, "log")
        body.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
        argv = [
            *("h2load", "-c", str(connections), "-m", str(callers // connections), "-D", f"{1e3 * seconds:.0f}ms"),
            *("-d", str(body), "-H", "content-type: application/grpc", "-H", "te: trailers"),
            *(f"--log-file={log}", f"http://{target}{_DECIDE}"),
        ]
        limit = seconds + _FATAL_SECONDS
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=limit, check=False)  # noqa: S603
        done = _DONE.search(ended.stdout)
        if ended.returncode or done is None or not int(done[2]):
            raise RuntimeError(f"h2load against {target}: {ended.stdout[-500:]}{ended.stderr[-500:]}")
        micros = np.loadtxt(log, dtype=np.int64, usecols=2, ndmin=1)
    p50, p99, p999 = np.percentile(micros, (50, 99, 99.9)) / 1e3
    return Run(seconds, int(done[2]), float(p50), float(p99), float(p999))
