"""`pretrade audit`: shows one decision, and verifies that no audit row was changed or removed.

The commands read the audit database and the journal files directly. They are therefore part of `pretrade-server`, not
of `pretrade`.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Final

import sqlalchemy as sa
import typer
from google.protobuf.json_format import MessageToDict
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.client.cli.options import Directory
from pretrade.client.cli.views import explanation_table
from pretrade.client.enum_names import enum_name
from pretrade.client.stack_file import DEFAULT_DIRECTORY
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.heard import explained, headline
from server.audit.reading.places import DatabaseUrl as _DatabaseUrl
from server.audit.reading.places import JournalPath as _JournalPath
from server.audit.reading.places import Models as _Models
from server.audit.reading.places import failure as _failure
from server.audit.reading.places import model_store as _model_store
from server.audit.reading.places import targets as _targets
from server.audit.reading.query import AuditQuery
from server.audit.reading.vectors import own_features, scored_features
from server.audit.reading.verify import Finding, Open, Unreachable, Unremembered, verify
from server.audit.shipping.heads import VerifyingKey
from server.audit.shipping.shipping import Progress, ShippingSettings
from server.audit.store.store import Store
from server.errors import AuditError, AuditUnavailableError, JournalError
from server.journal.journal_file import JournalReader, journals_of

app = typer.Typer()

_BAR_WIDTH: Final = 24
_COLOURS: Final = {audit_pb2.HEARD_ACTION_TRADE: "green", audit_pb2.HEARD_ACTION_NO_TRADE: "yellow"}
"""Of what the caller heard; anything else is red."""


@app.command()
def show(
    decision_id: Annotated[str, typer.Argument(help="The decision id of the reply.")],
    as_json: Annotated[bool, typer.Option("--json", help="The whole packet as JSON.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Also show what each feature added to the score.")] = False,
    models: _Models = None,
    database_url: _DatabaseUrl = None,
    journal: _JournalPath = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """Show everything about one decision: order, answer, reasons, features, cost, outcomes, evidence."""
    try:
        with closing(AuditQuery(*_targets(database_url, journal, directory))) as query:
            decision = query.get(decision_id)
            try:
                outcomes = query.outcomes(decision_id)
            except AuditUnavailableError as error:
                outcomes = []
                typer.echo(f"outcomes may be missing: {error}", err=True)
            explanation = _explanation(decision, query, models or _model_store(directory)) if explain else None
    except (AuditError, ValueError) as error:
        raise _failure(error) from error
    if as_json:
        document = to_dict(decision, outcomes)
        if explanation is not None:
            document["explanation"] = MessageToDict(explanation, preserving_proto_field_name=True)
        typer.echo(json.dumps(document, indent=2, allow_nan=False))
    else:
        Console().print(screen(decision, outcomes))
        if explanation is not None:
            Console().print(explanation_table(explanation))


def _explanation(decision: audit_pb2.AuditedDecision, query: AuditQuery, models: Path) -> pb.Explanation:
    from server.audit.reading.explain import Explainer  # noqa: PLC0415 - models, which few look at
    from server.models.archive import ModelStore  # noqa: PLC0415

    with Explainer(query.packet, ModelStore([models]).find) as explainer:
        return explainer.explain(decision.packet)


@app.command(name="verify")
def verify_chains(
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Check every row again. Without it, rows that were verified before are only counted."
        ),
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option(help="Public key (PEM) that must have signed the journal heads."),
    ] = None,
    brokers: Annotated[
        str | None,
        typer.Option(
            envvar="PRETRADE_DECISIONS_TOPIC__BOOTSTRAP_SERVERS",
            show_envvar=True,
            help="Brokers of the topic of decisions, to check the journal heads there as well.",
        ),
    ] = None,
    topic: Annotated[
        str, typer.Option(envvar="PRETRADE_DECISIONS_TOPIC__TOPIC", show_envvar=True, help="The topic of decisions.")
    ] = "decisions",
    database_url: _DatabaseUrl = None,
    journal: _JournalPath = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """Check that no row of the audit was changed and none is missing, in the database and in the journals.

    Exits with 1 at the first row that is changed or missing, and with 2 when a database, topic or journal could not be
    read.
    """
    asked = database_url is not None or journal is not None
    database_url, journal = _targets(database_url, journal, directory)
    incomplete = database_url is None and not asked
    try:
        heads: Sequence[packet_pb2.JournalHead] = ()
        if brokers is not None:
            try:
                heads = _heads_on(brokers, topic)
            except AuditUnavailableError as error:
                incomplete = True
                typer.echo(f"not compared: {error}", err=True)
        verifying = None if key is None else VerifyingKey(key)
        for one in verify(database_url, journal, full=full, key=verifying, topic_heads=heads):
            incomplete = incomplete or isinstance(one, Unreachable)
            typer.echo(_finding(one), err=isinstance(one, Unreachable))
    except (AuditError, ValueError) as error:
        raise _failure(error) from error
    if incomplete:
        raise typer.Exit(2)


def _heads_on(brokers: str, topic: str) -> Sequence[packet_pb2.JournalHead]:
    try:
        from server.audit.shipping.topic_heads import read_heads  # noqa: PLC0415 - an extra that servers need not install
    except ModuleNotFoundError as error:
        raise AuditUnavailableError(f"{error.name} is missing: pip install 'pretrade-server[worker]'") from error
    return read_heads(brokers, topic)


def _finding(one: Finding) -> str:
    """A line about what was found."""
    if isinstance(one, Unremembered):
        return f"not remembered for the next time: {one.why}"
    if isinstance(one, Unreachable):
        return f"{one.where}: not reachable, not verified: {one.why}"
    if isinstance(one, Open):
        return f"journal {one.journal_id}: {one.what}"
    rows = f"rows {one.first} to {one.last} are" if one.first else "no rows; the head is"
    since = f"; those up to {one.checkpoint} were verified before and are all there" if one.checkpoint else ""
    compared = f"; compared with {', '.join(one.compared)}" if one.compared else ""
    return f"{one.where}: journal {one.journal_id}: {rows} as they were written{since}{compared}"


@app.command(name="ship")
def ship_journals(
    path: Annotated[Path, typer.Argument(help="The journal, as PRETRADE_JOURNAL__PATH was; its places are with it.")],
    signing_key: Annotated[
        Path | None,
        typer.Option(
            envvar="PRETRADE_SHIPPING__SIGNING_KEY",
            show_envvar=True,
            help="Private key (PEM) that signs the journal heads.",
        ),
    ] = None,
    database_url: _DatabaseUrl = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """Ship the journals of a server that is gone, from its volume into the database, and close them.

    Waits while the database cannot be reached. A journal that a server writes is refused.
    """
    from server.audit.shipping.leftovers import ship_left  # noqa: PLC0415 - for this command alone

    if database_url is None:
        database_url, _ = _targets(None, None, directory)
    if database_url is None:
        raise _failure("no database to ship to: name --database-url")
    found = [one for one in journals_of(path) if one.exists()]
    if not found:
        raise _failure(f"there is no journal {path}")
    settings = ShippingSettings(signing_key=signing_key)
    for one in found:
        try:
            asyncio.run(ship_left(one, database_url, settings, told=_say_problem))
        except (JournalError, sqlite3.Error, OSError) as error:
            raise _failure(f"{one}: {error}") from error
        with closing(JournalReader(one)) as journal:
            typer.echo(f"{one}: journal {journal.journal_id} is in the database up to row {journal.last_position()}")


def _say_problem(progress: Progress) -> None:
    if progress.error:
        typer.echo(f"not shipped yet: {progress.error}", err=True)


@app.command(name="write-off")
def write_off(
    journal_id: Annotated[str, typer.Argument(help="The damaged journal, as `verify` names it.")],
    author: Annotated[str, typer.Option(help="Who gives it up.")],
    reason: Annotated[str, typer.Option(help="Why: what happened to it.")],
    beginning: Annotated[
        bool,
        typer.Option(
            "--beginning", help="Give up the beginning (rows that were shipped to another database), not the end."
        ),
    ] = False,
    database_url: _DatabaseUrl = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """Give up the lost end of a journal, or its beginning. `verify` then reports that and continues."""
    database_url, _ = _targets(database_url, None, directory)
    if database_url is None:
        raise _failure("no database: name --database-url")
    note = f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC, {author}: {reason}"
    try:
        with closing(Store(database_url)) as store:
            if not store.write_off(journal_id, note, beginning=beginning):
                raise _failure(f"no journal {journal_id} in the database")
    except (ValueError, sa.exc.SQLAlchemyError) as error:
        raise _failure(str(error).splitlines()[0]) from error
    typer.echo(f"journal {journal_id}: given up; {note}")


@app.command(name="migrate")
def migrate_database(
    database_url: _DatabaseUrl = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """Create the tables of the audit database, or upgrade them to this version. A starting server does the same."""
    database_url, _ = _targets(database_url, None, directory)
    if database_url is None:
        raise _failure("no database to migrate: name --database-url")
    try:
        with closing(Store(database_url)) as store:
            before, after = store.migrate()
    except (AuditError, ValueError, sa.exc.SQLAlchemyError) as error:
        raise _failure(error) from error
    typer.echo(f"revision {after}" + (" already" if before == after else f", from {before or 'an empty database'}"))


@app.command(name="export")
def export_days(
    to: Annotated[str, typer.Option(help="A directory, or a bucket such as s3://name/prefix.")],
    since: Annotated[dt.datetime, typer.Option(formats=["%Y-%m-%d"], help="First day, UTC.")],
    until: Annotated[
        dt.datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Last day, UTC. Default: today.")
    ] = None,
    database_url: _DatabaseUrl = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """Write whole days as Parquet, one file for each day and instrument. Repeating it writes the same files."""
    database_url, _ = _targets(database_url, None, directory)
    if database_url is None:
        raise _failure("no database to export: name --database-url")
    try:
        from server.audit.reading.export import export  # noqa: PLC0415 - an extra that servers need not install
    except ModuleNotFoundError as error:
        raise _failure(f"{error.name} is missing: pip install 'pretrade-server[export]'") from error
    last = until or dt.datetime.now(dt.UTC)
    if last.date() < since.date():
        raise typer.BadParameter("must not be before --since", param_hint="--until")
    rows = size = 0
    try:
        with Console(stderr=True).status("") as status:
            for one in export(database_url, to, since.date(), last.date()):
                rows, size = rows + (0 if one.is_evidence else one.rows), size + one.bytes
                status.update(f"{rows:,} decisions, {size / 2**20:,.1f} MiB")
                what = "journal entries" if one.is_evidence else "decisions"
                typer.echo(f"{one.path}: {one.rows:,} {what}, {one.bytes / max(1, one.rows):,.0f} bytes each")
    except (ValueError, OSError, sa.exc.SQLAlchemyError) as error:
        raise _failure(str(error).splitlines()[0]) from error
    typer.echo(f"{rows:,} decisions, {size / 2**20:,.1f} MiB in {to}")


def to_dict(decision: audit_pb2.AuditedDecision, outcomes: Sequence[packet_pb2.Outcome]) -> dict[str, Any]:
    """The whole packet in the JSON form of protobuf, with the features by name; undefined ones are null.

    What a model of another set scored is `scored_features`, empty for one of `mf1`.
    """
    return {
        "decision_id": decision.packet.decision.decision_id,
        "reply_status": decision.reply_status,
        "heard_action": audit_pb2.HeardAction.Name(decision.heard_action),
        "heard_reasons": [pb.ReasonCode.Name(reason) for reason in decision.heard_reasons],
        "packet": MessageToDict(decision.packet, preserving_proto_field_name=True),
        "features": _or_null(own_features(decision.packet)),
        "scored_features": _or_null(scored_features(decision.packet)),
        "outcomes": [MessageToDict(outcome, preserving_proto_field_name=True) for outcome in outcomes],
        "evidence": {
            "found_in": decision.found_in,
            "journal_id": decision.journal_id,
            "position": decision.position,
            "row": decision.row,
            "hash": decision.hash.hex(),
        },
    }


def screen(decision: audit_pb2.AuditedDecision, outcomes: Sequence[packet_pb2.Outcome]) -> RenderableType:
    """Everything about one decision, as readable text."""
    packet = decision.packet
    answer = packet.decision
    title = Text(f" {headline(decision)} ", f"bold reverse {_COLOURS.get(decision.heard_action, 'red')}")
    sections: list[RenderableType] = [
        _section("asked", _asked(packet.order)),
        _section("heard", _heard(decision)),
        _section("decided", _decided(packet)),
        _section("why", _why(answer)),
        _section("known", _known(packet)),
    ]
    if values := own_features(packet):
        turned = ", turned for a sell" if packet.order.side == pb.SIDE_SELL else ""
        by_whom = "as rules and guards" if packet.scored_feature_set else "as the model"
        sections.append(Panel(_grid(values), title=f"features {packet.feature_set_id}, {by_whom} saw them{turned}"))
    if scored := scored_features(packet):
        sections.append(Panel(_grid(scored), title=f"features {packet.scored_feature_set}, as the model saw them"))
    sections += [
        _cost(answer.budget),
        _attempts(packet),
        *([_section("outcome", _outcomes(outcomes))] if outcomes else []),
        _section("evidence", _evidence(decision)),
    ]
    # Above the frame, which would cut it off in a narrow terminal.
    return Group(title, Panel(Group(*sections), title=answer.decision_id, title_align="left"))


def _asked(order: pb.Order) -> Iterator[tuple[str, str]]:
    price = f"limit {order.limit_price:.12g}" if order.HasField("limit_price") else "market"
    yield "order", f"{enum_name(pb.Side, order.side)} {order.quantity:.12g} {order.instrument}, {price}"
    yield "strategy", order.strategy + (", reduce only" if order.reduce_only else "")
    yield "order ref", order.order_ref or "-"
    yield "idempotency key", order.idempotency_key or "-"


def _heard(decision: audit_pb2.AuditedDecision) -> Iterator[tuple[str, str]]:
    yield "action", enum_name(audit_pb2.HeardAction, decision.heard_action)
    if decision.heard_reasons:
        yield "reasons", ", ".join(enum_name(pb.ReasonCode, reason) for reason in decision.heard_reasons)
    yield "reply", explained(decision)


def _decided(packet: packet_pb2.DecisionPacket) -> Iterator[tuple[str, str]]:
    answer = packet.decision
    yield "action", enum_name(pb.Action, answer.action)
    yield "at", _instant(answer.decided_at.ToNanoseconds())
    source = enum_name(pb.Source, answer.source)
    if packet.cached_from_decision_id:
        source += f", from decision {packet.cached_from_decision_id}"
    yield "source", source
    yield (
        "score",
        f"{answer.score:.6f} against a threshold of {answer.threshold:.6f}"
        if answer.HasField("score")
        else "not scored",
    )
    if packet.chosen_model:
        yield "chosen by the map", f"{packet.chosen_model}, of version {answer.control_version}"
    if answer.model_name:
        yield "model", f"{answer.model_name} {answer.model_version}"
    for part in packet.parts:
        yield "part", f"{part.model_version}: score {part.score:.6f}, weight {part.weight:.4g}"


def _why(answer: pb.Decision) -> Iterator[tuple[str, str]]:
    yield "reasons", ", ".join(enum_name(pb.ReasonCode, reason) for reason in answer.reasons)
    degradations = ", ".join(enum_name(pb.Degradation, one) for one in answer.degradations)
    yield "degradations", degradations or "none"


def _known(packet: packet_pb2.DecisionPacket) -> Iterator[tuple[str, str]]:
    yield "mid price", f"{packet.mid_price:.12g}" if packet.mid_price else "unknown"
    provenance = packet.features
    if provenance.from_caller:
        yield "features", "sent by the caller"
    elif packet.HasField("features"):
        yield "features", f"sequence {provenance.sequence}, {_milliseconds(provenance.age_us)} old"
        yield "event time", _instant(provenance.event_time_ns)
    else:
        yield "features", "none"
    yield "trading state", packet.trading_state or "-"
    yield "flags on", ", ".join(packet.flags_on) or "none"


def _outcomes(outcomes: Sequence[packet_pb2.Outcome]) -> Iterator[tuple[str, str]]:
    for outcome in outcomes:
        filled = f"{outcome.filled_quantity:.12g} filled"
        if outcome.HasField("fill_price"):
            filled += f" at {outcome.fill_price:.12g}"
        if outcome.HasField("markout_bps"):
            filled += f", markout {outcome.markout_bps:.4g} bps"
        yield outcome.reporter, f"{filled}; recorded {_instant(outcome.recorded_at_ns)}"


def _evidence(decision: audit_pb2.AuditedDecision) -> Iterator[tuple[str, str]]:
    packet = decision.packet
    yield "instance", f"{packet.instance_id}, settings {packet.config_hash}"
    if packet.trace_id or packet.correlation_id:
        named = (("trace", packet.trace_id), ("correlation id", packet.correlation_id))
        yield "call", ", ".join(f"{name} {value}" for name, value in named if value)
    yield (
        "monotonic clock",
        f"arrived {packet.arrived_monotonic_ns / 1e9:.6f} s, decided {packet.decided_monotonic_ns / 1e9:.6f} s",
    )
    yield (
        "journal",
        f"{decision.journal_id}, entry {decision.position}, row {decision.row}, durability {packet.durability}",
    )
    yield "hash", decision.hash.hex()
    yield "found in", decision.found_in


def _cost(budget: pb.Budget) -> RenderableType:
    table = Table(title=f"cost: {_milliseconds(budget.used_us)} of {_milliseconds(budget.allowed_us)}", expand=True)
    table.add_column("stage")
    table.add_column("used", justify="right")
    table.add_column("allowed", justify="right")
    table.add_column("share of the whole budget")
    for use in budget.stages:
        width = round(_BAR_WIDTH * use.used_us / budget.allowed_us) if budget.allowed_us else 0
        table.add_row(
            enum_name(pb.Stage, use.stage),
            _milliseconds(use.used_us),
            _milliseconds(use.allowed_us),
            enum_name(pb.Degradation, use.skipped) if use.skipped else "█" * min(width, _BAR_WIDTH) or "▏",
        )
    return table


def _attempts(packet: packet_pb2.DecisionPacket) -> RenderableType:
    if not packet.attempts:
        return _section("attempts", [("model", "not asked")])
    table = Table(title="attempts", expand=True)
    for column in ("replica", "outcome", "used", "model version"):
        table.add_column(column)
    for attempt in packet.attempts:
        table.add_row(attempt.replica, attempt.outcome, _milliseconds(attempt.used_us), attempt.model_version or "-")
    return table


def _section(title: str, lines: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=9, style="bold cyan")
    table.add_column(width=16, style="dim")
    table.add_column(overflow="fold")
    for i, (name, value) in enumerate(lines):
        # What callers sent is shown as it is: neither markup nor a terminal's control sequences.
        table.add_row(
            title if i == 0 else "",
            name,
            Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)),
        )
    return table


def _grid(values: Mapping[str, float]) -> Columns:
    shown = {name: f"{value:.6g}" if math.isfinite(value) else "undefined" for name, value in values.items()}
    return Columns([f"{name:<21} {value:>12}" for name, value in shown.items()], column_first=True)


def _or_null(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _milliseconds(microseconds: int) -> str:
    return f"{microseconds / 1000:.3f} ms"


def _instant(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{dt.datetime.fromtimestamp(seconds, dt.UTC):%Y-%m-%d %H:%M:%S}.{rest:09d} UTC"
