"""Draws in a terminal: a server's status, replicas, changes, a canary with its evidence, decisions and their scores."""

from __future__ import annotations

import datetime as dt
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress

import grpc
from google.protobuf.duration_pb2 import Duration
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.client.cli.connection import RPC_SECONDS
from pretrade.client.cli.fitting import Items, Rows
from pretrade.client.cli.model_lines import champion_line, drift_line, expiry_text
from pretrade.client.cli.worst import faults
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2

_MINUTE_SECONDS = 60.0
_CHANGES_SECONDS = 5.0
CHANGES_SHOWN = 5
"""Changes that a live view adds below the status."""
_BAR_WIDTH = 20
_COLOURS = {admin_pb2.CANARY_VERDICT_WORSE: "red", admin_pb2.CANARY_VERDICT_BETTER_OR_EQUAL: "green"}


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
            request = admin_pb2.ListChangesRequest(page_size=CHANGES_SHOWN)
            with suppress(grpc.RpcError):  # the audit may be busy or away
                self._changes = list(stub.ListChanges(request, timeout=RPC_SECONDS).changes)

    def view(self) -> Group:
        """Both for a terminal."""
        (began, first), (ended, last) = self._counts[0], self._counts[-1]
        # A process that was restarted, or another one that answers, counts from the beginning.
        made = {source: max(0, count - first.get(source, 0)) for source, count in last.items()}
        lines = [Items(f"last {ended - began:.0f} s", [f"{source} {count}" for source, count in made.items()])]
        for change in self._changes:
            what = "; ".join(change.diff) or f"{change.subject}: {change.value} again"
            when = Text(f"{change.changed_at.ToDatetime():%H:%M:%S}", "dim")
            lines.append(Items(when, [what, f"({change.author}: {change.reason})"]))
        return Group(*lines)


def status_view(status: admin_pb2.GetStatusResponse, *, wide: bool = False) -> Group:
    """The status for a terminal: the worst thing first, and nothing of it cut off at any width.

    Args:
        status: What the server says.
        wide: Also what is not looked for in an incident: the version and sequence of vectors, and the workers.
    """
    parts = (
        *_worst(status),
        Items(
            Text(status.instance_id, "bold"),
            [
                Text("ready") if status.ready else Text("NOT READY", "red"),
                Text.assemble("trading ", _trading(status.trading_state)),
                f"up {status.uptime.seconds} s",
            ],
        ),
        replica_table(status.replicas),
        _feature_table(status, wide),
        *([_set_table(status)] if status.feature_sets else ()),
        *_count_lines(status),
        *([Text.from_markup(champion_line(status.champion))] if status.HasField("champion") else ()),
        Text.from_markup(drift_line(status.drift)),
        *([canary_view(status.canary)] if status.HasField("canary") else ()),
        *_model_lines(status),
        *([_process_table(status)] if status.process_count > 1 else ()),
    )
    return Group(*parts)


def _model_lines(status: admin_pb2.GetStatusResponse) -> Iterator[RenderableType]:
    """Which model decides which orders, where there are several, and the canaries of those besides the default one."""
    if not status.models:
        return
    rules = [f"{rule.instrument} {rule.strategy} → {rule.model}" for rule in status.model_map]
    yield Items("model map", [*rules, "* * → default"])
    for model in status.models:
        said = [model.champion_version or Text("no champion", "yellow"), model.feature_set]
        if not model.available:
            said.append(Text("NOT AVAILABLE", "red"))
        is_default = model.name == "default"  # of which more is said above
        if model.HasField("expires_in") and not is_default:
            said.append(Text.from_markup(expiry_text(model.expires_in.ToTimedelta())))
        yield Items(f"model {model.name}", [one for one in said if one])
        if is_default:
            continue
        if model.champion_version:
            yield Text.from_markup(drift_line(model.drift))
        if model.HasField("canary"):
            yield canary_view(model.canary)


def _worst(status: admin_pb2.GetStatusResponse) -> Iterator[Items]:
    """The worst thing, with its section of the runbook, and all that is wrong besides."""
    found = faults(status)
    if not found:
        yield Items(Text("worst thing now:", "bold"), [Text("nothing; no fault is known", "green")])
        return
    worst, *others = found
    yield Items(Text("worst thing now:", "bold"), [Text(worst.what, "bold red"), f"→ {worst.anchor}"])
    for one in others:
        yield Items(Text("also:", "bold"), [Text(one.what, "red"), f"→ {one.section}"])


def _trading(state: admin_pb2.TradingState.ValueType) -> Text:
    return Text(
        enum_name(admin_pb2.TradingState, state), "bold" if state == admin_pb2.TRADING_STATE_ACTIVE else "bold red"
    )


def _process_table(status: admin_pb2.GetStatusResponse) -> RenderableType:
    missing = status.process_count - len(status.processes)
    table = Rows("process", "ready", "up s>", "decisions>", "in flight>", "not in SQL>", "restarts>", "control>")
    problems = []
    for process in status.processes:
        name = f"{process.index} (answers)" if process.answered else str(process.index)
        if process.problem:
            problems.append(Items(name, [Text(process.problem, "red")]))
            continue
        counts = (process.decisions, process.in_flight, process.unshipped, process.restarts, process.control_version)
        ready = Text("yes") if process.ready else Text("NO", "red")
        table.add(name, ready, str(process.uptime.seconds), *map(str, counts))
    if missing > 0:
        problems.append(Items(Text(f"{missing} of {status.process_count} processes missing", "red"), []))
    return Group(table, *problems)


