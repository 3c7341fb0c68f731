"""`pretrade audit drift`: whether what the model sees, and says, still is what it learnt.

It reads the audit database itself, as all of `pretrade audit` does, and is therefore part of `pretrade-server`.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from feature_cache.har import REGIMES
from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.client.cli.fitting import Rows
from pretrade.client.cli.options import Directory
from pretrade.client.stack_file import DEFAULT_DIRECTORY
from server.audit.label import by_source
from server.audit.reading.places import DatabaseUrl, JournalPath, Models, failure, model_store, targets
from server.audit.reading.query import AuditQuery
from server.audit.review import VERSION, Since, Until, decisions_of
from server.drift.regimes import Regime
from server.drift.report import write_report
from server.drift.summary import FEWEST, Drift, Summary, metadata_of, newest_champion, of_model, summarise
from server.errors import AuditError, AuditUnavailableError, InvalidRequestError
from server.models.archive import ModelStore
from server.models.registry import Registry

app = typer.Typer()

_WINDOW: Final = dt.timedelta(minutes=15)
"""How far the comparison looks back by default, as the server's own does."""


@app.command()
def drift(
    since: Since = None,
    until: Until = None,
    limit: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Look at so many decisions, spread evenly over the time.")
    ] = 20_000,
    model: Annotated[
        str,
        typer.Option(
            help="The version to compare, or a model of the server's by its name, whose newest champion is then"
            " compared. Default: the champion of the newest decision."
        ),
    ] = "",
    report: Annotated[Path | None, typer.Option(help="Write an HTML page with plots to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
    models: Models = None,
    database_url: DatabaseUrl = None,
    journal: JournalPath = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """Compare the features and scores of recent decisions with the training data of their model (PSI).

    Without --since and --until it looks at the last 15 minutes in which decisions were made. A limit comes with every
    figure: what as many independent values without drift exceed in one report of a hundred.

    Exit codes: 0 nothing drifted, 1 no comparison, 4 something drifted.
    """
    root, version = models or model_store(directory), model if VERSION.fullmatch(model) else ""
    store, markout = ModelStore([root]), Registry(root).champions_markout()
    try:
        with closing(AuditQuery(*targets(database_url, journal, directory))) as query:
            period = _period(query, since, until)
            name = "" if model == version else model
            packets = _of_orders(query, period, limit, name) if name else _sample(query, period, limit)
            try:
                labelled = query.labelled(since, until, markout.horizon_seconds)
            except AuditUnavailableError:
                labelled = []
            eligible = {one.decision_id: one.eligible for one in labelled}
            found = summarise(packets, lambda one: metadata_of(store.find(one).files), version, eligible)
        if report is not None:
            write_report(report, found, by_source(labelled))
    except (AuditError, ValueError, OSError) as error:
        raise failure(error) from error
    except ModuleNotFoundError as error:
        raise failure("plots need the extra `plots`: pip install 'pretrade-server[plots]'") from error
    if as_json:
        typer.echo(json.dumps(asdict(found) | {"drifted": [one.name for one in found.drifted]}, indent=2))
    else:
        print_report(found)
    if found.problem:
        raise typer.Exit(1)
    if found.drifted:
        raise typer.Exit(4)


def _period(query: AuditQuery, since: dt.datetime | None, until: dt.datetime | None) -> audit_pb2.DecisionFilter:
    """What was decided in this time: in the newest 15 minutes of decisions where it has no beginning."""
    wanted = audit_pb2.DecisionFilter()
    if until is not None:
        wanted.until.FromDatetime(until)
    newest = next(decisions_of(query, wanted, 1), None)
    at = dt.datetime.now(dt.UTC) if newest is None else newest.packet.decision.decided_at.ToDatetime(dt.UTC)
    end = until or at + dt.timedelta(seconds=1)
    wanted.until.FromDatetime(end)
    wanted.since.FromDatetime(since or end - _WINDOW)
    return wanted


def _sample(
    query: AuditQuery, period: audit_pb2.DecisionFilter, limit: int, version: str = ""
) -> list[packet_pb2.DecisionPacket]:
    """Decisions of a time, spread evenly over it; those by a version where one is given."""
    wanted = audit_pb2.DecisionFilter(model=version)
    wanted.MergeFrom(period)
    return query.spread(wanted, limit, lambda what: typer.echo(f"incomplete: {what}", err=True))


def _of_orders(
    query: AuditQuery, period: audit_pb2.DecisionFilter, limit: int, name: str
) -> list[packet_pb2.DecisionPacket]:
    """Decisions of orders that the model map gave to a model: also where they are few among those of other models.

    Raises:
        InvalidRequestError: There is none.
    """
    sample = _sample(query, period, limit)
    found = {one.decision.decision_id: one for one in of_model(sample, name)}
    if not found:
        raise InvalidRequestError(
            f"of the {len(sample):,} decisions that were looked at none was of a model {name!r}: `pretrade models map`"
            " has the names, and --limit looks at more"
        )
    if champion := newest_champion(found.values()):
        more = of_model(_sample(query, period, limit, champion), name)
        found.update((one.decision.decision_id, one) for one in more)
    return list(found.values())


def print_report(found: Summary) -> None:
    """Prints a report for people; its last line is the verdict."""
    console = Console()
    console.print(
        f"model {found.model_version or '?'}: {found.decisions:,} decisions looked at, {found.rows:,} different inputs"
        " of this model",
        highlight=False,
    )
    for version, count in found.others.items():
        console.print(f"left out: {count:,} decisions by model {version} (--model {version})", highlight=False)
    if found.problem:
        console.print(f"no comparison: {found.problem}", markup=False)
        return
    table = Rows("feature", "PSI>", "limit>", "values>", "learnt from>", "undefined>", "before>", "verdict")
    for one in found.drifts:
        limit = "–" if one.limit is None else f"{one.limit:.3f}"
        sizes = (f"{one.independent:,}", f"{one.reference_independent:,}")
        shares = (f"{one.undefined:.1%}", f"{one.undefined_before:.1%}")
        table.add(one.name, f"{one.psi:.3f}", limit, *sizes, *shares, _verdict(one))
    console.print(table)
    console.print(f"values: independent ones; too few: less than {FEWEST} of them", highlight=False)
    for why in dict.fromkeys(one.not_judged for one in found.drifts if one.not_judged):
        names = ", ".join(one.name for one in found.drifts if one.not_judged == why)
        console.print(f"not judged: {names}, which {why}", highlight=False)
    if found.regimes:
        console.print(_regimes(found.regimes))
    judged = [one for one in found.drifts if not (one.not_judged or one.too_few)]
    drifted = ", ".join(one.name for one in found.drifted)
    if not judged:
        verdict = "nothing could be judged"
    else:
        verdict = f"drifted: {drifted}" if drifted else f"nothing drifted, of {len(judged)} that could be judged"
    console.print(verdict, highlight=False)


def _regimes(regimes: Iterable[Regime]) -> Rows:
    """How the model did in calm and in restless markets."""
    table = Rows("volatility ahead", "inputs>", "share>", "before>", "coverage>", "labelled trades>", "precision>")
    for one in regimes:
        precision = "–" if one.precision is None else f"{one.precision:.3f}"
        shares = (f"{one.share:.1%}", f"{1 / len(REGIMES):.1%}", f"{one.coverage:.3f}")
        table.add(one.name, f"{one.inputs:,}", *shares, f"{one.labelled:,}", precision)
    return table


def _verdict(one: Drift) -> str | Text:
    if one.drifted:
        return Text("drifted", "red")
    if one.not_judged:
        return "not judged"
    return "too few" if one.too_few else ""
