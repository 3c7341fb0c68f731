"""The file that tells other commands where the stack is."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from pydantic import ValidationError

from local.endpoints import Endpoints, StackFile
from local.server import env

ENDPOINTS = Endpoints(
    redis_url="redis://127.0.0.1:1/0",
    kafka_bootstrap_servers="127.0.0.1:2",
    database_url="postgresql+psycopg://pretrade:secret@127.0.0.1:3/pretrade",
    primary="127.0.0.1:4",
    secondary="127.0.0.1:5",
    challenger=None,
    decision="127.0.0.1:6",
    admin="127.0.0.1:7",
    metrics_url="http://127.0.0.1:8",
    worker_url="http://127.0.0.1:9",
    journal="/j",
    model_store="/somewhere/models",
    instruments=("BTCUSDT.SIM",),
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    stack = StackFile(pid=os.getpid(), endpoints=ENDPOINTS, processes={"valkey": 1})
    stack.write(tmp_path)
    stack.write(tmp_path)
    assert StackFile.read(tmp_path) == stack
    assert stat.S_IMODE((tmp_path / "stack.json").stat().st_mode) == 0o600


def test_there_is_no_stack_without_a_file(tmp_path: Path) -> None:
    assert StackFile.read(tmp_path) is None


def test_the_file_of_a_stack_that_was_killed_is_ignored(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    StackFile(pid=child, endpoints=ENDPOINTS, processes={}).write(tmp_path)
    assert StackFile.read(tmp_path) is None


def test_a_file_of_another_shape_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text("{}")
    with pytest.raises(ValidationError):
        StackFile.read(tmp_path)


def test_the_database_is_shown_without_its_password() -> None:
    assert ENDPOINTS.database_address == "127.0.0.1:3"
    assert ENDPOINTS.model_copy(update={"database_url": "sqlite:///audit.db"}).database_address is None


def test_the_server_is_told_what_the_stack_has_and_keeps_its_defaults_for_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PRETRADE_BUDGET__CAP_SECONDS", "0.2")
    values = env(ENDPOINTS, {"decision": 6, "admin": 7, "metrics": 8})
    assert values["PRETRADE_REDIS_URL"] == "redis://127.0.0.1:1/0"
    assert values["PRETRADE_REPLICAS__PRIMARY"] == "127.0.0.1:4"
    assert "PRETRADE_REPLICAS__CHALLENGER" not in values
    assert values["PRETRADE_INSTRUMENTS"] == '["BTCUSDT.SIM"]'
    assert values["PRETRADE_BUDGET__CAP_SECONDS"] == "0.2"
