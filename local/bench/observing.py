"""What observes a server in a benchmark, or nothing: a trace collector, scrapes of metrics, callers who watch."""

from __future__ import annotations

import os
import selectors
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
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


_WATCHED: Final = ("/v1/decisions/events?filter.strategies=nobody",) * 16 + ("/v1/signals/events",) * 64
"""As many as one process takes. Those of decisions wait for some of a strategy that there is not."""


@contextmanager
def watching(address: str, token_file: Path) -> Iterator[None]:
    """Watches a server over HTTP, as many at once as may.

    Raises:
        OSError: It does not let all of them watch.
    """
    token = token_file.read_text().strip()
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for path in _WATCHED:
            host, _, port = address.partition(":")
            caller = stack.enter_context(socket.create_connection((host, int(port)), timeout=30.0))
            caller.sendall(f"GET {path} HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {token}\r\n\r\n".encode())
            if not caller.recv(65_536).startswith(b"HTTP/1.1 200 "):
                raise OSError(f"{address}{path} is not watched")
            selector.register(caller, selectors.EVENT_READ)
        done = threading.Event()

        def read() -> None:
            while not done.is_set():
                for key, _ in selector.select(1.0):
                    key.fileobj.recv(65_536)  # type: ignore[union-attr]  # a socket

        thread = threading.Thread(target=read, name="watch")
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
