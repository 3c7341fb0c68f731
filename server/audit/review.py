"""The `pretrade audit` commands for auditors: `list`, `watch`, `outcome`, `replay`.

`list` and `replay` read database and journals directly; `watch` and `outcome` are clients of `AuditService`. Exit
codes: 0 done; 1 refused, or a replay that differs; 2 wrong usage; 3 the server cannot be reached.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console

from pretrade.audit.v1 import audit_pb2, audit_pb2_grpc, packet_pb2
from pretrade.client.cli.connection import connected
from pretrade.client.cli.fitting import Rows
from pretrade.client.cli.options import Directory, span_seconds
from pretrade.client.enum_names import enum_choices, enum_name
from pretrade.client.stack_file import DEFAULT_DIRECTORY
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.heard import explained, headline, headline_of_note, heard
from server.audit.reading.places import (
    DatabaseUrl,
    JournalPath,
    Models,
    failure,
    model_store,
    targets,
)
from server.audit.reading.query import AuditQuery
from server.errors import AuditError
from server.journal.reply_status import REPLIED

if TYPE_CHECKING:
    from server.audit.replay import whatif
    from server.audit.replay.replay import Replay, WhatIf
    from server.models.archive import Archive, ModelStore

app = typer.Typer()

_RPC_SECONDS: Final = 10.0
_COLUMNS: Final = ("decided (UTC)", "decision", "instrument", "side", "strategy", "heard", "decided", "score", "source")
"""Of a decision in a list: see `_cells`."""
VERSION: Final = re.compile("[0-9a-f]{16}")
"""A model version, where a name may stand, too."""


def _choice_of(enum: object, flag: str, help: str) -> Any:  # noqa: A002 - Typer's word
    """The option of a command that takes a value of an enum by its name."""
    choices = enum_choices(enum)

    def value_of(text: str) -> int:
        if text not in choices:
            raise typer.BadParameter(f"must be one of {', '.join(choices)}")
        return choices[text]

    return typer.Option(flag, parser=value_of, metavar=f"[{'|'.join(choices)}]", help=help)


def instant(text: str) -> dt.datetime:
    """An instant: ISO 8601 (UTC where it names no zone), or how long ago, for example `90s`, `10m`, `2h`, `1d`."""
    ago = span_seconds(text)
    try:
        if ago is not None:
            return dt.datetime.now(dt.UTC) - dt.timedelta(seconds=ago)
        at = dt.datetime.fromisoformat(text)
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter("must be an ISO 8601 instant, or a time ago like 90s, 10m, 2h, 1d") from error
    return at if at.tzinfo else at.replace(tzinfo=dt.UTC)


Since = Annotated[
    dt.datetime | None,
    typer.Option(parser=instant, metavar="TIME", help="From this time on: an ISO 8601 instant, or a time ago (10m)."),
]
Until = Annotated[dt.datetime | None, typer.Option(parser=instant, metavar="TIME", help="Before this time; likewise.")]
Instruments = Annotated[list[str] | None, typer.Option("--instrument", help="Of this instrument; can be repeated.")]
Strategies = Annotated[list[str] | None, typer.Option("--strategy", help="Of this strategy; can be repeated.")]
Actions = Annotated[
    list[int] | None,
    _choice_of(audit_pb2.HeardAction, "--action", "The caller heard this; can be repeated."),
]
Decided = Annotated[
    list[int] | None,
    _choice_of(pb.Action, "--decided", "This was decided, whatever the caller heard; can be repeated."),
]
Sources = Annotated[list[int] | None, _choice_of(pb.Source, "--source", "From this source; can be repeated.")]
ByModel = Annotated[str, typer.Option("--by-model", help="Scored by this model: a name or a version.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
Target = Annotated[
    str | None, typer.Option("--target", envvar="PRETRADE_ADMIN_TARGET", help="HOST:PORT instead of the stack's.")
]


@app.command(name="list")
def list_decisions(
    since: Since = None,
    until: Until = None,
    instrument: Instruments = None,
    strategy: Strategies = None,
    action: Actions = None,
    decided: Decided = None,
    source: Sources = None,
    by_model: ByModel = "",
    limit: Annotated[int, typer.Option(min=1, help="Most rows to show.")] = 20,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
    journal: JournalPath = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """List decisions, the newest first: what the callers heard, and what was decided.

    They come from the database and, as far as they were not shipped yet, from the journal.
    """
    wanted = _filter(since, until, instrument, strategy, action, decided, source, by_model)
    with _query(database_url, journal, directory) as query:
        table = Rows(*_COLUMNS, "found in")
        for decision in decisions_of(query, wanted, limit):
            if as_json:
                typer.echo(_json(decision))
            else:
                table.add(*_cells(decision), decision.found_in)
    if not as_json:
        Console(width=None if Console().is_terminal else 200).print(table)


@app.command(name="watch")
def watch_decisions(
    instrument: Instruments = None,
    strategy: Strategies = None,
    action: Actions = None,
    decided: Decided = None,
    source: Sources = None,
    by_model: ByModel = "",
    after: Annotated[
        str, typer.Option(metavar="CURSOR", help="Continue after this event of an earlier watch (--json).")
    ] = "",
    from_oldest: Annotated[
        bool, typer.Option("--from-oldest", help="Begin with the oldest decisions in the journals, not with new ones.")
    ] = False,
    as_json: AsJson = False,
    target: Target = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """Print decisions of a running server as they become durable, until Ctrl-C."""
    wanted = _filter(None, None, instrument, strategy, action, decided, source, by_model)
    request = audit_pb2.WatchDecisionsRequest(filter=wanted, cursor=after, from_oldest=from_oldest)
    with _service(target, directory) as service:
        for event in service.WatchDecisions(request):
            if as_json:
                typer.echo(json.dumps(MessageToDict(event, preserving_proto_field_name=True)))
            elif event.HasField("decision"):
                typer.echo("  ".join(_cells(event.decision)))
            elif event.HasField("missed"):
                missed = event.missed
                rows = f"rows {missed.first_position} to {missed.last_position} of journal {missed.journal_id}"
                typer.echo(f"{rows} were trimmed; see `audit list`")
            elif event.HasField("reply_heard"):
                typer.echo(f"{event.reply_heard.decision_id}: a repeat of the call heard the decision")
            else:
                note = event.reply_unconfirmed
                typer.echo(f"{note.decision_id}: {headline_of_note(note)}")


@app.command(name="outcome")
def record_outcome(
    decision_id: Annotated[str, typer.Argument(help="The decision id of the reply.")],
    filled: Annotated[float, typer.Option(help="Quantity filled in base asset; 0 for nothing.")],
    reporter: Annotated[str, typer.Option(help="Who reports.")],
    price: Annotated[float | None, typer.Option(help="Average price of the fills.")] = None,
    markout_bps: Annotated[float | None, typer.Option(help="Side-signed markout of the fill, in basis points.")] = None,
    target: Target = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """Record the outcome of an order. Repeating it changes nothing; a different outcome is refused."""
    outcome = packet_pb2.Outcome(
        decision_id=decision_id, reporter=reporter, filled_quantity=filled, fill_price=price, markout_bps=markout_bps
    )
    with _service(target, directory) as service:
        response = service.RecordOutcome(audit_pb2.RecordOutcomeRequest(outcome=outcome), timeout=_RPC_SECONDS)
    typer.echo("was recorded before" if response.existed else "recorded")


@app.command()
def replay(
    decision_id: Annotated[str | None, typer.Argument(help="One decision. [all that the options name]")] = None,
    since: Since = None,
    until: Until = None,
    instrument: Instruments = None,
    strategy: Strategies = None,
    action: Actions = None,
    decided: Decided = None,
    source: Sources = None,
    by_model: ByModel = "",
    limit: Annotated[int, typer.Option(min=1, help="Most decisions to replay; the newest ones.")] = 10_000,
    model: Annotated[
        str | None, typer.Option(help="What if: decide with this model, a .mar file, a version or a name in the store.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="What if: compare scores with this threshold.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the scores into this .svg, .png or .pdf file.")] = None,
    models: Models = None,
    database_url: DatabaseUrl = None,
    journal: JournalPath = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """Recompute decisions from their packets, and show the first difference; or decide them with another model.

    Exits with 1 when a decision comes out otherwise than recorded, or cannot be replayed.
    """
    from server.audit.replay import whatif  # noqa: PLC0415 - models, which the other commands do not need
    from server.audit.replay.replay import AS_RECORDED, Replayer, WhatIf  # noqa: PLC0415
    from server.models.archive import ModelStore  # noqa: PLC0415

    store_path = models or model_store(directory)
    store = ModelStore([store_path])
    with _query(database_url, journal, directory) as query:
        what_if = AS_RECORDED
        if model is not None or threshold is not None:
            what_if = WhatIf(None if model is None else _archive(model, store, store_path), threshold)
        with Replayer(query.settings, query.packet, store.find, what_if) as replayer:
            if decision_id is not None:
                recorded = query.get(decision_id)
                one = asyncio.run(replayer.replay(recorded.packet))
                _print_replay(one, what_if, recorded)
                raise typer.Exit(int(what_if == AS_RECORDED and one.first_difference is not None))
            wanted = _filter(since, until, instrument, strategy, action, decided, source, by_model)
            comparison = asyncio.run(whatif.compare(decisions_of(query, wanted, limit), replayer, what_if))
    Console().print(whatif.tables(comparison), highlight=False)
    if plot is not None:
        _plot(comparison, plot)
    complete = comparison.equal == comparison.decisions
    raise typer.Exit(int(what_if == AS_RECORDED and not complete))


def _print_replay(one: Replay, what_if: WhatIf, audited: audit_pb2.AuditedDecision) -> None:
    from server.audit.replay.replay import AS_RECORDED  # noqa: PLC0415 - as in `replay`

    recorded = one.packet.decision
    score = repr(one.score) if one.score == one.score else "none"
    typer.echo(f"{recorded.decision_id}: {headline(audited)}")
    table = Rows("", "recorded", "replayed")
    table.add("action", _name(pb.Action, recorded.action), _name(pb.Action, one.action))
    table.add("score", repr(recorded.score) if recorded.HasField("score") else "none", score)
    said = (recorded.reasons, one.reasons)
    table.add("reasons", *(", ".join(_name(pb.ReasonCode, reason) for reason in reasons) for reasons in said))
    Console().print(table, highlight=False)
    for fact in one.facts:
        typer.echo(f"taken from the packet: {fact}")
    if audited.reply_status != REPLIED:
        typer.echo(f"taken from the journal: {explained(audited)}")
    if what_if != AS_RECORDED:
        typer.echo(_what_if_heard(one, audited))
    elif one.first_difference is None:
        typer.echo("bit-equal")
    else:
        difference = one.first_difference
        typer.echo(f"DIFFERENT: {difference.field}: recorded {difference.recorded}, replayed {difference.replayed}")


def _what_if_heard(one: Replay, audited: audit_pb2.AuditedDecision) -> str:
    same = "the same action" if one.action == audited.packet.decision.action else "another action"
    return (
        same if audited.reply_status == REPLIED else f"{same}, but the caller would have heard {heard(audited)} again"
    )


def _archive(model: str, store: ModelStore, directory: Path) -> Archive:
    """The archive of a file, a version, or a name in the store."""
    from server.models.archive import read_archive  # noqa: PLC0415 - as in `replay`

    path = Path(model)
    if path.suffix == ".mar":
        return read_archive(path)
    if VERSION.fullmatch(model):
        return store.find(model)
    named = sorted(directory.rglob(f"{model}.mar"))
    if not named:
        raise failure(f"no model {model!r} in {directory}")
    return read_archive(named[0])


def _plot(comparison: whatif.Comparison, path: Path) -> None:
    from server.audit.replay import whatif  # noqa: PLC0415 - as in `replay`

    try:
        whatif.plot(comparison, path)
    except ModuleNotFoundError as error:
        raise failure("plots need the extra `plots`: pip install 'pretrade-server[plots]'") from error
    except (OSError, ValueError) as error:
        raise failure(error) from error
    typer.echo(f"drawn into {path}")


@contextmanager
def _query(database_url: str | None, journal: Path | None, directory: Path) -> Iterator[AuditQuery]:
    """The audit; turns its errors into messages and exit codes."""
    try:
        with closing(AuditQuery(*targets(database_url, journal, directory))) as query:
            yield query
    except (AuditError, ValueError) as error:
        raise failure(error) from error


def decisions_of(
    query: AuditQuery, wanted: audit_pb2.DecisionFilter, limit: int
) -> Iterator[audit_pb2.AuditedDecision]:
    """The newest that match; says what is missing."""
    return query.newest(wanted, limit, lambda what: typer.echo(f"incomplete: {what}", err=True))


@contextmanager
def _service(target: str | None, directory: Path) -> Iterator[audit_pb2_grpc.AuditServiceStub]:
    """A running server's service; turns failures into messages and exit codes."""
    with connected(target, directory, "admin") as channel:
        yield audit_pb2_grpc.AuditServiceStub(channel)


