"""One variable, with a path as anybody would type it, names the file with feature sets for all parts that read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from local.stack.parts import server, worker
from pretrade.client.stack_file import Endpoints

SERVER, WORKER = "PRETRADE_FEATURES__FILE", "PRETRADE_WORKER_FEATURES_FILE"
ENDPOINTS = Endpoints(
    redis_url="redis://127.0.0.1:1",
    kafka_bootstrap_servers="127.0.0.1:2",
    database_url=None,
    primary=None,
    secondary=None,
    challenger=None,
    decision=None,
    admin=None,
    metrics_url=None,
    worker_url=None,
    journal=None,
    model_store=None,
    instruments=("BTCUSDT.SIM",),
)
PORTS = {"decision": 1, "admin": 2, "metrics": 3, "http": 4}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(SERVER, raising=False)
    monkeypatch.delenv(WORKER, raising=False)
    return tmp_path


def test_worker_and_server_get_the_file_though_they_run_elsewhere(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER, "sets.py")
    assert worker.env(ENDPOINTS, 4, None)[WORKER] == str(here / "sets.py")
    assert server.env(ENDPOINTS, PORTS)[SERVER] == str(here / "sets.py")


def test_the_workers_own_variable_comes_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVER, "/sets/all.py")
    monkeypatch.setenv(WORKER, "computed.py")
    assert worker.env(ENDPOINTS, 4, None)[WORKER] == str(here / "computed.py")
    assert server.env(ENDPOINTS, PORTS)[SERVER] == "/sets/all.py"


def test_without_a_file_none_is_named() -> None:
    assert WORKER not in worker.env(ENDPOINTS, 4, None)
    assert SERVER not in server.env(ENDPOINTS, PORTS)
