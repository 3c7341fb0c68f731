"""A model server for one test: TorchServe's inference service with a score that is always the same, over TLS."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

from feature_cache import features
from pretrade.wire.torchserve import inference_pb2, inference_pb2_grpc
from server.security.private import write_private
from server.security.settings import TlsSettings
from server.security.tls import Material, grpc_credentials, open_material
from server.security.trial import KeyPair, TrialAuthority
from server.security.watched import Watched

VERSION = "ab" * 8


class Models(inference_pb2_grpc.InferenceAPIsServiceServicer):
    """Scores every row 0.75."""

    def __init__(self) -> None:
        self.calls = 0
        self.callers: set[bytes] = set()
        """Client certificates that were shown."""

    async def Predictions(
        self, request: inference_pb2.PredictionsRequest, context: Any
    ) -> inference_pb2.PredictionResponse:
        self.calls += 1
        self.callers.update(context.auth_context().get("x509_pem_cert", ()))
        rows = len(request.input["input"]) // features.MF1.row_bytes
        header = struct.pack("<4sI8sfIQ", b"PTS1", rows, bytes.fromhex(VERSION), 0.5, features.MF1.fingerprint, 0)
        return inference_pb2.PredictionResponse(prediction=header + np.full(rows, 0.75, "<f4").tobytes())


@dataclass
class ModelServer:
    """A server of models, and its files."""

    directory: Path
    port: int
    models: Models
    material: Watched[Material]

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def install(self, pair: KeyPair, client_ca: bytes | None = None) -> None:
        """Has new connections get another certificate, and those of clients judged by another authority."""
        write_private(self.directory / "server.key", pair.key.decode())
        write_private(self.directory / "server.pem", pair.certificate.decode())
        if client_ca is not None:
            write_private(self.directory / "clients.pem", client_ca.decode())
        assert self.material.look()


def certify(authority: TrialAuthority) -> KeyPair:
    """A certificate for `localhost`."""
    return authority.certify("models", dns=["localhost", "models.example"], ips=["127.0.0.1"])


@asynccontextmanager
async def model_server(
    directory: Path, authority: TrialAuthority, *, client_ca: bytes | None = None
) -> AsyncIterator[ModelServer]:
    """Serves while the context is open.

    Args:
        directory: For its files.
        authority: Of its certificate.
        client_ca: Authority of client certificates, which are then wanted.
    """
    material = _material(directory, certify(authority), client_ca)
    server, models = grpc.aio.server(), Models()
    add: Any = inference_pb2_grpc.add_InferenceAPIsServiceServicer_to_server
    add(models, server)
    port = server.add_secure_port("localhost:0", grpc_credentials(material, client_ca is not None))
    await server.start()
    try:
        yield ModelServer(directory, port, models, material)
    finally:
        await server.stop(0)


def _material(directory: Path, pair: KeyPair, client_ca: bytes | None) -> Watched[Material]:
    directory.mkdir(parents=True, exist_ok=True)
    write_private(directory / "server.key", pair.key.decode())
    write_private(directory / "server.pem", pair.certificate.decode())
    if client_ca is not None:
        write_private(directory / "clients.pem", client_ca.decode())
    settings = TlsSettings(
        certificate=directory / "server.pem",
        key=directory / "server.key",
        client_ca=None if client_ca is None else directory / "clients.pem",
    )
    material = open_material(settings)
    assert material is not None
    return material