def _filter(
    since: dt.datetime | None,
    until: dt.datetime | None,
    instruments: list[str] | None,
    strategies: list[str] | None,
    heard_actions: list[int] | None,
    decided: list[int] | None,
    sources: list[int] | None,
    model: str,
) -> audit_pb2.DecisionFilter:
    wanted = audit_pb2.DecisionFilter(
        instruments=instruments or (),
        strategies=strategies or (),
        heard_actions=[audit_pb2.HeardAction.ValueType(number) for number in heard_actions or ()],
        decided_actions=[pb.Action.ValueType(number) for number in decided or ()],
        sources=[pb.Source.ValueType(number) for number in sources or ()],
        model=model,
    )
    if since is not None:
        wanted.since.FromDatetime(since)
    if until is not None:
        wanted.until.FromDatetime(until)
    return wanted


def _cells(decision: audit_pb2.AuditedDecision) -> tuple[str, ...]:
    """One decision in a line; what callers wrote is shown without a terminal's control sequences."""
    order, answer = decision.packet.order, decision.packet.decision
    cells = (
        answer.decided_at.ToDatetime().isoformat(" ", "milliseconds"),
        answer.decision_id,
        order.instrument,
        enum_name(pb.Side, order.side),
        order.strategy,
        heard(decision),
        enum_name(pb.Action, answer.action),
        f"{answer.score:.4f} / {answer.threshold:.4f}" if answer.HasField("score") else "-",
        enum_name(pb.Source, answer.source),
    )
    return tuple("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in cell) for cell in cells)


def _json(decision: audit_pb2.AuditedDecision) -> str:
    return json.dumps(MessageToDict(decision, preserving_proto_field_name=True))


def _name(enum_type: Any, value: int) -> str:
    return str(enum_type.DESCRIPTOR.values_by_number[value].name)
