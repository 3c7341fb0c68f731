"""Draws in a terminal: replicas, features, a canary with its evidence, the explanation of a score."""

from __future__ import annotations

import datetime as dt
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

import grpc
from google.protobuf.duration_pb2 import Duration
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.client.cli.model_lines import champion_line, drift_line
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2

RPC_SECONDS = 3.0
_MINUTE_SECONDS = 60.0
_CHANGES_SECONDS = 5.0
_CHANGES = 5
_BAR_WIDTH = 20


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
        # A process that was restarted, or another one that answers, counts from the beginning.
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
        _embedded_line(status.embedded),
        *([champion_line(status.champion)] if status.HasField("champion") else ()),
        drift_line(status.drift),
        *([canary_view(status.canary)] if status.HasField("canary") else ()),
        *([_process_table(status)] if status.process_count > 1 else ()),
    )
    return Group(*parts)


def _embedded_line(embedded: admin_pb2.EmbeddedStatus) -> str:
    if embedded.problem:
        return f"[dim]embedded: {escape(embedded.problem)}[/]"
    return f"[dim]embedded: model {embedded.model_version}[/]"


def _process_table(status: admin_pb2.GetStatusResponse) -> Table:
    missing = status.process_count - len(status.processes)
    caption = f"{missing} of {status.process_count} processes missing" if missing > 0 else None
    columns = ("process", "ready", "up", "decisions", "in flight", "not in SQL", "restarts", "control")
    table = Table(*columns, caption=caption)
    for process in status.processes:
        name = f"{process.index}  answered" if process.answered else str(process.index)
        if process.problem:
            table.add_row(name, f"[red]{escape(process.problem)}[/]")
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
    for column in ("replica", "healthy", "breaker", "in flight", "queued", "p50", "p99", "rows", "model"):
        table.add_column(column, no_wrap=True)
    for replica in replicas:
        table.add_row(
            replica.name,
            "yes" if replica.healthy else "[red]no[/]",
            _breaker(replica),
            f"{replica.in_flight} ({replica.abandoned} lost)" if replica.abandoned else str(replica.in_flight),
            str(replica.queued),
            milliseconds(replica.p50),
            milliseconds(replica.p99),
            str(replica.rows),
            replica.model_version[:8],
        )
    return table


def _breaker(replica: admin_pb2.ReplicaStatus) -> str:
    """The state of a breaker, with the reason if an operator set it."""
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
            milliseconds(feature.age) if feature.HasField("age") else "",
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
        audit += f" [red]not writable: {escape(status.audit.last_error)}[/]"
    unhealthy = "  ".join(
        f"[red]{part.name}: {escape(part.detail)}[/]" for part in status.components if not part.healthy
    )
    lines = (f"decisions  {sources}", f"flags  {flags}", f"control  {control}", f"audit  {audit}", unhealthy)
    return "\n".join(filter(None, lines))


def canary_view(canary: admin_pb2.Canary) -> Group:
    """A canary for a terminal: where it is, and its evidence."""
    state = enum_name(admin_pb2.CanaryState, canary.state)
    steps = " → ".join(
        f"[bold]{share:.0%}[/]" if index == canary.step else f"{share:.0%}" for index, share in enumerate(canary.steps)
    )
    colour = {"PROMOTED": "green", "ROLLED_BACK": "red", "ABORTED": "yellow"}.get(state, "bold")
    lines = [
        f"canary [bold]{canary.model_version}[/] against {canary.champion_version}: [{colour}]{state}[/]"
        f"  {canary.weight:.0%} of the flows{' (held)' if canary.held else ''}   {steps}",
        f"begun {local_time(canary.started_at.ToDatetime(dt.UTC))} by {escape(canary.author)}: {escape(canary.reason)}",
        f"verdict [bold]{words(canary.verdict)}[/]: {escape(canary.verdict_reason)}",
        f"decisions of this process: {canary.decisions:,}",
    ]
    if canary.HasField("ended_at"):
        lines.append(f"ended {local_time(canary.ended_at.ToDatetime(dt.UTC))}")
    table = Table("check", "canary", "champion", "tolerance", "samples", "needed", "verdict")
    for check in canary.checks:
        known = check.HasField("canary")
        table.add_row(
            check.name,
            f"{check.canary:.4g}" if known else "",
            f"{check.champion:.4g}" if known else "",
            f"{check.limit:g}",
            f"{check.samples:,}",
            f"{check.minimum_samples:,}" if check.minimum_samples else "",
            words(check.verdict),
        )
    return Group(*lines, table) if canary.checks else Group(*lines)


def explanation_table(explanation: decision_pb2.Explanation) -> RenderableType:
    """The features that moved the score most come first; a sentence where there is no explanation."""
    if explanation.status != decision_pb2.EXPLANATION_STATUS_READY:
        status = enum_name(decision_pb2.ExplanationStatus, explanation.status)
        return f"explanation: {status}: {explanation.message}"
    parts = sorted(explanation.contributions, key=lambda part: -abs(part.contribution))
    largest = max((abs(part.contribution) for part in parts), default=0.0) or 1.0
    table = Table(
        title=f"why model {explanation.model_version} scored so ({explanation.method}), in log odds before calibration",
        caption=f"base {explanation.base:+.4f}, in all {explanation.margin:+.4f}; decision {explanation.decision_id}",
        title_justify="left",
    )
    table.add_column("feature")
    table.add_column("value", justify="right")
    table.add_column("contribution", justify="right")
    table.add_column("")
    for part in parts:
        width = round(_BAR_WIDTH * abs(part.contribution) / largest)
        value = f"{part.value:.6g}" if part.HasField("value") else "undefined"
        colour = "green" if part.contribution > 0 else "red"
        table.add_row(part.feature, value, f"{part.contribution:+.4f}", f"[{colour}]{'█' * width}[/{colour}]")
    return table


def words(verdict: admin_pb2.CanaryVerdict.ValueType) -> str:
    """A verdict for people."""
    return enum_name(admin_pb2.CanaryVerdict, verdict).replace("_", " ").lower()


def local_time(instant: dt.datetime) -> str:
    """An instant in this machine's time zone."""
    return instant.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def milliseconds(duration: Duration) -> str:
    """A duration for people."""
    return f"{duration.ToNanoseconds() / 1e6:.2f} ms"
