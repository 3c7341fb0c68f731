"""A server as the composition root makes it asks for credentials; quick, so that nobody loses that in passing."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from server.composition.ports import grpc_server
from server.rpc.health import HealthServicer
from server.security.security import Plane, Security
from server.security.trial import ISSUER, TrialIssuer, jwks
from server.settings import Settings


class Admin(admin_pb2_grpc.AdminServiceServicer):
    """Answers whoever gets so far."""

    async def GetStatus(self, request: Any, context: Any) -> admin_pb2.GetStatusResponse:
        return admin_pb2.GetStatusResponse(instance_id="answered")

    async def SetFlag(self, request: Any, context: Any) -> admin_pb2.SetFlagResponse:
        return admin_pb2.SetFlagResponse()


@pytest.mark.parametrize("plane", ["admin", "decision"])
async def test_a_port_asks_for_credentials(plane: Plane, tmp_path: Path) -> None:
    issuer = TrialIssuer()
    (tmp_path / "jwks.json").write_text(jwks((issuer,)))
    tokens = {"jwks": str(tmp_path / "jwks.json"), "issuer": ISSUER}
    settings = Settings.model_validate(
        {"tokens": tokens, "access": {plane: "token", "roles": {"claim:viewer": "viewer"}}}
    )

    async def record(entry: bytes) -> None:
        return None

    security = Security(settings.tls, settings.tokens, settings.access, None, record, "test", time.monotonic)
    server = grpc_server(settings, security.access(plane), Counter())
    add: Any = admin_pb2_grpc.add_AdminServiceServicer_to_server
    add(Admin(), server)  # type: ignore[abstract]  # the other methods answer UNIMPLEMENTED
    health = HealthServicer()
    health.set("", True)
    add_health: Any = health_pb2_grpc.add_HealthServicer_to_server
    add_health(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = admin_pb2_grpc.AdminServiceStub(channel)
            probe: Any = health_pb2_grpc.HealthStub(channel)
            shown = (("authorization", f"Bearer {issuer.token('a', ['viewer'])}"),)
            look, change = admin_pb2.GetStatusRequest(), admin_pb2.SetFlagRequest()
            calls = [
                (stub.GetStatus(look, timeout=20), grpc.StatusCode.UNAUTHENTICATED),
                (stub.GetStatus(look, timeout=20, metadata=shown), grpc.StatusCode.OK),
                (stub.SetFlag(change, timeout=20, metadata=shown), grpc.StatusCode.PERMISSION_DENIED),
                (probe.Check(health_pb2.HealthCheckRequest(), timeout=20), grpc.StatusCode.OK),
            ]
            assert [await call.code() for call, _ in calls] == [code for _, code in calls]
    finally:
        await server.stop(0)
