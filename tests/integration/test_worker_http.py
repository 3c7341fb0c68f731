"""Health and metrics of worker and live feed over HTTP, whoever else is connected."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from feature_cache.metrics_http import serve_http


class NoMetrics(Collector):
    def collect(self) -> Iterator[Metric]:
        return iter(())


def answer(port: int, path: str) -> tuple[int, str]:
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as reply:
            return reply.status, reply.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_what_is_wrong_is_told_with_its_status() -> None:
    with serve_http("127.0.0.1", 0, NoMetrics(), lambda: None, lambda: "book unknown: A.SIM (gap)") as port:
        assert answer(port, "/healthz") == (200, "ok\n")
        assert answer(port, "/readyz") == (503, "book unknown: A.SIM (gap)\n")
        assert answer(port, "/metrics")[0] == 200
        assert answer(port, "/") == (404, "not found\n")


def test_a_probe_does_not_wait_for_callers_that_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with serve_http("127.0.0.1", 0, NoMetrics(), lambda: None, lambda: None) as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        try:
            silent[0].sendall(b"GET /metrics HTTP/1.1\r\n")
            assert answer(port, "/healthz") == (200, "ok\n")
        finally:
            for connection in silent:
                connection.close()
        assert answer(port, "/healthz") == (200, "ok\n")
    assert capfd.readouterr().err == ""
