"""Commands that steer running servers: `breaker`, `flag`, `state`, `replica`, `chain`, `changes`, `config`.

Every change records who made it and why. `--dry-run` checks it without making it, and `--expect` ties it to a version
of the control state. A command that may harm trading first shows what it will do and asks for confirmation; without a
terminal it needs `--yes`. A confirmed change is made exactly as it was shown: if the control state has changed
meanwhile, the command fails.
"""

from __future__ import annotations

import datetime as dt
import enum
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Final, cast

import grpc
import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.client.cli.connection import connected
from pretrade.client.cli.options import (
    USER,
    AdminTarget,
    AsJson,
    Author,
    Directory,
    DryRun,
    Expect,
    For,
    Reason,
    Yes,
    seconds,
)
from pretrade.client.cli.views import RPC_SECONDS, replica_table
from pretrade.client.enum_names import enum_name
from pretrade.client.stack_file import DEFAULT_DIRECTORY

EXIT_CODES: Final = (
    "Exit codes: 0 done; 1 refused by the server, or not confirmed; 2 wrong usage; 3 no server could be reached; "
    "4 another change came first: look again; 7 not known whether it was done: look at `pretrade changes`."
)
_CHAMPIONS: Final = ("primary", "secondary")
_STRICTNESS: Final = ("active", "reducing", "halted")
_STATUS_DETAILS: Final = "grpc-status-details-bin"
"""Trailing metadata with which a server itself says why it refuses."""

app = typer.Typer()

ReplicaName = Annotated[
    str,
    typer.Argument(
        help="primary, secondary or challenger.", autocompletion=lambda: ["primary", "secondary", "challenger"]
    ),
]
_REASON: Final = "set from the command line"


class BreakerName(enum.StrEnum):
    """Breaker modes on the command line."""

    AUTO = "auto"
    OPEN = "open"
    CLOSED = "closed"
    METRICS_ONLY = "metrics-only"


class OnOff(enum.StrEnum):
    """A flag's value on the command line."""

    ON = "on"
    OFF = "off"


class StateName(enum.StrEnum):
    """Trading states on the command line."""

    ACTIVE = "active"
    REDUCING = "reducing"
    HALTED = "halted"


class StageArgument(enum.StrEnum):
    """Stages of the chain on the command line."""

    MODEL = "model"
    EMBEDDED = "embedded"
    CACHED_SCORE = "cached_score"
    RULES = "rules"


_FLAGS = ["shadow", "cached_score", "embedded"]
_MODES = {
    BreakerName.AUTO: admin_pb2.BREAKER_MODE_AUTOMATIC,
    BreakerName.OPEN: admin_pb2.BREAKER_MODE_FORCED_OPEN,
    BreakerName.CLOSED: admin_pb2.BREAKER_MODE_FORCED_CLOSED,
    BreakerName.METRICS_ONLY: admin_pb2.BREAKER_MODE_METRICS_ONLY,
}


