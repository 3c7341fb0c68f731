"""Commands for a running server: `decide`, `status`. Clients of the public gRPC API only.

Exit codes: 0 done; 1 the server refused; 2 wrong usage; 3 the server could not be reached; 4 another change came first;
7 the time was over, and it is not known whether the change was made.
"""

from __future__ import annotations

import enum
import sys
import time
from typing import Annotated

import grpc
import typer
from google.protobuf.json_format import MessageToJson
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.client.cli.connection import connected
from pretrade.client.cli.options import AdminTarget, AsJson, Directory, Target
from pretrade.client.cli.views import RPC_SECONDS, History, explanation_table, milliseconds, status_view
from pretrade.client.enum_names import enum_name
from pretrade.client.stack_file import DEFAULT_DIRECTORY
from pretrade.decision.v1 import decision_pb2, decision_pb2_grpc

_REFRESH_SECONDS = 0.5

app = typer.Typer()


class SideName(enum.StrEnum):
    """Sides on the command line."""

    BUY = "buy"
    SELL = "sell"


@app.command()
def decide(
    instrument: Annotated[str, typer.Argument(help="SYMBOL.VENUE, for example BTCUSDT.BINANCE.")],
    side: Annotated[SideName, typer.Argument(help="Side.")],
    quantity: Annotated[float, typer.Argument(help="Base-asset quantity.")],
    limit_price: Annotated[float | None, typer.Option("--limit", help="Limit price; none for a market order.")] = None,
    strategy: Annotated[str, typer.Option(help="Strategy that asks.")] = "cli",
    idempotency_key: Annotated[str, typer.Option("--key", help="Idempotency key.")] = "",
    reduce_only: Annotated[bool, typer.Option(help="The order only reduces an exposure.")] = False,
    timeout_ms: Annotated[float, typer.Option(min=0.001, help="Deadline in milliseconds.")] = 1000.0,
    explain: Annotated[bool, typer.Option(help="Also explain the score.")] = False,
    target: Target = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: AsJson = False,
) -> None:
    """Decide one order: trade, no trade, or abstain."""
    order = decision_pb2.Order(
        order_ref="cli",
        instrument=instrument,
        side=decision_pb2.SIDE_BUY if side is SideName.BUY else decision_pb2.SIDE_SELL,
        quantity=quantity,
        limit_price=limit_price,
        strategy=strategy,
        idempotency_key=idempotency_key,
        reduce_only=reduce_only,
    )
    order.timeout.FromNanoseconds(round(timeout_ms * 1e6))  # exact: gRPC rounds the call's own up to milliseconds
    with connected(target, directory, "decision") as channel:
        grpc.channel_ready_future(channel).result(RPC_SECONDS)
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        request = decision_pb2.DecideRequest(order=order, explain=explain)
        response = stub.Decide(request, timeout=timeout_ms / 1e3)
    if as_json:
        print(MessageToJson(response if explain else response.decision, preserving_proto_field_name=True))
        return
    Console().print(_decision_table(response.decision))
    if explain:
        Console().print(explanation_table(response.explanation))


@app.command()
def status(
    target: AdminTarget = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: AsJson = False,
    watch: Annotated[
        bool | None, typer.Option("--watch/--once", help="Keep refreshing; the default on a terminal.")
    ] = None,
) -> None:
    """Show replicas, breakers, flags, features, the audit journal, and the canary with its evidence."""
    with connected(target, directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)

        def ask() -> admin_pb2.GetStatusResponse:
            return stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=RPC_SECONDS)

        def view(found: admin_pb2.GetStatusResponse) -> Group:
            if found.HasField("canary"):
                evidence = stub.GetCanary(admin_pb2.GetCanaryRequest(), timeout=RPC_SECONDS)
                found.canary.CopyFrom(evidence.canary)
            return status_view(found)

        if as_json:
            print(MessageToJson(ask(), always_print_fields_with_no_presence=True))
            return
        if not (sys.stdout.isatty() if watch is None else watch):
            Console().print(view(ask()))
            return
        history = History()
        with Live(view(ask()), refresh_per_second=4) as live:
            while True:
                found = ask()
                history.add(time.monotonic(), found, stub)
                live.update(Group(view(found), history.view()))
                time.sleep(_REFRESH_SECONDS)


def _decision_table(decision: decision_pb2.Decision) -> Table:
    table = Table(show_header=False)
    table.add_row("action", enum_name(decision_pb2.Action, decision.action))
    if decision.HasField("score"):
        table.add_row("score", f"{decision.score:.4f} against {decision.threshold:.4f}")
    table.add_row("source", enum_name(decision_pb2.Source, decision.source))
    table.add_row("reasons", ", ".join(enum_name(decision_pb2.ReasonCode, code) for code in decision.reasons))
    if decision.degradations:
        names = (enum_name(decision_pb2.Degradation, code) for code in decision.degradations)
        table.add_row("degradations", ", ".join(names))
    if decision.model_name:
        table.add_row("model", f"{decision.model_name} {decision.model_version}")
    if decision.HasField("feature_age"):
        table.add_row("feature age", milliseconds(decision.feature_age))
    stages = ", ".join(
        f"{enum_name(decision_pb2.Stage, use.stage)} "
        + (f"skipped ({enum_name(decision_pb2.Degradation, use.skipped)})" if use.skipped else f"{use.used_us} µs")
        for use in decision.budget.stages
    )
    table.add_row("budget", f"{decision.budget.used_us} of {decision.budget.allowed_us} µs: {stages}")
    table.add_row("decision id", decision.decision_id)
    return table
