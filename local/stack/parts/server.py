"""The decision server, `python -m server`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from feature_cache.feature_sets import FILE_VARIABLE
from local.stack.errors import NotReadyError
from local.stack.parts.sets_file import sets_file
from local.stack.ports import LOOPBACK
from pretrade.client.credentials import ClientCredentials
from pretrade.client.stack_file import Endpoints

_PROBE_TIMEOUT_SECONDS: Final = 2.0
_INITIAL_STATE: Final = "PRETRADE_CONTROL__INITIAL_TRADING_STATE"


def address(port: int) -> str:
    """The gRPC address of the decision or admin service on this port."""
    return f"{LOOPBACK}:{port}"


def argv(processes: int | None) -> list[str]:
    """Runs it, as several processes if a number is given; what else it needs is in its environment."""
    return [sys.executable, "-m", "server", *(("--processes", str(processes)) if processes else ())]


def env(endpoints: Endpoints, ports: Mapping[str, int], bars_url: str | None = None) -> Mapping[str, str]:
    """Its environment: ours, so that a user's settings of the server reach it, and what the stack decides.

    Args:
        endpoints: What it connects to; where there is none, its own default holds.
        ports: Those it listens on: `decision`, `admin`, `metrics` and `http`.
        bars_url: The database of bars; None where the stack keeps none.
    """
    values = {
        # Everything shares this machine's cores, a replica that is starting most of all.
        "PRETRADE_BUDGET__CAP_SECONDS": os.environ.get("PRETRADE_BUDGET__CAP_SECONDS", "0.2"),
        # A stack whose folder is new has a simulated or recorded market, and nobody who has halted it.
        _INITIAL_STATE: os.environ.get(_INITIAL_STATE, "ACTIVE"),
        "PRETRADE_GRPC__PORT": str(ports["decision"]),
        "PRETRADE_ADMIN__PORT": str(ports["admin"]),
        "PRETRADE_METRICS__PORT": str(ports["metrics"]),
        "PRETRADE_HTTP__PORT": str(ports["http"]),
        "PRETRADE_REDIS_URL": endpoints.redis_url,
        "PRETRADE_DATABASE_URL": endpoints.database_url,
        "PRETRADE_MARKET__BARS_DATABASE_URL": bars_url,
        "PRETRADE_REPLICAS__PRIMARY": endpoints.primary,
        "PRETRADE_REPLICAS__SECONDARY": endpoints.secondary,
        "PRETRADE_REPLICAS__CHALLENGER": endpoints.challenger,
        "PRETRADE_JOURNAL__PATH": endpoints.journal,
        "PRETRADE_REPLAY__MODEL_STORE": endpoints.model_store,
        "PRETRADE_REPLICAS__MANAGEMENT": json.dumps(endpoints.management),
        "PRETRADE_REPLICAS__TOKEN_FILES": json.dumps(endpoints.token_files),
        "PRETRADE_INSTRUMENTS": json.dumps(endpoints.instruments),
        **sets_file(FILE_VARIABLE),
    }
    return os.environ | {name: value for name, value in values.items() if value is not None}


def admin_credentials(endpoints: Endpoints) -> ClientCredentials:
    """What to show to the admin service: what the environment says, else the operator token."""
    assert endpoints.admin is not None
    token_file = None if endpoints.operator_token_file is None else Path(endpoints.operator_token_file)
    return ClientCredentials.from_environment().or_operator_token(endpoints.admin, token_file)


def ready(port: int) -> None:
    """Asks for the health of the whole server.

    Raises:
        NotReadyError: It is not serving, or not there yet.
        CredentialsError: The credentials of the environment cannot be used.
    """
    with ClientCredentials.from_environment().channel(address(port)) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )
        call = check.future(HealthCheckRequest(), timeout=_PROBE_TIMEOUT_SECONDS)
        if call.code() is not grpc.StatusCode.OK:
            raise NotReadyError(f"{call.code().name}: {call.details()}")
        status = call.result().status
    if status != HealthCheckResponse.SERVING:
        raise NotReadyError(HealthCheckResponse.ServingStatus.Name(status))
