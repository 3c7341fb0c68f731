"""Serves metrics and health of the worker, and of a live feed, over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment


class _QuietHandler(WSGIRequestHandler):
    timeout = 10.0
    """Seconds that a caller may take to send its request, or to read the answer."""

    def handle(self) -> None:
        """As the base class, without a traceback for a caller that is slow or gone."""
        with suppress(TimeoutError, ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 — the base class names it so
        """Says nothing: a line for every scrape and probe would drown the log."""


@contextmanager
def serve_http(
    host: str,
    port: int,
    collector: Collector,
    problem: Callable[[], str | None],
    not_ready: Callable[[], str | None],
) -> Iterator[int]:
    """Serves `/metrics`, `/healthz` and `/readyz` while the context is open.

    Each request has a thread: a probe must not wait for a caller that has connected and says nothing.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        collector: What `/metrics` shows.
        problem: Why the worker is not healthy, or None: `/healthz` answers 503 with the reason, or 200.
        not_ready: Why its vectors are not all good to decide on, or None: `/readyz`, likewise.

    Yields:
        The port.
    """
    registry = CollectorRegistry()
    registry.register(collector)
    metrics = make_wsgi_app(registry)

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return cast("Iterable[bytes]", metrics(environ, start_response))
        checks = {"/healthz": problem, "/readyz": not_ready}
        reason = checks[path]() if path in checks else "not found"
        status = {None: "200 OK", "not found": "404 Not Found"}.get(reason, "503 Service Unavailable")
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{reason or 'ok'}\n".encode()]

    with make_server(host, port, answer, ThreadingWSGIServer, _QuietHandler) as server:
        thread = threading.Thread(target=server.serve_forever, name="http", daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
