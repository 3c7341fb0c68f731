"""A proxy that a user has set is not asked for what runs on this machine."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from typer.testing import CliRunner

from pretrade.client.cli.main import app
from pretrade.client.proxies import spare_this_machine

VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "no_proxy", "no_grpc_proxy")


@pytest.fixture(autouse=True)
def proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that is not there: what asks it fails."""
    for name in (*VARIABLES, *map(str.upper, VARIABLES)):
        monkeypatch.setenv(name, "")  # so that what the code under test sets is gone afterwards
        monkeypatch.delenv(name)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    # urllib keeps the proxies that were set when this process first opened a URL.
    monkeypatch.setattr(urllib.request, "_opener", None)


def test_what_a_user_excepts_stays_excepted() -> None:
    environment = {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "intern.example, 10.0.0.0/8"}
    spare_this_machine(environment)
    spare_this_machine(environment)
    assert environment["no_proxy"] == "intern.example,10.0.0.0/8,127.0.0.1,localhost,::1"
    both = {"grpc_proxy": "http://proxy:3128", "no_proxy": "a", "no_grpc_proxy": "b"}
    spare_this_machine(both)
    assert both["no_grpc_proxy"] == "b,127.0.0.1,localhost,::1"


@pytest.mark.parametrize("environment", [{}, {"no_proxy": "a"}, {"http_proxy": ""}])
def test_without_a_proxy_nothing_changes(environment: dict[str, str]) -> None:
    before = dict(environment)
    spare_this_machine(environment)
    assert environment == before


@pytest.fixture
def http_address() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def grpc_address() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    add_HealthServicer_to_server(health.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def is_reached(http_address: str, grpc_address: str) -> list[bool]:
    try:
        with urlopen(http_address, timeout=5.0):
            over_http = True
    except OSError:
        over_http = False
    with grpc.insecure_channel(grpc_address) as channel:
        try:
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=HealthCheckRequest.SerializeToString,
                response_deserializer=HealthCheckResponse.FromString,
            )
            answer = check(HealthCheckRequest(), timeout=5.0)
        except grpc.RpcError:
            return [over_http, False]
        return [over_http, answer.status == HealthCheckResponse.SERVING]


def test_every_command_reaches_what_runs_here(http_address: str, grpc_address: str) -> None:
    assert is_reached(http_address, grpc_address) == [False, False], "the proxy is not asked, which this is about"
    assert CliRunner().invoke(app, ["decide", "--help"]).exit_code == 0
    assert is_reached(http_address, grpc_address) == [True, True]
