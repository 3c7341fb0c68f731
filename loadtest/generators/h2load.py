"""Closed-loop load by h2load, which takes a fraction of the CPU that callers in Python take from the server.

It sends one request again and again, and counts every HTTP 200 as a success, gRPC errors included. Take the number of
decisions from the server instead. Its latencies are those of all answers, refusals included.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
from numpy.typing import NDArray

from loadtest.generators.load import Call, decision_calls
from pretrade.decision.v1 import decision_pb2 as pb

_MOST_CONNECTIONS: Final = 16
_DONE: Final = re.compile(r"^requests: .*?(\d+) done, (\d+) succeeded", re.MULTILINE)
_DATA: Final = re.compile(r"^traffic: .*\((\d+)\) data", re.MULTILINE)
_GRPC: Final = ("-H", "content-type: application/grpc", "-H", "te: trailers")
_JSON: Final = ("--h1", "-H", "content-type: application/json")
_FATAL_SECONDS: Final = 30.0
_TRIED: Final = 4
"""Calls of each caller that tell how many there is time for, where none may be cut off."""


@dataclass(frozen=True, slots=True)
class Run:
    """What h2load saw."""

    seconds: float
    answers: int
    """With HTTP status 2xx."""
    latencies: Sequence[float] | NDArray[np.float64]
    """Seconds, of every call."""
    failed: int = 0
    """Answers with another status, or calls that broke off."""
    data_bytes: int = 0
    """Of all bodies, headers and trailers apart."""

    @property
    def p50_ms(self) -> float:
        """The median latency."""
        return self._percentile_ms(50)

    @property
    def p99_ms(self) -> float:
        """What one call in a hundred takes longer than."""
        return self._percentile_ms(99)

    @property
    def p999_ms(self) -> float:
        """What one in a thousand does."""
        return self._percentile_ms(99.9)

    def _percentile_ms(self, percent: float) -> float:
        return 1e3 * float(np.percentile(self.latencies, percent))


def is_installed() -> bool:
    """Whether there is an h2load (Debian: `nghttp2-client`)."""
    return shutil.which("h2load") is not None


def call_decide(target: str, order: pb.Order, callers: int, seconds: float) -> Run:
    """`callers` calls of `Decide` under way at once; see `call`."""
    return call(target, decision_calls([order])["unary", 1], callers, seconds)


def call(target: str, request: Call, callers: int, seconds: float) -> Run:
    """A number of calls under way at once, on up to 16 connections; over HTTP/1.1 each on its own.

    At the end of the time it cuts off what is under way, unless the request may not be.

    Args:
        target: `HOST:PORT`.
        request: Sent again and again.
        callers: Calls under way at once.
        seconds: How long.

    Raises:
        RuntimeError: It failed, or got no answer.
    """
    connections = min(callers, _MOST_CONNECTIONS) if request.is_grpc else callers
    with TemporaryDirectory() as folder:
        body, log = Path(folder, "body"), Path(folder, "log")
        body.write_bytes(request.body)
        argv = [
            *("h2load", "-c", str(connections), "-m", str(callers // connections)),
            *("-d", str(body), *(_GRPC if request.is_grpc else _JSON)),
            *(f"--log-file={log}", f"http://{target}{request.path}"),
        ]

        def run(*until: str) -> Run:
            limit = seconds + _FATAL_SECONDS
            ended = subprocess.run([*argv, *until], capture_output=True, text=True, timeout=limit, check=False)  # noqa: S603
            if ended.returncode or not log.stat().st_size:
                raise RuntimeError(f"h2load against {target} got no answer {ended.stderr[-500:]}".rstrip())
            began, micros = np.loadtxt(log, dtype=np.int64, usecols=(0, 2), ndmin=2).T
            took = seconds if request.may_be_cut else float((began + micros).max() - began.min()) / 1e6
            return parse(ended.stdout, took, micros / 1e6)

        if request.may_be_cut:
            return run("-D", f"{1e3 * seconds:.0f}ms")
        tried = run("-n", str(_TRIED * callers))
        return run("-n", str(max(callers, round(tried.answers / tried.seconds * seconds))))


def parse(output: str, seconds: float, latencies: NDArray[np.float64]) -> Run:
    """Reads what h2load printed.

    Raises:
        RuntimeError: There was no answer.
    """
    done, data = _DONE.search(output), _DATA.search(output)
    if done is None or data is None or not int(done[2]):
        raise RuntimeError("h2load got no answer")
    return Run(seconds, int(done[2]), latencies, int(done[1]) - int(done[2]), int(data[1]))
