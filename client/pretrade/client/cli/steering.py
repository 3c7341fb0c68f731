"""Commands that steer running servers: `breaker`, `flag`, `state`, `replica`, `chain`, `changes`, `config`.

Every change records who made it and why. `--dry-run` checks it without making it, and `--expect` ties it to a version
of the control state. A command that may harm trading first shows what it will do and asks for confirmation; without a
terminal it needs `--yes`. A confirmed change is made exactly as it was shown: if the control state has changed
meanwhile, the command fails.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Final

import typer

from pretrade.client.cli.change_options import EXIT_CODES, REASON, How
from pretrade.client.cli.option_groups import spreads_options
from pretrade.client.cli.options import (
    USER,
    AdminTarget,
    AsJson,
    Author,
    Directory,
    DryRun,
    For,
    Reason,
    Yes,
    seconds,
)
from pretrade.client.stack_file import DEFAULT_DIRECTORY

_STRICTNESS: Final = ("active", "reducing", "halted")
_SUBJECTS: Final = (
    "trading_state",
    "flag",
    "breaker",
    "drain",
    "chain",
    "model_map",
    "alert_rules",
    "canary",
    "model",
    "configuration",
)
"""What changes are made of: the first part of a subject such as `breaker/primary`."""

app = typer.Typer()

_REPLICAS: Final = ["primary", "secondary", "challenger"]
_REPLICA_HELP: Final = "primary, secondary or challenger; one of several endpoints is primary-2, all of them primary."
ReplicaName = Annotated[str, typer.Argument(help=_REPLICA_HELP, autocompletion=lambda: _REPLICAS)]


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


_FLAGS = ["shadow", "cached_score", "embedded", "out_of_domain", "uncertain"]


@app.command(epilog=EXIT_CODES)
@spreads_options
def breaker(
    replica: Annotated[
        str | None,
        typer.Argument(help=f"{_REPLICA_HELP} Without one: show every breaker.", autocompletion=lambda: _REPLICAS),
    ] = None,
    mode: Annotated[
        BreakerName | None,
        typer.Argument(help="auto: by the outcomes of calls; open or closed: forced; metrics-only: calls pass."),
    ] = None,
    expires_in_seconds: For = None,
    *,
    how: How,
) -> None:
    """Show the breakers, or force one open or closed, or make it automatic again. Asks if that is risky."""
    if replica is None or mode is None:
        _show_replicas(how.target, how.directory, how.as_json, replica)
        return
    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.changing import changed, show, without
    from pretrade.client.cli.connection import connected
    from pretrade.client.enum_names import enum_name

    modes = {
        BreakerName.AUTO: admin_pb2.BREAKER_MODE_AUTOMATIC,
        BreakerName.OPEN: admin_pb2.BREAKER_MODE_FORCED_OPEN,
        BreakerName.CLOSED: admin_pb2.BREAKER_MODE_FORCED_CLOSED,
        BreakerName.METRICS_ONLY: admin_pb2.BREAKER_MODE_METRICS_ONLY,
    }
    request = admin_pb2.SetBreakerRequest(replica=replica, mode=modes[mode])
    with connected(how.target, how.directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        risk = ""
        if mode is BreakerName.CLOSED:
            risk = f"{replica} then gets every order, whatever it answers."
        elif mode is BreakerName.OPEN:
            risk = without(stub, replica)
        response = changed(stub.SetBreaker, request, how, risk, expires_in_seconds)
    show(response, response.change, as_json=how.as_json)
    if not how.as_json and not how.dry_run and mode is not BreakerName.AUTO:
        left_alone = enum_name(admin_pb2.BreakerState, response.replica.breaker_state)
        print(f"left to itself, the breaker of {response.replica.name} would be {left_alone}")


def _show_replicas(target: str | None, directory: Path, as_json: bool, name: str | None = None) -> None:
    """Shows every replica with its breaker, or the one of that name."""
    from google.protobuf.json_format import MessageToJson
    from rich.console import Console

    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.connection import RPC_SECONDS, connected
    from pretrade.client.cli.views import replica_table
    from pretrade.client.enum_names import enum_name

    with connected(target, directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        found = stub.ListReplicas(admin_pb2.ListReplicasRequest(), timeout=RPC_SECONDS)
    names = [one.name for one in found.replicas]
    if name is not None:
        chosen = [
            one for one in found.replicas if name in (one.name, enum_name(admin_pb2.ReplicaRole, one.role).lower())
        ]
        if not chosen:
            raise typer.BadParameter(f"no replica {name!r}; there are {', '.join(names)}")
        del found.replicas[:]
        found.replicas.extend(chosen)
    if as_json:
        print(MessageToJson(found, always_print_fields_with_no_presence=True))
        return
    Console().print(replica_table(found.replicas))


@app.command(epilog=EXIT_CODES)
@spreads_options
def flag(
    name: Annotated[
        str | None,
        typer.Argument(help="The flag. Without one: list them.", autocompletion=lambda: _FLAGS),
    ] = None,
    value: Annotated[OnOff | None, typer.Argument(help="The value to set.")] = None,
    expires_in_seconds: For = None,
    *,
    how: How,
) -> None:
    """List the flags, or set one."""
    from google.protobuf.json_format import MessageToJson

    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.changing import changed, show
    from pretrade.client.cli.connection import RPC_SECONDS, connected

    with connected(how.target, how.directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        if name is not None and value is not None:
            request = admin_pb2.SetFlagRequest(name=name, enabled=value is OnOff.ON)
            response = changed(stub.SetFlag, request, how, expires_in_seconds=expires_in_seconds)
            show(response, response.change, as_json=how.as_json)
            return
        found = stub.ListFlags(admin_pb2.ListFlagsRequest(), timeout=RPC_SECONDS)
    if name is not None and name not in [entry.name for entry in found.flags]:
        raise typer.BadParameter(f"no flag {name!r}; there are {', '.join(entry.name for entry in found.flags)}")
    if how.as_json:
        print(MessageToJson(found, always_print_fields_with_no_presence=True))
        return
    for entry in found.flags:
        if name in (None, entry.name):
            ends = f", for {entry.reverts_in.seconds} s yet" if entry.HasField("reverts_in") else ""
            print(f"{entry.name}: {'on' if entry.enabled else 'off'}{ends}  ({entry.description})")


@app.command(epilog=EXIT_CODES)
@spreads_options
def state(
    value: Annotated[StateName | None, typer.Argument(help="The state to set. Without one: show it.")] = None,
    lift: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Lift this restriction only, by its change id; can be repeated."),
    ] = None,
    expires_in_seconds: For = None,
    *,
    how: How,
) -> None:
    """Show the trading state, or set it: active, reducing or halted. Asks before it becomes less strict.

    The trading state is the strictest of the restrictions that stand. `active` and `reducing` lift every stricter one
    that the server knows of, or those that --lift names; what was lifted is shown.
    """
    from google.protobuf.json_format import MessageToJson
    from rich.console import Console

    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.changing import changed, show
    from pretrade.client.cli.connection import RPC_SECONDS, connected
    from pretrade.client.cli.views import restriction_table
    from pretrade.client.enum_names import enum_name

    if lift and value is None:
        raise typer.BadParameter("--lift needs the state that is to be set")
    with connected(how.target, how.directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        found = stub.GetControl(admin_pb2.GetControlRequest(), timeout=RPC_SECONDS)
        now = enum_name(admin_pb2.TradingState, found.trading_state)
        if value is None:
            print(MessageToJson(found, always_print_fields_with_no_presence=True) if how.as_json else now)
            if found.restrictions and not how.as_json:
                Console().print(restriction_table(found.restrictions))
            return
        wanted = admin_pb2.TradingState.Value(f"TRADING_STATE_{value.upper()}")
        request = admin_pb2.SetTradingStateRequest(state=wanted, lifts=lift or ())
        looser = lift or _STRICTNESS.index(value.value) < _STRICTNESS.index(now.lower())
        risk = "Orders may trade again." if looser else ""
        response = changed(stub.SetTradingState, request, how, risk, expires_in_seconds)
    show(response, response.change, as_json=how.as_json)
    if expires_in_seconds is not None and value is not StateName.ACTIVE:
        typer.echo(
            f"Orders may trade again BY THEMSELVES after {expires_in_seconds:g} s, without another question. "
            f"To stay {value.upper()}: pretrade state {value} without --for",
            err=True,
        )


@app.command(epilog=EXIT_CODES)
@spreads_options
def chain(
    stages: Annotated[
        list[StageArgument] | None,
        typer.Argument(help="The stages that may answer, in this order. Without any: show them."),
    ] = None,
    default: Annotated[bool, typer.Option("--default", help="Go back to the stages of the server's settings.")] = False,
    expires_in_seconds: For = None,
    *,
    how: How,
) -> None:
    """Show which stages of the fallback chain may answer, or set them and their order. Asks first."""
    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.changing import changed, show
    from pretrade.client.cli.connection import RPC_SECONDS, connected

    if stages and default:
        raise typer.BadParameter("either stages or --default")
    with connected(how.target, how.directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        if not stages and not default:
            found = stub.GetStatus(admin_pb2.GetStatusRequest(this_process_only=True), timeout=RPC_SECONDS)
            print(" → ".join((*found.chain_stages, "abstain")))
            return
        request = admin_pb2.SetChainRequest(stages=[one.value for one in stages or ()])
        risk = "Every order is answered by other sources, or in another order."
        response = changed(stub.SetChain, request, how, risk, expires_in_seconds)
    show(response, response.change, as_json=how.as_json)


replica_app = typer.Typer(name="replica", help="List replicas, drain one, or resume it.", epilog=EXIT_CODES)
config_app = typer.Typer(name="config", help="Reload the servers' configuration.", epilog=EXIT_CODES)
app.add_typer(replica_app)
app.add_typer(config_app)


@replica_app.command("list", epilog=EXIT_CODES)
def replica_list(target: AdminTarget = None, directory: Directory = DEFAULT_DIRECTORY, as_json: AsJson = False) -> None:
    """Show every replica with its breaker."""
    _show_replicas(target, directory, as_json)


@replica_app.command("drain", epilog=EXIT_CODES)
@spreads_options
def replica_drain(
    replica: ReplicaName,
    expires_in_seconds: For = None,
    *,
    how: How,
) -> None:
    """Send a replica no more orders. Calls in flight on it finish. Asks if no champion is left."""
    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.changing import changed, show, without
    from pretrade.client.cli.connection import connected

    request = admin_pb2.DrainReplicaRequest(replica=replica)
    with connected(how.target, how.directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        risk = without(stub, replica)
        response = changed(stub.DrainReplica, request, how, risk, expires_in_seconds)
    show(response, response.change, as_json=how.as_json)


@replica_app.command("resume", epilog=EXIT_CODES)
@spreads_options
def replica_resume(
    replica: ReplicaName,
    *,
    how: How,
) -> None:
    """Send a drained replica orders again."""
    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.changing import changed, show
    from pretrade.client.cli.connection import connected

    request = admin_pb2.ResumeReplicaRequest(replica=replica)
    with connected(how.target, how.directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        response = changed(stub.ResumeReplica, request, how)
    show(response, response.change, as_json=how.as_json)


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
    import datetime as dt

    from google.protobuf.json_format import MessageToJson
    from rich.console import Console

    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.connection import RPC_SECONDS, connected
    from pretrade.client.cli.views import change_table

    request = admin_pb2.ListChangesRequest(page_size=limit, subject=subject)
    if since is not None:
        request.since.FromDatetime(dt.datetime.now(dt.UTC) - dt.timedelta(seconds=since))
    with connected(target, directory, "admin") as channel:
        found = admin_pb2_grpc.AdminServiceStub(channel).ListChanges(request, timeout=10 * RPC_SECONDS)
    for problem in found.problems:
        typer.echo(f"missing: {problem}", err=True)
    if not found.changes and subject and subject.partition("/")[0] not in _SUBJECTS:
        raise typer.BadParameter(f"no such subject: {subject!r}; subjects begin with {', '.join(_SUBJECTS)}")
    if as_json:
        print(MessageToJson(found))
    elif found.changes:
        Console().print(change_table(found.changes))
    else:
        print(f"no change{f' of {subject}' if subject else ''}{'' if since is None else f' in the last {since:g} s'}")


@config_app.command("reload", epilog=EXIT_CODES)
def config_reload(
    author: Author = USER,
    reason: Reason = REASON,
    dry_run: DryRun = False,
    yes: Yes = False,
    target: AdminTarget = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: AsJson = False,
) -> None:
    """Make a server read its PRETRADE_CONFIG_FILE again, in all of its processes. Asks first."""
    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.changing import confirm, show
    from pretrade.client.cli.connection import RPC_SECONDS, connected

    request = admin_pb2.ReloadConfigurationRequest(author=author, reason=reason)
    with connected(target, directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        request.dry_run = True
        would = stub.ReloadConfiguration(request, timeout=RPC_SECONDS)
        if not dry_run and not yes:
            confirm(would.change, "Orders are decided by these settings then.")
        if not dry_run:
            request.dry_run, request.expected_config_hash = False, would.previous_config_hash
            would = stub.ReloadConfiguration(request, timeout=RPC_SECONDS)
    show(would, would.change, as_json=as_json)
