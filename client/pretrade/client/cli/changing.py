"""How a command makes a change: it shows the change where that is a risk, asks, makes it, and says what was made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, Final, cast

import grpc
import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.client.cli.change_options import How
from pretrade.client.cli.connection import RPC_SECONDS
from pretrade.client.enum_names import enum_name

NOT_CONFIRMED: Final = 1
IN_DOUBT: Final = 7
_CHAMPIONS: Final = (admin_pb2.REPLICA_ROLE_PRIMARY, admin_pb2.REPLICA_ROLE_SECONDARY)
_UNKNOWN: Final = "it is not known whether the change was made"
_STATUS_DETAILS: Final = "grpc-status-details-bin"
"""Trailing metadata with which a server itself says why it refuses."""


def changed(
    call: Callable[..., Any],
    request: Any,
    how: How,
    risk: str | Callable[[Any], str] = "",
    expires_in_seconds: float | None = None,
    rpc_seconds: float = RPC_SECONDS,
) -> Any:
    """Makes a change, once it is confirmed where it is a risk.

    Args:
        call: The method that makes it.
        request: What it is given; `how` is added to it.
        how: The command's options.
        risk: What it may do to trading, where that must be confirmed; or what says so, given the response of a dry run.
        expires_in_seconds: After which the change reverts by itself; None for never.
        rpc_seconds: How long the server may take.

    Returns:
        The response.

    Raises:
        typer.Exit: It was not confirmed, or it is not known whether it was made.
    """
    request.author, request.reason = how.author, how.reason
    if expires_in_seconds is not None:
        duration = Duration()
        duration.FromNanoseconds(int(expires_in_seconds * 1e9))
        request.expires_in.CopyFrom(duration)
    if how.expect is not None:
        request.expected_control_version = how.expect
    if risk and not how.yes and not how.dry_run:
        request.dry_run = True
        would = call(request, timeout=rpc_seconds)
        request.expected_control_version = would.change.version
        confirm(would.change, risk if isinstance(risk, str) else risk(would))
    request.dry_run = how.dry_run
    try:
        return call(request, timeout=rpc_seconds)
    except grpc.RpcError as error:
        if how.dry_run or not _may_have_arrived(error):
            raise
        why = error.details() or ""
        typer.echo(why if why.startswith(_UNKNOWN) else f"{_UNKNOWN}: {why}", err=True)
        raise typer.Exit(IN_DOUBT) from None


def confirm(would: admin_pb2.Change, risk: str) -> None:
    """Shows what would change and asks. Raises `typer.Exit` unless the answer is yes."""
    for line in would.diff or ("nothing would change",):
        typer.echo(line)
    typer.echo(risk)
    if not sys.stdin.isatty():
        typer.echo("not confirmed, nothing changed: no terminal to ask on, give --yes", err=True)
        raise typer.Exit(NOT_CONFIRMED)
    if not typer.confirm("Do it?"):
        typer.echo("not confirmed, nothing changed")
        raise typer.Exit(NOT_CONFIRMED)


def show(response: Message, change: admin_pb2.Change, *, as_json: bool) -> None:
    """Prints what was changed, or would be."""
    if as_json:
        print(MessageToJson(response))
        return
    for line in change.diff or (f"{change.subject}: {change.value}, as before",):
        print(f"{line}{'  (dry run)' if change.dry_run else ''}")
    print(f"control state: version {change.version}")
    if change.unsaved:
        typer.echo(
            "neither Redis nor the disk took it: in force in one process, and forgotten when that ends", err=True
        )
    elif change.local:
        typer.echo("Redis did not answer: in force on this server, on all others when it answers again", err=True)


def without(stub: admin_pb2_grpc.AdminServiceStub, replica: str) -> str:
    """The risk of taking a replica out: none while another champion gets orders."""
    if not _is_champions(replica):
        return ""
    return risk_without(stub.ListReplicas(admin_pb2.ListReplicasRequest(), timeout=RPC_SECONDS).replicas, replica)


def risk_without(found: Iterable[admin_pb2.ReplicaStatus], replica: str) -> str:
    """The same, where it is known which replicas there are."""
    if not _is_champions(replica):
        return ""
    model, _, name = replica.rpartition("/")
    others = [
        one
        for one in found
        if one.role in _CHAMPIONS
        and one.name.rpartition("/")[0] == model
        and replica != one.name
        and name != _role_of(one)
    ]
    if any(one.healthy and not one.drained and _passes(one) for one in others):
        return ""
    return "No champion is left then: cached scores, rules or no source will answer."


def _is_champions(replica: str) -> bool:
    return replica.rpartition("/")[2].startswith(("primary", "secondary"))


def _role_of(replica: admin_pb2.ReplicaStatus) -> str:
    return enum_name(admin_pb2.ReplicaRole, replica.role).lower()


def _passes(replica: admin_pb2.ReplicaStatus) -> bool:
    if replica.breaker_mode == admin_pb2.BREAKER_MODE_AUTOMATIC:
        return replica.breaker_state == admin_pb2.BREAKER_STATE_CLOSED
    return replica.breaker_mode != admin_pb2.BREAKER_MODE_FORCED_OPEN


def _may_have_arrived(error: grpc.RpcError) -> bool:
    """Whether a call that failed for its connection, or for its time, may have been carried out all the same.

    A broken connection leaves no doubt when the server itself says why it refuses, or when there never was a
    connection. The library tells the latter apart in its message alone. Should that change, an operator looks at
    `pretrade changes` once too often.
    """
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return True
    if error.code() is not grpc.StatusCode.UNAVAILABLE:
        return False
    if any(name == _STATUS_DETAILS for name, _ in cast("grpc.Call", error).trailing_metadata() or ()):
        return False
    return not (error.details() or "").startswith("failed to connect")
