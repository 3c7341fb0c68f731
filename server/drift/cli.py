"""`pretrade audit drift`: whether what the model sees, and says, still is what it learnt.

It reads the audit database itself, as all of `pretrade audit` does, and is therefore part of `pretrade-server`.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pretrade.audit.v1 import audit_pb2
from pretrade.client.cli.options import Directory
from pretrade.client.stack_file import DEFAULT_DIRECTORY
from server.audit.label import by_source
from server.audit.reading.places import DatabaseUrl, JournalPath, Models, failure, targets
from server.audit.reading.query import AuditQuery
from server.audit.review import Since, Until, decisions_of
from server.drift.report import write_report
from server.drift.summary import Summary, metadata_of, summarise
from server.errors import AuditError, AuditUnavailableError
from server.models.archive import ModelStore
from server.models.markout import HORIZON_SECONDS

app = typer.Typer()


@app.command()
def drift(
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="Look at so many of the newest decisions.")] = 20_000,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page with plots to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
    models: Models = None,
    database_url: DatabaseUrl = None,
    journal: JournalPath = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """Compare the features and scores of recent decisions with the training data of their model (PSI).

    A limit comes with every figure: what as many independent values without drift exceed in one report of a hundred.
    Exit codes: 0 nothing drifted, 1 no comparison, 4 something drifted.
    """
    wanted = audit_pb2.DecisionFilter()
    if since is not None:
        wanted.since.FromDatetime(since)
    if until is not None:
        wanted.until.FromDatetime(until)
    store = ModelStore([models or directory / "models"])
    try:
        with closing(AuditQuery(*targets(database_url, journal, directory))) as query:
            packets = (one.packet for one in decisions_of(query, wanted, limit))
            found = summarise(packets, lambda version: metadata_of(store.find(version).files))
            try:
                quality = by_source(query.labelled(since, until, HORIZON_SECONDS))
            except AuditUnavailableError:
                quality = {}
        if report is not None:
            write_report(report, found, quality)
    except (AuditError, ValueError, OSError) as error:
        raise failure(error) from error
    except ModuleNotFoundError as error:
        raise failure("plots need the extra `plots`: pip install 'pretrade-server[plots]'") from error
    if as_json:
        typer.echo(json.dumps(asdict(found) | {"drifted": [one.name for one in found.drifted]}, indent=2))
    else:
        _print(found)
    if found.problem:
        raise typer.Exit(1)
    if found.drifted:
        raise typer.Exit(4)


def _print(found: Summary) -> None:
    console = Console()
    console.print(f"model {found.model_version or '?'}: {found.decisions:,} decisions, {found.rows:,} different inputs")
    if found.problem:
        console.print(f"no comparison: {found.problem}", markup=False)
        return
    table = Table("feature", "PSI", "limit", "independent", "undefined", "before", "")
    for one in found.drifts:
        limit = "too few" if one.limit is None else f"{one.limit:.3f}"
        shares = (f"{one.undefined:.1%}", f"{one.undefined_before:.1%}")
        verdict = "[red]drifted[/]" if one.drifted else ""
        table.add_row(one.name, f"{one.psi:.3f}", limit, f"{one.independent:,}", *shares, verdict)
    console.print(table)