def replica_table(replicas: Iterable[admin_pb2.ReplicaStatus]) -> Rows:
    """The replicas for a terminal; times are in milliseconds."""
    table = Rows("replica", "healthy", "breaker", "in flight>", "queued>", "p50 ms>", "p99 ms>", "rows>", "model")
    for replica in replicas:
        table.add(
            replica.name,
            Text("yes") if replica.healthy else Text("NO", "red"),
            _breaker(replica),
            f"{replica.in_flight} ({replica.abandoned} lost)" if replica.abandoned else str(replica.in_flight),
            str(replica.queued),
            _in_milliseconds(replica.p50),
            _in_milliseconds(replica.p99),
            str(replica.rows),
            replica.model_version[:8],
        )
    return table


def _breaker(replica: admin_pb2.ReplicaStatus) -> Text:
    """The state of a breaker, with the reason if an operator set it."""
    ends = f" for {replica.reverts_in.seconds} s yet" if replica.HasField("reverts_in") else ""
    if replica.drained:
        return Text(f"DRAINED{ends}", "yellow")
    if replica.ejected:
        return Text(f"EJECTED, {replica.ejected}", "red")
    state = enum_name(admin_pb2.BreakerState, replica.breaker_state)
    if replica.breaker_mode == admin_pb2.BREAKER_MODE_AUTOMATIC:
        return Text(state, "" if state == "CLOSED" else "red")
    mode = enum_name(admin_pb2.BreakerMode, replica.breaker_mode)
    return Text(f"{mode}{ends}" + (f" (else {state})" if state != "CLOSED" else ""), "yellow")


def _feature_table(status: admin_pb2.GetStatusResponse, wide: bool) -> Rows:
    more = ("vector", "sequence>", "worker") if wide else ()
    table = Rows("instrument", "features", "event age ms>", "book", "times unknown>", "records behind>", *more)
    for feature in status.features:
        behind = Text(f"{feature.lag_records:,}" if feature.HasField("lag_records") else "not known")
        table.add(
            feature.instrument,
            Text("usable") if feature.usable else Text(feature.problem, "red"),
            _in_milliseconds(feature.age) if feature.HasField("age") else "none",
            _book(feature),
            str(feature.book_losses) if feature.worker else "not known",
            behind if feature.worker else Text("no worker reports", "red"),
            *((feature.vector_version, str(feature.sequence or ""), feature.worker) if wide else ()),
        )
    return table


def _set_table(status: admin_pb2.GetStatusResponse) -> Rows:
    """Feature sets besides `mf1` that models take."""
    table = Rows("feature set", "taken by", "computed features", "oldest ms>", "orders without a row")
    for one in status.feature_sets:
        lacking = [f"{each.instrument} {each.problem}" for each in one.computed if not each.usable]
        usable = f"usable of {len(one.computed)}" if one.computed else "none are computed"
        ages = [each.age.ToNanoseconds() for each in one.computed if each.HasField("age")]
        missing = [f"{each.orders:,} ({each.part})" for each in one.missing]
        table.add(
            one.feature_set,
            ", ".join(one.models),
            Text(", ".join(lacking), "red") if lacking else Text(usable),
            f"{max(ages) / 1e6:.2f}" if ages else "none",
            Text(", ".join(missing), "yellow") if missing else Text("0"),
        )
    return table


def _book(feature: admin_pb2.FeatureStatus) -> Text:
    """The state of the book, and why it is unknown."""
    if feature.book == admin_pb2.BOOK_STATE_UNSPECIFIED:
        return Text("not known")
    state = enum_name(admin_pb2.BookState, feature.book).lower()
    if feature.book != admin_pb2.BOOK_STATE_UNKNOWN:
        return Text(state)
    return Text(f"{state}{f': {feature.book_reason}' if feature.book_reason else ''}", "red")


def _count_lines(status: admin_pb2.GetStatusResponse) -> Iterator[Items]:
    yield Items("decisions", [f"{count.source} {count.decisions}" for count in status.sources])
    yield Items("flags", [f"{entry.name} {'on' if entry.enabled else 'off'}" for entry in status.flags])
    control: list[str | Text] = [
        f"version {status.control_version}",
        f"chain {' → '.join(status.chain_stages)}",
    ]
    if status.control.stale:
        control.append(Text("Redis not heard: others may have changed it", "red"))
        control.append(f"{status.control.pending} changes wait")
    yield Items("control", control)
    rows = f"{status.audit.unshipped} journal entries not yet in SQL"
    audit: list[str | Text] = [f"{status.audit.written} rows", rows]
    if not status.audit.writable:
        audit.append(Text(f"not writable: {status.audit.last_error}", "red"))
    yield Items("audit", audit)
    embedded = status.embedded
    yield Items("embedded", [embedded.problem or f"model {embedded.model_version}"])
    for part in status.components:
        if not part.healthy:
            yield Items(Text(part.name, "red"), [Text(part.detail, "red")])


