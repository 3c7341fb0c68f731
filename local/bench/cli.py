"""Commands that measure: `bench` and its variants, `soak`. Each loads what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from local.options import Directory, Recording, given

app = typer.Typer()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def soak(context: typer.Context, directory: Directory = None, data: Recording = None) -> None:
    """Run the whole stack under load for half an hour, and check that memory, descriptors, tasks and latency stay flat.

    It takes --minutes (30), --rate (300 orders a second), --json FILE and the other options of `python -m
    loadtest.studies.soak`. PRETRADE_GRPC__EDGE=envoy puts the server behind Envoy.
    """
    from local.bench.soak import run_soak  # noqa: PLC0415

    raise typer.Exit(run_soak(given(dir=directory, data=data), context.args))


@app.command()
def bench(
    directory: Directory = None,
    data: Recording = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes: fewer loads, one round.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Also keep the figures under loadtest/results.")] = False,
    profile: Annotated[
        Path | None,
        typer.Option(help="Profile each edge under load: .svg is a flame graph, .json for speedscope, else stacks."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="HOST:PORT of a deployment to measure instead, by callers in Python.")
    ] = None,
    instrument: Annotated[
        list[str] | None, typer.Option(help="SYMBOL.VENUE that the target knows; can be repeated.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Of a closed loop in one round. [0.8]")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Of each loop; medians are shown. [5]")] = None,
    deadline_ms: Annotated[float, typer.Option(min=1, help="Of every order, where the generator sets one.")] = 200.0,
    json: Annotated[Path | None, typer.Option(help="File for all figures.")] = None,
    against: Annotated[
        str | None, typer.Option(help="An older commit: its servers are called in the same rounds, behind Envoy only.")
    ] = None,
) -> None:
    """Measure decisions a second and latency on both edges, next to bare echoes, TorchServe and FastAPI.

    Closed loops with 1 to 256 callers, streams and batches, open loops at fixed rates and at half of what the closed
    ones reached, and where the CPU of a decision goes. It says of every figure that is wanted whether it is reached.
    `pretrade bench-compare` shows the change against the run that was kept last. With --against, the servers of an
    older commit stand in for TorchServe, FastAPI and the portable edge, and ratios to them are shown.
    """
    from loadtest.benchmark.bench import INSTRUMENTS, run_target  # noqa: PLC0415
    from loadtest.generators.load import plan  # noqa: PLC0415
    from local.bench.bench import Outputs, run_bench  # noqa: PLC0415
    from local.bench.phases import phases, phases_against  # noqa: PLC0415

    deadline_seconds = deadline_ms / 1e3
    if target is not None:
        wanted = plan(quick=quick, rounds=rounds, seconds=seconds, deadline_seconds=deadline_seconds)
        raise typer.Exit(run_target(target, instrument or INSTRUMENTS, wanted, json, Console()))
    if against is not None and keep:
        raise typer.BadParameter("a run against an older commit lacks what kept runs are for", param_hint="--keep")
    of_all = phases if against is None else phases_against
    measured = of_all(quick=quick, rounds=rounds, seconds=seconds, deadline_seconds=deadline_seconds)
    raise typer.Exit(run_bench(given(dir=directory, data=data), measured, Outputs(json, keep, profile), against))


@app.command("bench-compare")
def bench_compare(
    now: Annotated[Path | None, typer.Argument(help="Figures of a run. [the last one]")] = None,
    then: Annotated[
        Path | None, typer.Argument(help="Figures of the run to compare with. [the last saved before it]")
    ] = None,
    directory: Directory = None,
) -> None:
    """Show what changed between two runs of `pretrade bench`, and what the machine did meanwhile."""
    from loadtest.benchmark.compare import run_compare  # noqa: PLC0415
    from local.bench.bench import LAST_RUN  # noqa: PLC0415

    raise typer.Exit(run_compare(now or (directory or Path(".pretrade")) / LAST_RUN, then, Console()))


@app.command("bench-costs")
def bench_costs(
    data: Recording = None,
    directory: Directory = None,
    edge: Annotated[str, typer.Option(help="`grpcio` or `envoy`.")] = "envoy",
    variant: Annotated[
        list[str] | None, typer.Option(help="What to leave out, a server for each; can be repeated. [all of them]")
    ] = None,
    callers: Annotated[list[int] | None, typer.Option(min=1, help="Calls under way; can be repeated. [64]")] = None,
    seconds: Annotated[float, typer.Option(min=0.5, help="Load of one round, on each server.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are shown.")] = 3,
    json: Annotated[Path | None, typer.Option(help="File for all figures.")] = None,
) -> None:
    """Measure what each optional part of a decision costs, and where its CPU goes, by process and thread.

    Servers that differ in one thing are loaded in turn: no-shadow-rows, tenth-of-shadow-rows, no-score-pairs, audit-os,
    audit-off, no-http (no HTTP port), watched (by HTTP, all that may), and unobserved (no metrics, traces or logs).
    """
    from local.bench.costs import VARIANTS, run_cost_bench  # noqa: PLC0415

    variants = variant or list(VARIANTS)
    if unknown := set(variants) - VARIANTS.keys():
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: not one of {', '.join(VARIANTS)}")
    chosen = given(dir=directory, data=data)
    raise typer.Exit(run_cost_bench(chosen, edge, variants, callers or [64], seconds, rounds, json))


@app.command("bench-flips")
def bench_flips(
    flips: Annotated[int, typer.Option(min=1, help="Changes to measure.")] = 100,
    callers: Annotated[
        int, typer.Option(min=0, help="Callers on each server meanwhile; more than 1 saturate two cores.")
    ] = 1,
    data: Recording = None,
    directory: Directory = None,
    json: Annotated[Path | None, typer.Option(help="File for all figures.")] = None,
) -> None:
    """Measure how fast a change reaches every process of two servers with two processes each, while they decide."""
    from local.bench.flips import run_flip_bench  # noqa: PLC0415

    raise typer.Exit(run_flip_bench(given(dir=directory, data=data), flips, callers, json))


@app.command("bench-features")
def bench_features(
    data: Recording = None,
    directory: Directory = None,
    seconds: Annotated[float, typer.Option(min=2, help="Length of a freshness round.")] = 4.0,
    rounds: Annotated[int, typer.Option(min=1, help="Freshness rounds.")] = 5,
    rate: Annotated[float, typer.Option(min=100, help="Their events a second.")] = 10_000.0,
    json: Annotated[Path | None, typer.Option(help="File for all figures.")] = None,
) -> None:
    """Measure the feature worker: its steps next to pandas, events a second from Kafka to Redis, and freshness."""
    from local.bench.features import run_feature_bench  # noqa: PLC0415

    raise typer.Exit(run_feature_bench(given(dir=directory, data=data), seconds, rounds, rate, json))


@app.command("bench-serving")
def bench_serving(
    store: Annotated[
        Path | None, typer.Option(help="Directory of champion.mar and challenger.mar. [that of `make models`]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that each setting takes next to ours.")] = 3,
    json: Annotated[Path | None, typer.Option(help="File for all figures.")] = None,
) -> None:
    """Measure model serving: runtimes in process, TorchServe calls by rows, and what each of its settings does."""
    from local.bench.serving import run_serving_bench  # noqa: PLC0415
    from torchserve.config import store_directory  # noqa: PLC0415

    raise typer.Exit(run_serving_bench(store or store_directory(Path(".pretrade"), None), rounds, json))


@app.command("bench-lookups")
def bench_lookups(
    directory: Directory = None,
    rows: Annotated[
        int, typer.Option(min=1000, help="Decisions of one day to search; a million take 1 GB.")
    ] = 2_000_000,
    journal_gib: Annotated[
        float, typer.Option(min=0.001, help="Size of a journal, in GiB, that is searched without a database.")
    ] = 1.0,
    json: Annotated[Path | None, typer.Option(help="File for all figures.")] = None,
) -> None:
    """Measure how long the audit takes to find one decision, or a page of them by each filter, among many millions."""
    from local.bench.lookups import run_lookup_bench  # noqa: PLC0415

    raise typer.Exit(run_lookup_bench(given(dir=directory), rows, journal_gib, json))
