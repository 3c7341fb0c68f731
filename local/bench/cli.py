"""Commands that measure: `bench` and its kin, `soak`. Each loads what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from local.options import Directory, Recording, given

app = typer.Typer()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def soak(context: typer.Context, directory: Directory = None, data: Recording = None) -> None:
    """Run the whole stack under load for half an hour; do memory, descriptors, tasks and latency stay flat?

    Options of its own: --minutes 30, --rate 300 (orders a second), --json FILE and those of
    `python -m loadtest.studies.soak`. PRETRADE_GRPC__EDGE=envoy has the server behind Envoy.
    """
    from local.bench.soak import run_soak  # noqa: PLC0415

    raise typer.Exit(run_soak(given(dir=directory, data=data), context.args))


@app.command()
def bench(
    directory: Directory = None,
    data: Recording = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute or two: fewer loads, one round.")] = False,
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
    audit: Annotated[bool, typer.Option("--audit", help="Compare audit durability fsync, os and off instead.")] = False,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Of a closed loop in one round. [2]")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Of each closed loop; medians are shown. [2]")] = None,
    deadline_ms: Annotated[float, typer.Option(min=1, help="Of every order, where the generator sets one.")] = 200.0,
    json: Annotated[Path | None, typer.Option(help="File for all figures.")] = None,
) -> None:
    """Measure decisions a second and latency on both edges, next to bare echoes, TorchServe and FastAPI.

    Closed loops with 1 to 256 callers, streams and batches, then open loops at fixed rates and at half of what the
    closed ones reached. `pretrade bench-compare` shows the change against the run that was kept last.
    """
    from loadtest.benchmark.bench import INSTRUMENTS, run_target  # noqa: PLC0415
    from loadtest.benchmark.load import plan  # noqa: PLC0415
    from local.bench.bench import Outputs, run_audit_bench, run_bench  # noqa: PLC0415

    chosen = given(dir=directory, data=data)
    if audit:
        options = given(seconds=seconds, rounds=rounds, json=json)
        values = [f"--{name}={value}" for name, value in options.items()]
        raise typer.Exit(run_audit_bench(chosen, [*values, f"--deadline-ms={deadline_ms:g}"]))
    wanted = plan(quick=quick, rounds=rounds, seconds=seconds, deadline_seconds=deadline_ms / 1e3)
    if target is not None:
        raise typer.Exit(run_target(target, instrument or INSTRUMENTS, wanted, json, Console()))
    raise typer.Exit(run_bench(chosen, wanted, Outputs(json, keep, profile)))


@app.command("bench-compare")
def bench_compare(
    now: Annotated[Path | None, typer.Argument(help="Figures of a run. [the last one]")] = None,
    then: Annotated[Path | None, typer.Argument(help="Those to hold it against. [the last kept before it]")] = None,
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
    callers: Annotated[int, typer.Option(min=1, help="Calls under way at once.")] = 64,
    seconds: Annotated[float, typer.Option(min=0.5, help="Load of one round, on each server.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are shown.")] = 3,
    json: Annotated[Path | None, typer.Option(help="File for all figures.")] = None,
) -> None:
    """Measure where the CPU of a decision goes, by process and thread, and what each optional part of it costs."""
    from local.bench.costs import run_cost_bench  # noqa: PLC0415

    raise typer.Exit(run_cost_bench(given(dir=directory, data=data), edge, callers, seconds, rounds, json))


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


@app.command("bench-observability")
def bench_observability(
    directory: Directory = None,
    edge: Annotated[str, typer.Option(help="`grpcio` or `envoy`.")] = "grpcio",
    seconds: Annotated[float, typer.Option(min=0.5, help="Load of one round, on each of the two servers.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of rounds of each number of callers.")] = 5,
    json: Annotated[Path | None, typer.Option(help="File for all figures.")] = None,
) -> None:
    """Measure what metrics, traces of 1 % and logs cost, against a server that has none of them."""
    from local.bench.observability import run_observability_bench  # noqa: PLC0415

    raise typer.Exit(run_observability_bench(given(dir=directory), edge, seconds, rounds, json))


@app.command("bench-features")
def bench_features(
    data: Recording = None,
    directory: Directory = None,
    seconds: Annotated[float, typer.Option(min=5, help="Length of the freshness run.")] = 12.0,
    rate: Annotated[float, typer.Option(min=100, help="Its events a second.")] = 10_000.0,
    json: Annotated[Path | None, typer.Option(help="File for all figures.")] = None,
) -> None:
    """Measure the feature worker: its steps next to pandas, events a second from Kafka to Redis, and freshness."""
    from local.bench.features import run_feature_bench  # noqa: PLC0415

    raise typer.Exit(run_feature_bench(given(dir=directory, data=data), seconds, rate, json))


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