def restriction_table(restrictions: Iterable[admin_pb2.Restriction]) -> Rows:
    """What the trading state comes from."""
    table = Rows("state", "by", "why", "for", "change id")
    for one in restrictions:
        span = ""
        if one.HasField("expires_in"):
            span = f"{one.expires_in.seconds} s yet"
        elif one.HasField("begins_in"):
            span = f"begins in {one.begins_in.seconds} s"
        table.add(enum_name(admin_pb2.TradingState, one.state), one.author, one.reason, span, one.change_id)
    return table


def change_table(changes: Iterable[admin_pb2.Change]) -> Rows:
    """Changes, as they come."""
    table = Rows("when (UTC)", "version>", "change", "by", "why")
    for change in changes:
        when = f"{change.changed_at.ToDatetime():%Y-%m-%d %H:%M:%S}"
        what = "\n".join(change.diff) or f"{change.subject}: {change.value} again"
        table.add(when, str(change.version or ""), what, change.author, change.reason)
    return table


def canary_view(canary: admin_pb2.Canary) -> Group:
    """A canary for a terminal: where it is, what its evidence says, and each check in words."""
    state = enum_name(admin_pb2.CanaryState, canary.state)
    steps = Text(" → ").join(
        Text(f"{share:.0%}", "bold" if index == canary.step else "") for index, share in enumerate(canary.steps)
    )
    colour = {"PROMOTED": "green", "ROLLED_BACK": "red", "ABORTED": "yellow"}.get(state, "bold")
    place: list[str | Text] = [f"against champion {canary.champion_version}:", Text(state, colour)]
    if canary.state == admin_pb2.CANARY_STATE_RUNNING:
        place.append(
            f"{canary.weight:.0%} of the flows{covered(canary)}{', held there by an operator' if canary.held else ''}"
        )
    lines: list[RenderableType] = [
        Items(
            Text.assemble(f"canary {f'of {canary.model} ' if canary.model else ''}", (canary.model_version, "bold")),
            place,
        ),
        Items("steps", [steps, *_flows(canary)]),
        Items(
            "begun",
            [local_time(canary.started_at.ToDatetime(dt.UTC)), f"by {canary.author}:", canary.reason],
        ),
    ]
    if canary.HasField("ended_at"):
        lines.append(Items("ended", [local_time(canary.ended_at.ToDatetime(dt.UTC))]))
    lines += [
        Items("verdict", [Text(words(canary.verdict), "bold"), canary.verdict_reason]),
        Items("decisions of this process", [f"{canary.decisions:,}"]),
        *(Items(Text(check.name, _COLOURS.get(check.verdict, "")), [check.detail]) for check in canary.checks),
    ]
    return Group(*lines)


def covered(canary: admin_pb2.Canary) -> str:
    """The part of the orders that a canary is held to, after a word; empty for all."""
    if not canary.instrument and not canary.strategy:
        return ""
    return f" of {canary.instrument or 'all instruments'} and {canary.strategy or 'all strategies'}"


def _flows(canary: admin_pb2.Canary) -> Iterator[str | Text]:
    """How many of the flows are the canary's: without one, its share is nothing, and no evidence comes."""
    if canary.state != admin_pb2.CANARY_STATE_RUNNING:
        return
    if not canary.flows:
        yield Text("no order has come to this process since it began: nothing to decide, and no evidence", "yellow")
    elif not canary.canary_flows:
        yield Text(
            f"{canary.weight:.0%} of {canary.flows:,} flows is no flow: it gets no orders in this process, and no "
            "evidence. Give it more by `pretrade canary weight PERCENT`",
            "yellow",
        )
    else:
        yield f"{canary.canary_flows:,} of the {canary.flows:,} flows that this process saw are its own"


def decision_table(decision: decision_pb2.Decision) -> Table:
    """A decision for a terminal."""
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


def explanation_table(explanation: decision_pb2.Explanation) -> RenderableType:
    """The features that moved the score most come first; a sentence where there is no explanation."""
    if explanation.status != decision_pb2.EXPLANATION_STATUS_READY:
        status = enum_name(decision_pb2.ExplanationStatus, explanation.status)
        return f"explanation: {status}: {explanation.message}"
    parts = sorted(explanation.contributions, key=lambda part: -abs(part.contribution))
    largest = max((abs(part.contribution) for part in parts), default=0.0) or 1.0
    table = Table(
        title=f"why model {explanation.model_version} scored so ({explanation.method}), in log odds before calibration",
        caption=f"base {explanation.base:+.4f}, in all {explanation.margin:+.4f}; decision {explanation.decision_id}"
        + "".join(
            f"\npart {part.model_version}: score {part.score:.4f}, weight {part.weight:.3g}"
            for part in explanation.parts
        ),
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


def _in_milliseconds(duration: Duration) -> str:
    """The figure of a duration, under a heading that names the unit."""
    return f"{duration.ToNanoseconds() / 1e6:.2f}"
