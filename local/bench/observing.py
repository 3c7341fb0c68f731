"""What observes a server in a benchmark: a trace collector and a client that scrapes metrics, or nothing at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.request import urlopen

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from local.stack.ports import LOOPBACK

_SCRAPE_SECONDS: Final = 5.0
"""As often as `prometheus.yaml` has it."""


class _Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def Export(  # noqa: N802 - the protocol's name
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Takes some spans."""
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def trace_collector() -> Iterator[str]:
    """A running collector, which keeps nothing; yields its `HOST:PORT`."""
    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Collector(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port(f"{LOOPBACK}:0")
    server.start()
    try:
        yield f"{LOOPBACK}:{port}"
    finally:
        server.stop(0).wait()


@contextmanager
def scraping(urls: Sequence[str]) -> Iterator[None]:
    """Scrapes metrics every five seconds, as Prometheus would."""
    done = threading.Event()

    def scrape() -> None:
        while not done.wait(_SCRAPE_SECONDS):
            for url in urls:
                with urlopen(url, timeout=5.0) as response:  # noqa: S310 - our own
                    response.read()

    thread = threading.Thread(target=scrape, name="scrape")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def uncounted(directory: Path) -> dict[str, str]:
    """The environment in which a server counts nothing: every Python imports `local.bench.uncounted` first."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sitecustomize.py").write_text("import local.bench.uncounted\n")
    root = Path(__file__).parents[2]
    others = os.environ.get("PYTHONPATH", "")
    path = filter(None, (str(directory), str(root), str(root / "proto" / "gen"), others))
    return {"PYTHONPATH": os.pathsep.join(path)}