@app.command(epilog=EXIT_CODES)
def breaker(
    replica: ReplicaName,
    mode: Annotated[
        BreakerName,
        typer.Argument(help="auto: by the outcomes of calls; open or closed: forced; metrics-only: calls pass."),
    ],
    expires_in_seconds: For = None,
    author: Author = USER,
    reason: Reason = _REASON,
    expect: Expect = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    target: AdminTarget = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: AsJson = False,
) -> None:
    """Force a replica's breaker open or closed, or make it automatic again. Asks if that is risky."""
    request = admin_pb2.SetBreakerRequest(replica=replica, mode=_MODES[mode], author=author, reason=reason)
    with connected(target, directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        risk = ""
        if mode is BreakerName.CLOSED:
            risk = f"{replica} then gets every order, whatever it answers."
        elif mode is BreakerName.OPEN:
            risk = _without(stub, replica)
        response = _changed(stub.SetBreaker, request, risk, expires_in_seconds, expect, dry_run, yes)
    if as_json or dry_run:
        _show(response, response.change, as_json)
        return
    changed = response.replica
    driven = enum_name(admin_pb2.BreakerMode, changed.breaker_mode)
    left_alone = enum_name(admin_pb2.BreakerState, changed.breaker_state)
    print(f"{changed.name}: {driven}; left to itself it would be {left_alone}")
    _show(response, response.change, as_json)


@app.command(epilog=EXIT_CODES)
def flag(
    name: Annotated[
        str | None,
        typer.Argument(help="The flag. Without one: list them.", autocompletion=lambda: _FLAGS),
    ] = None,
    value: Annotated[OnOff | None, typer.Argument(help="The value to set.")] = None,
    expires_in_seconds: For = None,
    author: Author = USER,
    reason: Reason = _REASON,
    expect: Expect = None,
    dry_run: DryRun = False,
    target: AdminTarget = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: AsJson = False,
) -> None:
    """List the flags, or set one."""
    with connected(target, directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        if name is not None and value is not None:
            request = admin_pb2.SetFlagRequest(name=name, enabled=value is OnOff.ON, author=author, reason=reason)
            response = _changed(stub.SetFlag, request, "", expires_in_seconds, expect, dry_run, True)
            _show(response, response.change, as_json)
            return
        found = stub.ListFlags(admin_pb2.ListFlagsRequest(), timeout=RPC_SECONDS)
    if name is not None and name not in [entry.name for entry in found.flags]:
        raise typer.BadParameter(f"no flag {name!r}; there are {', '.join(entry.name for entry in found.flags)}")
    if as_json:
        print(MessageToJson(found, always_print_fields_with_no_presence=True))
        return
    for entry in found.flags:
        if name in (None, entry.name):
            ends = f", for {entry.reverts_in.seconds} s yet" if entry.HasField("reverts_in") else ""
            print(f"{entry.name}: {'on' if entry.enabled else 'off'}{ends}  ({entry.description})")


@app.command(epilog=EXIT_CODES)
def state(
    value: Annotated[StateName | None, typer.Argument(help="The state to set. Without one: show it.")] = None,
    lift: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Lift this restriction only, by its change id; can be repeated."),
    ] = None,
    expires_in_seconds: For = None,
    author: Author = USER,
    reason: Reason = _REASON,
    expect: Expect = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    target: AdminTarget = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: AsJson = False,
) -> None:
    """Show the trading state, or set it: active, reducing or halted. Asks before it becomes less strict.

    The trading state is the strictest of the restrictions that stand. `active` and `reducing` lift every stricter one
    that the server knows of, or those that --lift names; what was lifted is shown.
    """
    if lift and value is None:
        raise typer.BadParameter("--lift needs the state that is to be set")
    with connected(target, directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        found = stub.GetControl(admin_pb2.GetControlRequest(), timeout=RPC_SECONDS)
        now = enum_name(admin_pb2.TradingState, found.trading_state)
        if value is None:
            print(MessageToJson(found, always_print_fields_with_no_presence=True) if as_json else now)
            if found.restrictions and not as_json:
                Console().print(_restriction_table(found.restrictions))
            return
        wanted = admin_pb2.TradingState.Value(f"TRADING_STATE_{value.upper()}")
        request = admin_pb2.SetTradingStateRequest(state=wanted, author=author, reason=reason, lifts=lift or ())
        looser = lift or _STRICTNESS.index(value.value) < _STRICTNESS.index(now.lower())
        risk = "Orders may trade again." if looser else ""
        response = _changed(stub.SetTradingState, request, risk, expires_in_seconds, expect, dry_run, yes)
    if not as_json and not dry_run:
        states = (enum_name(admin_pb2.TradingState, one) for one in (response.previous, response.state))
        print(" → ".join(states))
    _show(response, response.change, as_json)


def _restriction_table(restrictions: Iterable[admin_pb2.Restriction]) -> Table:
    table = Table("state", "by", "why", "for", "change id")
    for one in restrictions:
        span = ""
        if one.HasField("expires_in"):
            span = f"{one.expires_in.seconds} s yet"
        elif one.HasField("begins_in"):
            span = f"begins in {one.begins_in.seconds} s"
        level = enum_name(admin_pb2.TradingState, one.state)
        table.add_row(level, escape(one.author), escape(one.reason), span, one.change_id)
    return table


@app.command(epilog=EXIT_CODES)
def chain(
    stages: Annotated[
        list[StageArgument] | None,
        typer.Argument(help="The stages that may answer, in this order. Without any: show them."),
    ] = None,
    default: Annotated[bool, typer.Option("--default", help="Go back to the stages of the server's settings.")] = False,
    expires_in_seconds: For = None,
    author: Author = USER,
    reason: Reason = _REASON,
    expect: Expect = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    target: AdminTarget = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: AsJson = False,
) -> None:
    """Show which stages of the fallback chain may answer, or set them and their order. Asks first."""
    if stages and default:
        raise typer.BadParameter("either stages or --default")
    with connected(target, directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        if not stages and not default:
            found = stub.GetStatus(admin_pb2.GetStatusRequest(this_process_only=True), timeout=RPC_SECONDS)
            print(" → ".join((*found.chain_stages, "abstain")))
            return
        request = admin_pb2.SetChainRequest(stages=[one.value for one in stages or ()], author=author, reason=reason)
        risk = "Every order is answered by other sources, or in another order."
        response = _changed(stub.SetChain, request, risk, expires_in_seconds, expect, dry_run, yes)
    _show(response, response.change, as_json)


replica_app = typer.Typer(name="replica", help="List replicas, drain one, or resume it.", epilog=EXIT_CODES)
config_app = typer.Typer(name="config", help="Reload the servers' configuration.", epilog=EXIT_CODES)
app.add_typer(replica_app)
app.add_typer(config_app)


@replica_app.command("list", epilog=EXIT_CODES)
def replica_list(target: AdminTarget = None, directory: Directory = DEFAULT_DIRECTORY, as_json: AsJson = False) -> None:
    """Show every replica with its breaker."""
    with connected(target, directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        found = stub.ListReplicas(admin_pb2.ListReplicasRequest(), timeout=RPC_SECONDS)
    if as_json:
        print(MessageToJson(found, always_print_fields_with_no_presence=True))
        return
    Console().print(replica_table(found.replicas))


@replica_app.command("drain", epilog=EXIT_CODES)
def replica_drain(
    replica: ReplicaName,
    expires_in_seconds: For = None,
    author: Author = USER,
    reason: Reason = _REASON,
    expect: Expect = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    target: AdminTarget = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: AsJson = False,
) -> None:
    """Send a replica no more orders. Calls in flight on it finish. Asks if no champion is left."""
    request = admin_pb2.DrainReplicaRequest(replica=replica, author=author, reason=reason)
    with connected(target, directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        risk = _without(stub, replica)
        response = _changed(stub.DrainReplica, request, risk, expires_in_seconds, expect, dry_run, yes)
    _show(response, response.change, as_json)


@replica_app.command("resume", epilog=EXIT_CODES)
def replica_resume(
    replica: ReplicaName,
    author: Author = USER,
    reason: Reason = _REASON,
    expect: Expect = None,
    dry_run: DryRun = False,
    target: AdminTarget = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: AsJson = False,
) -> None:
    """Send a drained replica orders again."""
    request = admin_pb2.ResumeReplicaRequest(replica=replica, author=author, reason=reason)
    with connected(target, directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        response = _changed(stub.ResumeReplica, request, "", None, expect, dry_run, True)
    _show(response, response.change, as_json)


@app.command(epilog=EXIT_CODES)
def changes(
    subject: Annotated[
        str, typer.Argument(help="Only changes of this subject or below it: trading_state, flag, breaker/primary, …")
    ] = "",
    since: Annotated[
        float | None, typer.Option(parser=seconds, metavar="TIME", help="Only changes of the last 10m, 2h, 1d, …")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="Most changes to show.")] = 50,
    target: AdminTarget = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: AsJson = False,
) -> None:
    """Show who changed what, when and why, the newest first."""
    request = admin_pb2.ListChangesRequest(page_size=limit, subject=subject)
    if since is not None:
        request.since.FromDatetime(dt.datetime.now(dt.UTC) - dt.timedelta(seconds=since))
    with connected(target, directory, "admin") as channel:
        found = admin_pb2_grpc.AdminServiceStub(channel).ListChanges(request, timeout=10 * RPC_SECONDS)
    if as_json:
        print(MessageToJson(found))
        return
    table = Table("when (UTC)", "version", "change", "by", "why")
    for change in found.changes:
        when = f"{change.changed_at.ToDatetime():%Y-%m-%d %H:%M:%S}"
        what = "\n".join(change.diff) or f"{change.subject}: {change.value} again"
        table.add_row(when, str(change.version or ""), *map(escape, (what, change.author, change.reason)))
    Console().print(table)
    for problem in found.problems:
        typer.echo(f"missing: {problem}", err=True)


@config_app.command("reload", epilog=EXIT_CODES)
def config_reload(
    author: Author = USER,
    reason: Reason = _REASON,
    dry_run: DryRun = False,
    yes: Yes = False,
    target: AdminTarget = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: AsJson = False,
) -> None:
    """Make a server read its PRETRADE_CONFIG_FILE again, in all of its processes. Asks first."""
    request = admin_pb2.ReloadConfigurationRequest(author=author, reason=reason)
    with connected(target, directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        request.dry_run = True
        would = stub.ReloadConfiguration(request, timeout=RPC_SECONDS)
        if not dry_run and not yes:
            _confirm(would.change, "Orders are decided by these settings then.")
        if not dry_run:
            request.dry_run, request.expected_config_hash = False, would.previous_config_hash
            would = stub.ReloadConfiguration(request, timeout=RPC_SECONDS)
    _show(would, would.change, as_json)


def _confirm(would: admin_pb2.Change, risk: str) -> None:
    """Shows what would change and asks. Raises `typer.Exit` unless the answer is yes."""
    for line in would.diff or ("nothing would change",):
        typer.echo(line)
    typer.echo(risk)
    if not sys.stdin.isatty():
        typer.echo("no terminal to ask on: give --yes", err=True)
        raise typer.Exit(2)
    if not typer.confirm("Do it?"):
        typer.echo("nothing changed")
        raise typer.Exit(1)


def _changed(
    call: Callable[..., Any],
    request: Any,
    risk: str,
    expires_in_seconds: float | None,
    expect: int | None,
    dry_run: bool,
    yes: bool,
) -> Any:
    """Makes a change, once it is confirmed where it is a risk; the response."""
    if expires_in_seconds is not None:
        duration = Duration()
        duration.FromNanoseconds(int(expires_in_seconds * 1e9))
        request.expires_in.CopyFrom(duration)
    if expect is not None:
        request.expected_control_version = expect
    if risk and not yes and not dry_run:
        request.dry_run = True
        would = call(request, timeout=RPC_SECONDS).change
        request.dry_run = False
        request.expected_control_version = would.version
        _confirm(would, risk)
    request.dry_run = dry_run
    try:
        return call(request, timeout=RPC_SECONDS)
    except grpc.RpcError as error:
        if dry_run or not _may_have_arrived(error):
            raise
        typer.echo(f"the connection broke, it is not known whether the change was made: {error.details()}", err=True)
        raise typer.Exit(7) from None


def _may_have_arrived(error: grpc.RpcError) -> bool:
    """Whether a call that failed for its connection may have been carried out all the same.

    Not when the server itself says why it refuses, nor when there never was a connection. The library tells the latter
    apart in its message alone. Should that change, an operator looks at `pretrade changes` once too often.
    """
    if error.code() is not grpc.StatusCode.UNAVAILABLE:
        return False
    if any(name == _STATUS_DETAILS for name, _ in cast("grpc.Call", error).trailing_metadata() or ()):
        return False
    return not (error.details() or "").startswith("failed to connect")


def _without(stub: admin_pb2_grpc.AdminServiceStub, replica: str) -> str:
    """The risk of taking a replica out: none while another champion gets orders."""
    if replica not in _CHAMPIONS:
        return ""
    found = stub.ListReplicas(admin_pb2.ListReplicasRequest(), timeout=RPC_SECONDS).replicas
    others = [one for one in found if one.name in _CHAMPIONS and one.name != replica]
    if any(one.healthy and not one.drained and _passes(one) for one in others):
        return ""
    return "No champion is left then: cached scores, rules or no source will answer."


def _passes(replica: admin_pb2.ReplicaStatus) -> bool:
    if replica.breaker_mode == admin_pb2.BREAKER_MODE_AUTOMATIC:
        return replica.breaker_state == admin_pb2.BREAKER_STATE_CLOSED
    return replica.breaker_mode != admin_pb2.BREAKER_MODE_FORCED_OPEN


def _show(response: Message, change: admin_pb2.Change, as_json: bool) -> None:
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
