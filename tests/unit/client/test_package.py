"""What `from pretrade.client import …` loads and offers."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

import pytest

import pretrade.client

HEAVY: Final = ("typer", "rich", "pydantic", "numpy", "opentelemetry", "server", "fallback", "local", "loadtest")


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] if name != "pretrade.client" else name for name in done.stdout.split()}


def test_the_package_itself_loads_no_grpc() -> None:
    assert not {"grpc", "google", *HEAVY} & loaded_by("import pretrade.client")


def test_the_clients_load_grpc_and_protobuf_and_nothing_that_is_heavy() -> None:
    loaded = loaded_by("from pretrade.client import AsyncClient, Client, Order")
    assert {"grpc", "google"} <= loaded
    assert not loaded.intersection(HEAVY)


def test_every_name_that_is_offered_is_there_and_no_other() -> None:
    for name in dir(pretrade.client):
        assert getattr(pretrade.client, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Cleint'"):
        _ = pretrade.client.Cleint
