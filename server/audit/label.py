"""`pretrade audit label`: labels past decisions from recorded market events, and reports how good they were."""

from __future__ import annotations

import asyncio
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import sqlalchemy as sa
import typer
from rich.console import Console

from feature_cache.sources.session import SessionError, read_session, session_files
from pretrade.audit.v1 import audit_pb2
from pretrade.client.cli.fitting import Rows
from pretrade.client.cli.options import Directory
from pretrade.client.figures import figure
from pretrade.client.stack_file import DEFAULT_DIRECTORY
from pretrade.market.v1 import market_pb2
from server.audit.reading.labels import (
    Label,
    LabelledDecision,
    Labeller,
    Quality,
    events_of_topic,
    quality,
)
from server.audit.reading.places import DatabaseUrl, JournalPath, Models, failure, model_store, targets
from server.audit.reading.query import AuditQuery
from server.audit.review import Since, Until, decisions_of
from server.audit.store.refusals import refusals
from server.audit.store.store import Store
from server.errors import AuditError
from server.models.registry import Registry

app = typer.Typer()

_MOST_DECISIONS: Final = 10_000_000


@app.command(name="refusals")
def list_refusals(
    since: Since = None,
    limit: Annotated[int, typer.Option(min=1, help="Most rows to show.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    database_url: DatabaseUrl = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """List calls that were refused for their credentials, roles or rates, the newest first."""
    database_url, _ = targets(database_url, None, directory)
    if database_url is None:
        raise failure("refusals are in the database: name --database-url")
    table = Rows("refused (UTC)", "port", "method", "from", "caller", "reason", "more before>")
    try:
        with closing(Store(database_url)) as store, store.connect() as connection:
            for row in refusals(connection, since, limit):
                if as_json:
                    typer.echo(json.dumps(row | {"refused_at": row["refused_at"].isoformat()}))
                    continue
                at = row["refused_at"].replace(tzinfo=None).isoformat(" ", "milliseconds")
                cells = (row["plane"], row["method"].rpartition(".")[2], row["peer"], row["caller"], row["reason"])
                table.add(at, *cells, str(row["unrecorded_before"]))
    except (ValueError, sa.exc.SQLAlchemyError) as error:
        raise failure(str(error).splitlines()[0]) from error
    if not as_json:
        Console(width=None if Console().is_terminal else 200).print(table)


@app.command()
def label(
    recordings: Annotated[
        list[Path] | None, typer.Argument(help="Recordings (*.gz), or folders with them below. [only report]")
    ] = None,
    kafka: Annotated[str | None, typer.Option(help="host:port of Kafka brokers that hold the events instead.")] = None,
    topic: Annotated[str, typer.Option(help="Topic of the events.")] = "market.events",
    since: Since = None,
    until: Until = None,
    horizon_seconds: Annotated[
        float | None, typer.Option("--horizon", min=0.1, help="Seconds. Default: the champion's.")
    ] = None,
    models: Models = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
    database_url: DatabaseUrl = None,
    journal: JournalPath = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """Label decisions by what the market did next, store the labels, and report precision, coverage, calibration.

    The label is the one that the champion of the model store has learnt, but for the horizon where one is given.
    Coverage and precision count what callers heard as TRADE, not what was decided. Without events it reports on the
    labels that are there. Labelling twice changes nothing.
    """
    markout = Registry(models or model_store(directory)).champions_markout()
    if horizon_seconds is not None:
        markout = markout._replace(horizon_seconds=horizon_seconds)
    try:
        with closing(AuditQuery(*targets(database_url, journal, directory))) as query:
            if recordings or kafka:
                wanted = audit_pb2.DecisionFilter()
                if since is not None:
                    wanted.since.FromDatetime(since)
                if until is not None:
                    wanted.until.FromDatetime(until)
                packets = (one.packet for one in decisions_of(query, wanted, _MOST_DECISIONS))
                labeller = Labeller(packets, markout)
                if kafka:
                    labels = asyncio.run(_label_from_kafka(labeller, kafka, topic))
                else:
                    labels = list(_label_all(labeller, read_session(session_files(recordings or []))))
                query.add_labels(labels, markout.horizon_seconds)
                typer.echo(
                    f"{len(labels):,} labelled; {labeller.waiting:,} not: the events do not cover their horizon or the "
                    f"book was stale at its end; {labeller.unusable:,} were made without a mid",
                    err=as_json,
                )
            found = query.labelled(since, until, markout.horizon_seconds)
    except (AuditError, SessionError, ValueError) as error:
        raise failure(error) from error
    report = by_source(found)
    if as_json:
        typer.echo(json.dumps({source: _object(one) for source, one in report.items()}, indent=2, allow_nan=False))
    else:
        _print(report)


def _label_all(labeller: Labeller, events: Iterable[market_pb2.MarketEvent]) -> Iterator[Label]:
    for event in events:
        yield from labeller.on_event(event)


async def _label_from_kafka(labeller: Labeller, bootstrap_servers: str, topic: str) -> list[Label]:
    from aiokafka.errors import KafkaError  # noqa: PLC0415 - as in `events_of_topic`

    try:
        return [one async for event in events_of_topic(bootstrap_servers, topic) for one in labeller.on_event(event)]
    except KafkaError as error:
        raise failure(f"Kafka: {error}") from error


def by_source(found: list[LabelledDecision]) -> dict[str, Quality]:
    """How good the decisions of each source were, and all of them."""
    groups: dict[str, list[LabelledDecision]] = defaultdict(list)
    for one in found:
        groups["all"].append(one)
        groups[one.source].append(one)
    return {source: quality(group) for source, group in groups.items()}


def _object(one: Quality) -> dict[str, object]:
    """For JSON, which knows no NaN: a share of nothing is null."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(one).items()
    }


def _print(report: dict[str, Quality]) -> None:
    console = Console()
    if not report:
        console.print("no labelled decision")
        return
    console.print("quality by the market's own labels; coverage and precision are of what callers heard as TRADE")
    table = Rows("source", "labelled>", "base rate>", "coverage>", "precision>", "Brier>", "calibration error>")
    for source, one in report.items():
        figures = (one.base_rate, one.coverage, one.precision, one.brier, one.calibration_error)
        table.add(source, f"{one.decisions:,}", *(figure(value, ".4f") for value in figures))
    console.print(table)
    console.print("\ncalibration of the scores")
    bins = Rows("mean score>", "eligible>", "decisions>")
    for group in report["all"].bins:
        bins.add(f"{group.mean_score:.4f}", f"{group.eligible:.4f}", f"{group.decisions:,}")
    console.print(bins)
