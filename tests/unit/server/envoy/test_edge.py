"""What Envoy is told to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.envoy.edge import Envoy
from server.rpc.ports import GrpcSettings
from server.security.settings import AccessSettings, TlsSettings


def listens_on(host: str, directory: Path) -> dict[str, Any]:
    envoy = Envoy(GrpcSettings(host=host), {}, AccessSettings(), TlsSettings(), directory)
    (listener,) = envoy.config(directory / "admin.sock", 7001, directory)["static_resources"]["listeners"]
    address: dict[str, Any] = listener["address"]["socket_address"]
    return address


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0"])
def test_it_listens_on_the_address_of_the_settings(host: str, tmp_path: Path) -> None:
    assert listens_on(host, tmp_path) == {"address": host, "port_value": 7001}


def test_a_name_is_looked_up_because_envoy_listens_on_addresses_alone(tmp_path: Path) -> None:
    assert listens_on("localhost", tmp_path)["address"] in {"127.0.0.1", "::1"}


def test_all_addresses_of_ipv6_are_those_of_ipv4_too(tmp_path: Path) -> None:
    assert listens_on("::", tmp_path)["ipv4_compat"] is True
