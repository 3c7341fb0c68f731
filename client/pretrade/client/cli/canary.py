"""`pretrade canary`: start, watch and stop canaries.

The commands are clients of `AdminService`. A command that may harm trading first shows what it will do and asks for
confirmation; without a terminal it needs `--yes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from pretrade.client.cli.change_options import EXIT_CODES, How
from pretrade.client.cli.model_versions import LOAD_SECONDS, Version, dry
from pretrade.client.cli.option_groups import spreads_options
from pretrade.client.cli.options import (
    DEFAULT_MODEL,
    AdminTarget,
    AsJson,
    Directory,
    Model,
    every_order_of,
)
from pretrade.client.stack_file import DEFAULT_DIRECTORY

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from pretrade.admin.v1 import admin_pb2

_REFRESH_SECONDS: Final = 0.5
_STATUS_EXIT_CODES: Final = (
    "Exit codes: 0 running or promoted; 2 wrong usage; 3 no server could be reached; 5 rolled back or aborted; "
    "6 there never was a canary."
)
ROLLED_BACK, NO_CANARY = 5, 6

canary_app = typer.Typer(
    name="canary",
    no_args_is_help=True,
    help="Give a new model version a small share of the orders, and more as its evidence allows.",
)
app = typer.Typer()
app.add_typer(canary_app)


@canary_app.command(epilog=EXIT_CODES)
@spreads_options
def start(
    version: Version = "candidate",
    steps: Annotated[
        str | None, typer.Option(help="Percent of the order flows at each step, up to 100, like 1,5,25,50,100.")
    ] = None,
    instrument: Annotated[
        str, typer.Option(metavar="PATTERN", help="Only orders of instruments that fit, like 'BTC*'. [all]")
    ] = "",
    strategy: Annotated[
        str, typer.Option(metavar="PATTERN", help="Only orders of strategies that fit, like 'sweep-?'. [all]")
    ] = "",
    model: Model = DEFAULT_MODEL,
    *,
    how: How,
) -> None:
    """Load and check a version, and give it the first share of the order flows; more as its evidence allows.

    Without one it is the version trained last. With a pattern it takes its steps in the orders that fit, and becomes
    the champion only by `pretrade canary promote`.
    """
    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.changing import changed
    from pretrade.client.cli.connection import connected
    from pretrade.client.cli.views import covered

    def risk(would: admin_pb2.StartCanaryResponse) -> str:
        canary = would.canary
        request.model_version = canary.model_version  # an alias may be moved while the question is read
        return (
            f"{canary.model_version} then decides {canary.weight:.0%} of the order flows{covered(canary)} in place of "
            f"champion {canary.champion_version}, and more by itself as its evidence allows: "
            f"{', '.join(f'{step:.0%}' for step in canary.steps)}."
        )

    request = admin_pb2.StartCanaryRequest(
        model_version=version,
        steps=_shares(steps),
        instrument=instrument,
        strategy=strategy,
        model=model,
    )
    with connected(how.target, how.directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        response = changed(stub.StartCanary, request, how, risk, rpc_seconds=LOAD_SECONDS)
    _show(response, response.canary, response.change, how.as_json)


@canary_app.command(epilog=_STATUS_EXIT_CODES)
def status(
    affected: Annotated[
        int, typer.Option(min=0, max=1_000, help="Also list so many of the decisions that it made.")
    ] = 0,
    watch: Annotated[bool | None, typer.Option("--watch/--once", help="Keep refreshing until it ends.")] = None,
    model: Model = DEFAULT_MODEL,
    target: AdminTarget = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: AsJson = False,
) -> None:
    """Show the canary, or the one that ended last: its step, its verdict, and the evidence for it."""
    import time

    from google.protobuf.json_format import MessageToJson
    from rich.console import Console
    from rich.live import Live

    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.connection import RPC_SECONDS, connected
    from pretrade.client.cli.views import canary_view

    with connected(target, directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)

        def ask() -> admin_pb2.GetCanaryResponse:
            return stub.GetCanary(
                admin_pb2.GetCanaryRequest(model=model, affected_decisions=affected), timeout=RPC_SECONDS
            )

        found = ask()
        if watch and not as_json and found.HasField("canary"):
            with Live(canary_view(found.canary), refresh_per_second=4) as live:
                while found.canary.state == admin_pb2.CANARY_STATE_RUNNING:
                    time.sleep(_REFRESH_SECONDS)
                    found = ask()
                    live.update(canary_view(found.canary))
    if as_json:
        print(MessageToJson(found, always_print_fields_with_no_presence=True))
    elif not found.HasField("canary"):
        print("there never was a canary")
    elif not watch:
        Console().print(canary_view(found.canary))
    if not as_json:
        for decision_id in found.affected_decision_ids:
            print(decision_id)
    raise typer.Exit(_code(found))


@canary_app.command(epilog=EXIT_CODES)
@spreads_options
def weight(
    percent: Annotated[float, typer.Argument(min=0, max=100, help="Percent of the order flows.")],
    hold: Annotated[bool, typer.Option("--hold/--go-on", help="Hold it there, or let it take its steps.")] = True,
    model: Model = DEFAULT_MODEL,
    *,
    how: How,
) -> None:
    """Set the canary's share of the order flows by hand."""
    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.changing import changed
    from pretrade.client.cli.connection import connected

    def risk(would: admin_pb2.SetCanaryWeightResponse) -> str:
        return f"The canary {would.canary.model_version} then decides {percent:g} % of the order flows."

    request = admin_pb2.SetCanaryWeightRequest(weight=percent / 100, hold=hold, model=model)
    with connected(how.target, how.directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        response = changed(stub.SetCanaryWeight, request, how, risk)
    _show(response, response.canary, response.change, how.as_json)


@canary_app.command(epilog=EXIT_CODES)
@spreads_options
def promote(
    model: Model = DEFAULT_MODEL,
    *,
    how: How,
) -> None:
    """Make the canary the champion now, whatever its evidence."""
    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.changing import changed
    from pretrade.client.cli.connection import connected

    def risk(would: admin_pb2.PromoteCanaryResponse) -> str:
        return f"The canary {would.canary.model_version} then decides {every_order_of(model)}, whatever its evidence."

    request = admin_pb2.PromoteCanaryRequest(model=model)
    with connected(how.target, how.directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        response = changed(stub.PromoteCanary, request, how, risk, rpc_seconds=LOAD_SECONDS)
    _show(response, response.canary, response.change, how.as_json)


@canary_app.command(epilog=EXIT_CODES)
@spreads_options
def abort(
    model: Model = DEFAULT_MODEL,
    *,
    how: How,
) -> None:
    """End the canary: all orders go to the champion. Never asks: it only makes things safer."""
    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.changing import changed
    from pretrade.client.cli.connection import connected

    request = admin_pb2.AbortCanaryRequest(model=model)
    with connected(how.target, how.directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        response = changed(stub.AbortCanary, request, how)
    _show(response, response.canary, response.change, how.as_json)


@canary_app.command(epilog=EXIT_CODES)
@spreads_options
def rollback(
    model: Model = DEFAULT_MODEL,
    *,
    how: How,
) -> None:
    """Make the champion's predecessor the champion again."""
    from google.protobuf.json_format import MessageToJson

    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.changing import changed
    from pretrade.client.cli.connection import connected

    def risk(would: admin_pb2.RollBackResponse) -> str:
        return f"{would.model_version} then decides {every_order_of(model)}, and no longer {would.previous_version}."

    request = admin_pb2.RollBackRequest(model=model)
    with connected(how.target, how.directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        response = changed(stub.RollBack, request, how, risk, rpc_seconds=LOAD_SECONDS)
    if how.as_json:
        print(MessageToJson(response))
    else:
        print(f"champion: {response.previous_version} → {response.model_version}{dry(response.change)}")


def _show(response: Message, canary: admin_pb2.Canary, change: admin_pb2.Change, as_json: bool) -> None:
    from google.protobuf.json_format import MessageToJson

    from pretrade.admin.v1 import admin_pb2
    from pretrade.client.enum_names import enum_name

    if as_json:
        print(MessageToJson(response))
        return
    state = enum_name(admin_pb2.CanaryState, canary.state)
    print(f"canary {canary.model_version}: {state}, {canary.weight:.0%} of the flows{dry(change)}")


def _code(found: admin_pb2.GetCanaryResponse) -> int:
    from pretrade.admin.v1 import admin_pb2

    if not found.HasField("canary"):
        return NO_CANARY
    ended = found.canary.state in (admin_pb2.CANARY_STATE_ROLLED_BACK, admin_pb2.CANARY_STATE_ABORTED)
    return ROLLED_BACK if ended else 0


def _shares(steps: str | None) -> list[float]:
    try:
        return [float(step) / 100 for step in steps.split(",")] if steps else []
    except ValueError:
        raise typer.BadParameter("must be percentages with commas between", param_hint="--steps") from None
