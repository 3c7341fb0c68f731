"""Commands for a running server: `decide`, `status`. Clients of the public gRPC API only.

Exit codes: 0 done, 1 the server said no, 2 wrong usage, 3 the server could not be reached, 4 somebody else was first.
"""

from __future__ import annotations

import enum
import getpass
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import grpc
import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToJson
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.decision.v1 import decision_pb2, decision_pb2_grpc
from server.audit.explanation_table import explanation_table
from server.security.client import ClientCredentials, CredentialsError

RPC_SECONDS = 3.0
_REFRESH_SECONDS = 0.5
_MINUTE_SECONDS = 60.0
_CHANGES_SECONDS = 5.0
_CHANGES = 5

Directory = Annotated[
    Path, typer.Option("--dir", envvar="PRETRADE_LOCAL_DIR", help="Directory of the running stack, for its ports.")
]
Target = Annotated[
    str | None, typer.Option("--target", help="HOST:PORT instead of the stack's.", envvar="PRETRADE_TARGET")
]
AdminTarget = Annotated[
    str | None, typer.Option("--target", help="HOST:PORT instead of the stack's.", envvar="PRETRADE_ADMIN_TARGET")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT_DIRECTORY = Path(".pretrade")
USER = os.environ.get("USER") or getpass.getuser()


class SideName(enum.StrEnum):
    """Sides on the command line."""

    BUY = "buy"
    SELL = "sell"


def decide(
    instrument: Annotated[str, typer.Argument(help="SYMBOL.VENUE, for example BTCUSDT.BINANCE.")],
    side: Annotated[SideName, typer.Argument(help="Side.")],
    quantity: Annotated[float, typer.Argument(help="Base-asset quantity.")],
    limit_price: Annotated[float | None, typer.Option("--limit", help="Limit price; none for a market order.")] = None,
    strategy: Annotated[str, typer.Option(help="Strategy that asks.")] = "cli",
    idempotency_key: Annotated[str, typer.Option("--key", help="Idempotency key.")] = "",
    reduce_only: Annotated[bool, typer.Option(help="The order only reduces an exposure.")] = False,
    timeout_ms: Annotated[float, typer.Option(min=0.001, help="Deadline in milliseconds.")] = 1000.0,
    explain: Annotated[bool, typer.Option(help="Also say why the model scored so; the first is late.")] = False,
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
    with connected(target, directory, "decision") as channel:
        grpc.channel_ready_future(channel).result(RPC_SECONDS)
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        request = decision_pb2.DecideRequest(order=order, explain=explain)
        response = stub.Decide(request, timeout=timeout_ms / 1e3)
    if as_json:
        print(MessageToJson(response if explain else response.decision))
        return
    Console().print(_decision_table(response.decision))
    if explain:
        Console().print(explanation_table(response.explanation))


def status(
    target: AdminTarget = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: AsJson = False,
    watch: Annotated[
        bool | None, typer.Option("--watch/--once", help="Keep refreshing; the default on a terminal.")
    ] = None,
) -> None:
    """Show replicas, breakers, flags, features and the audit journal."""
    with connected(target, directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)

        def ask() -> admin_pb2.GetStatusResponse:
            return stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=RPC_SECONDS)

        if as_json:
            print(MessageToJson(ask(), always_print_fields_with_no_presence=True))
            return
        if not (sys.stdout.isatty() if watch is None else watch):
            Console().print(status_view(ask()))
            return
        history = History()
        with Live(status_view(ask()), refresh_per_second=4) as live:
            while True:
                found = ask()
                history.add(time.monotonic(), found, stub)
                live.update(Group(status_view(found), history.view()))
                time.sleep(_REFRESH_SECONDS)


class History:
    """What a live view knows beyond the last answer: decisions by source over a minute, and the newest changes."""

    def __init__(self) -> None:
        self._counts: deque[tuple[float, dict[str, int]]] = deque()
        self._changes: list[admin_pb2.Change] = []
        self._next_look = 0.0

    def add(self, now: float, status: admin_pb2.GetStatusResponse, stub: admin_pb2_grpc.AdminServiceStub) -> None:
        """Adds an answer, and looks for changes now and then: they are read from the audit."""
        self._counts.append((now, {count.source: count.decisions for count in status.sources}))
        while now - self._counts[0][0] > _MINUTE_SECONDS:
            self._counts.popleft()
        if now >= self._next_look:
            self._next_look = now + _CHANGES_SECONDS
            request = admin_pb2.ListChangesRequest(page_size=_CHANGES)
            with suppress(grpc.RpcError):  # the audit may be busy or away
                self._changes = list(stub.ListChanges(request, timeout=RPC_SECONDS).changes)

    def view(self) -> Group:
        """Both for a terminal."""
        (began, first), (ended, last) = self._counts[0], self._counts[-1]
        # A process that was started anew, or another one that answers, counts from the beginning.
        made = {source: max(0, count - first.get(source, 0)) for source, count in last.items()}
        rates = "  ".join(f"{source} {count}" for source, count in made.items())
        lines = [f"last {ended - began:.0f} s  {rates}"]
        for change in self._changes:
            what = "; ".join(change.diff) or f"{change.subject}: {change.value} again"
            by = escape(f"{what}  ({change.author}: {change.reason})")
            lines.append(f"[dim]{change.changed_at.ToDatetime():%H:%M:%S}[/]  {by}")
        return Group(*lines)


def status_view(status: admin_pb2.GetStatusResponse) -> Group:
    """The status as tables for a terminal."""
    parts = (
        f"[bold]{status.instance_id}[/]  {'ready' if status.ready else '[red]not ready[/]'}  "
        f"trading [bold]{enum_name(admin_pb2.TradingState, status.trading_state)}[/]  up {status.uptime.seconds} s",
        replica_table(status.replicas),
        _feature_table(status),
        _counts_line(status),
        _drift_line(status.drift),
    )
    return Group(*parts, _process_table(status)) if status.process_count > 1 else Group(*parts)


def _drift_line(drift: admin_pb2.DriftStatus) -> str:
    if drift.problem:
        return f"[dim]drift: {escape(drift.problem)}[/]"
    drifted = [f"{one.name} {one.psi:.2f} (limit {one.limit:.2f})" for one in drift.features if one.drifted]
    if not drifted:
        return f"[dim]drift: none in {drift.rows:,} inputs of model {drift.model_version}[/]"
    return f"[red]drift[/] in {drift.rows:,} inputs of model {drift.model_version}: {', '.join(drifted)}"


def _process_table(status: admin_pb2.GetStatusResponse) -> Table:
    missing = status.process_count - len(status.processes)
    caption = f"{missing} of {status.process_count} processes missing" if missing > 0 else None
    columns = ("process", "ready", "up", "decisions", "in flight", "not in SQL", "restarts", "control")
    table = Table(*columns, caption=caption)
    for process in status.processes:
        name = f"{process.index}  answered" if process.answered else str(process.index)
        if process.problem:
            table.add_row(name, f"[red]{process.problem}[/]")
            continue
        table.add_row(
            name,
            "yes" if process.ready else "[red]no[/]",
            f"{process.uptime.seconds} s",
            *(str(count) for count in (process.decisions, process.in_flight, process.unshipped, process.restarts)),
            str(process.control_version),
        )
    return table


def replica_table(replicas: Iterable[admin_pb2.ReplicaStatus]) -> Table:
    """The replicas as a table for a terminal."""
    table = Table()
    for column in ("replica", "healthy", "breaker", "in flight", "queued", "p50", "p95", "rows", "model"):
        table.add_column(column, no_wrap=True)
    for replica in replicas:
        table.add_row(
            replica.name,
            "yes" if replica.healthy else "[red]no[/]",
            _breaker(replica),
            f"{replica.in_flight} ({replica.abandoned} lost)" if replica.abandoned else str(replica.in_flight),
            str(replica.queued),
            _milliseconds(replica.p50),
            _milliseconds(replica.p95),
            str(replica.rows),
            replica.model_version[:8],
        )
    return table


def _breaker(replica: admin_pb2.ReplicaStatus) -> str:
    """What becomes of a call, and why when somebody set it so."""
    ends = f" for {replica.reverts_in.seconds} s yet" if replica.HasField("reverts_in") else ""
    if replica.drained:
        return f"[yellow]DRAINED{ends}[/]"
    state = enum_name(admin_pb2.BreakerState, replica.breaker_state)
    if replica.breaker_mode == admin_pb2.BREAKER_MODE_AUTOMATIC:
        return state if state == "CLOSED" else f"[red]{state}[/]"
    mode = enum_name(admin_pb2.BreakerMode, replica.breaker_mode)
    return f"[yellow]{mode}{ends}[/]" + (f" (else {state})" if state != "CLOSED" else "")


def _feature_table(status: admin_pb2.GetStatusResponse) -> Table:
    columns = ("instrument", "features", "event age", "book", "times unknown", "lag", "vector", "sequence", "worker")
    table = Table(*columns)
    for feature in status.features:
        table.add_row(
            feature.instrument,
            "usable" if feature.usable else f"[red]{feature.problem}[/]",
            _milliseconds(feature.age) if feature.HasField("age") else "",
            _book(feature),
            str(feature.book_losses) if feature.worker else "",
            f"{feature.lag_records:,} records" if feature.HasField("lag_records") else "not known",
            feature.vector_version,
            str(feature.sequence or ""),
            feature.worker or "[red]none reports[/]",
        )
    return table


def _book(feature: admin_pb2.FeatureStatus) -> str:
    """The state of the book, and why it is unknown."""
    if feature.book == admin_pb2.BOOK_STATE_UNSPECIFIED:
        return ""
    state = enum_name(admin_pb2.BookState, feature.book).lower()
    if feature.book != admin_pb2.BOOK_STATE_UNKNOWN:
        return state
    return f"[red]{state}{f': {feature.book_reason}' if feature.book_reason else ''}[/]"


def _counts_line(status: admin_pb2.GetStatusResponse) -> str:
    sources = "  ".join(f"{count.source} {count.decisions}" for count in status.sources)
    flags = "  ".join(f"{entry.name} {'on' if entry.enabled else 'off'}" for entry in status.flags)
    control = f"version {status.control_version}, chain {' → '.join(status.chain_stages)}"
    if status.control.stale:
        control += f"  [red]Redis not heard: others may have changed it[/], {status.control.pending} changes wait"
    audit = f"{status.audit.written} rows, {status.audit.unshipped} not yet in SQL"
    if not status.audit.writable:
        audit += f" [red]not writable: {status.audit.last_error}[/]"
    unhealthy = "  ".join(f"[red]{part.name}: {part.detail}[/]" for part in status.components if not part.healthy)
    lines = (f"decisions  {sources}", f"flags  {flags}", f"control  {control}", f"audit  {audit}", unhealthy)
    return "\n".join(filter(None, lines))


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
        table.add_row("feature age", _milliseconds(decision.feature_age))
    stages = ", ".join(
        f"{enum_name(decision_pb2.Stage, use.stage)} "
        + (f"skipped ({enum_name(decision_pb2.Degradation, use.skipped)})" if use.skipped else f"{use.used_us} µs")
        for use in decision.budget.stages
    )
    table.add_row("budget", f"{decision.budget.used_us} of {decision.budget.allowed_us} µs: {stages}")
    table.add_row("decision id", decision.decision_id)
    return table


def enum_name(enum_type: object, value: int) -> str:
    """An enum value's name without its prefix."""
    values = enum_type.DESCRIPTOR.values_by_number  # type: ignore[attr-defined]  # every enum wrapper of protobuf has it
    prefix: str = values[0].name.removesuffix("UNSPECIFIED")
    name: str = values[value].name
    return name.removeprefix(prefix)


def _milliseconds(duration: Duration) -> str:
    return f"{duration.ToNanoseconds() / 1e6:.2f} ms"


@contextmanager
def connected(target: str | None, directory: Path, endpoint: str) -> Iterator[grpc.Channel]:
    """A channel to the target, or to the stack in `directory`; turns failures into messages and exit codes."""
    address = target or stack_endpoint(directory, endpoint)
    try:
        opened = ClientCredentials.from_environment().channel(address)
    except CredentialsError as error:
        raise typer.BadParameter(str(error)) from None
    with opened as channel:
        try:
            yield channel
        except CredentialsError as error:
            raise typer.BadParameter(str(error)) from None
        except grpc.FutureTimeoutError:
            typer.echo(f"{address} cannot be reached", err=True)
            raise typer.Exit(3) from None
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            if code is grpc.StatusCode.UNAVAILABLE:
                typer.echo(f"{address} cannot be reached: {details}", err=True)
                raise typer.Exit(3) from None
            typer.echo(f"{code.name}: {details}", err=True)
            raise typer.Exit(4 if code is grpc.StatusCode.ABORTED else 1) from None
        except KeyboardInterrupt:
            raise typer.Exit(0) from None


def stack_endpoint(directory: Path, endpoint: str, option: str = "--target") -> str:
    """An endpoint of the stack that runs in `directory`; a message that names the option without one."""
    try:
        stack = json.loads((directory / "stack.json").read_text())
        os.kill(stack["pid"], 0)
        address = stack["endpoints"][endpoint]
    except (FileNotFoundError, ProcessLookupError):
        raise typer.BadParameter(
            f"no stack runs in {directory}: start one with `pretrade up`, or give {option}"
        ) from None
    if not isinstance(address, str):
        raise typer.BadParameter(f"the stack in {directory} has no {endpoint} endpoint; give {option}")
    return address
