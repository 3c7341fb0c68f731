"""`pretrade capacity`: the plan of `loadtest.capacity` as a table."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table


def capacity(
    rate: Annotated[float, typer.Option(min=1, max=1e7, help="Decisions a second, at the peak.")],
    deadline_ms: Annotated[float, typer.Option(min=1, max=10_000, help="What 99 of 100 answers are to meet.")] = 25.0,
    cores: Annotated[int, typer.Option(min=1, max=1_024, help="Of one machine.")] = 2,
    events: Annotated[float, typer.Option(min=0, max=1e8, help="Market events a second.")] = 0.0,
    limit: Annotated[
        float, typer.Option(min=0.05, max=0.95, help="Highest share of the cores and of an event loop that is used.")
    ] = 0.7,
    retention_days: Annotated[float, typer.Option(min=0, max=36_500, help="How long the database keeps rows.")] = 30.0,
    costs: Annotated[
        Path | None, typer.Option(help="Costs that `pretrade bench-capacity --costs FILE` wrote. [ours]")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for the plan.")] = None,
) -> None:
    """Plan servers, replicas, workers, partitions and disks for a rate, a deadline and machines of so many cores.

    The costs are those of one slow machine unless you measure yours; docs/capacity.md says how well this foretells.
    """
    from loadtest.capacity import Demand, OverloadError, Plan, plan  # noqa: PLC0415 - numpy
    from loadtest.costs import DEFAULT, Costs  # noqa: PLC0415 - as above

    try:
        known = Costs.read(costs or DEFAULT)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--costs") from error
    demand = Demand(rate, deadline_ms, cores, events, limit, retention_days)
    console = Console(highlight=False)

    def lines(found: Plan) -> list[tuple[str, str]]:
        load = found.load
        workers = f"{found.workers}, topic partitions {found.partitions}" if events else "no --events given"
        outage = _size(3_600 * found.journal_bytes)
        behind = known.database.rows_per_second * found.processes / found.database_rows
        return [
            ("server processes", f"{found.processes:,}, {found.per_machine} on a machine: {found.machines:,} machines"),
            ("primaries", f"{found.processes:,}, one with each server process"),
            ("secondaries, challengers", f"{found.secondaries:,}, {found.challengers:,}"),
            ("each process", f"{load.rate:,.0f} decisions/s, {load.cores:.2f} cores with its replicas"),
            ("  cores busy", f"{load.utilisation:.0%} of the machine, event loop {load.loop:.0%}"),
            ("  batches", f"{load.replica.rows:.1f} rows, {load.replica.batches:,.0f} a second"),
            ("  rows that wait", f"{load.replica.busy:.0%} (batches grow with the rate)"),
            ("  commits", f"{load.journal.rows:.1f} rows, {load.journal.batches:,.0f} a second"),
            ("latency", f"p50 {load.p50_ms:.1f} ms, p99 {load.p99_ms:.1f} ms"),
            ("feature workers", workers),
            ("PostgreSQL", f"{found.database_rows:,.0f} rows/s; shippers could {behind:,.1f} times that"),
            ("  disk", f"{_size(found.database_bytes)} in {retention_days:g} days at this rate"),
            (
                "journals",
                f"{_size(found.journal_bytes)}/s; an hour without PostgreSQL {outage}",
            ),
            ("exported Parquet", f"{_size(found.cold_bytes)} a day"),
        ]

    try:
        found = plan(known, demand)
    except OverloadError as error:
        console.print(f"[red]no number of such machines does it:[/] {error}")
        raise typer.Exit(1) from error
    table = Table(
        title=f"{rate:,.0f} decisions/s in {deadline_ms:g} ms on machines of {cores} cores",
        caption=f"at most {limit:.0%} of the cores and of an event loop",
        box=SIMPLE,
        show_header=False,
    )
    for what, how_much in lines(found):
        table.add_row(what, how_much)
    console.print(table)
    if json is not None:
        json.write_text(jsonlib.dumps({"demand": asdict(demand), "plan": asdict(found)}, indent=1) + "\n")


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1_000:
            return f"{number:,.1f} {unit}"
        number /= 1_000
    return f"{number:,.1f} PB"
