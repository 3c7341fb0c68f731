"""TLS as Envoy's configuration: secrets in files of their own, which Envoy reads again when they are replaced."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, Final

from server.security.private import write_private
from server.security.settings import AccessSettings
from server.security.tls import Material

_TLS: Final = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3."
_SERVER: Final = "server"
_CLIENTS: Final = "clients"


def publish(directory: Path, material: Material) -> None:
    """Writes the secrets that `transport_socket` names, each atomically, readable for our user alone.

    Raises:
        OSError: They cannot be written.
    """
    # Revocations are ours to judge, on both edges: Envoy would refuse everybody once a list is out of date.
    if material.client_ca is not None:
        _write(directory, _CLIENTS, {"validation_context": {"trusted_ca": _inline(material.client_ca)}})
    server = {"certificate_chain": _inline(material.chain), "private_key": _inline(material.key)}
    _write(directory, _SERVER, {"tls_certificate": server})


def _write(directory: Path, name: str, secret: dict[str, Any]) -> None:
    resource = {"@type": f"{_TLS}Secret", "name": name, **secret}
    write_private(directory / f"{name}.json", json.dumps({"resources": [resource]}))


def _inline(contents: bytes) -> dict[str, str]:
    return {"inline_bytes": base64.b64encode(contents).decode()}


def secure(filter_chain: dict[str, Any], http: dict[str, Any], access: AccessSettings, directory: Path) -> None:
    """Has Envoy speak TLS on a filter chain, and tell us of a client's certificate.

    Args:
        filter_chain: Of the listener.
        http: Its connection manager's configuration.
        access: Whether client certificates are wanted.
        directory: Where `publish` writes.
    """
    common: dict[str, Any] = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_certificate_sds_secret_configs": [_file(directory, _SERVER)],
    }
    context: dict[str, Any] = {"@type": f"{_TLS}DownstreamTlsContext", "common_tls_context": common}
    if access.decision == "certificate":
        common["validation_context_sds_secret_config"] = _file(directory, _CLIENTS)
        context["require_client_certificate"] = True
        # In place of whatever a client says of itself.
        http["forward_client_cert_details"] = "SANITIZE_SET"
        http["set_current_client_cert_details"] = {"cert": True}
    filter_chain["transport_socket"] = {"name": "tls", "typed_config": context}


def _file(directory: Path, name: str) -> dict[str, Any]:
    source = {"path_config_source": {"path": str(directory / f"{name}.json")}, "resource_api_version": "V3"}
    return {"name": name, "sds_config": source}


NODE: Final = {"id": "pretrade", "cluster": "pretrade"}
"""Envoy wants a name for itself before it reads secrets."""
