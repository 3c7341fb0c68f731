"""The `pretrade` command."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from feature_cache.sources import cli as feature_cli
from feature_cache.sources import ingest_cli
from local.stack.proxies import spare_this_machine
from local.training import cli as training_cli
from server import canary_cli, stack_file, steering_cli
from server import cli as server_cli
from server.drift import cli as drift_cli
from server.security import client

app = typer.Typer(
    name="pretrade",
    help="Trade, no trade, or abstain? Answered for every order inside its deadline, with proof of why.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


_HERE, _SERVER, _MARKET, _MODELS, _MEASURE = (
    "Run it on this machine",
    "Ask and steer a server",
    "Market data",
    "Models",
    "Measure",
)
"""What the help lists the commands under."""

Directory = Annotated[
    Path | None, typer.Option("--dir", help="Where databases, models, journal and logs are kept. [.pretrade]")
]
Recording = Annotated[
    Path | None, typer.Option("--data", help="Directory of a recorded session to replay; without it, the simulator.")
]
Speed = Annotated[str | None, typer.Option(help="Speed of the market data: a factor, or max. [1]")]


@app.callback()
def credentials(
    tls_ca: Annotated[
        Path | None, typer.Option(envvar=client.CA, help="Authority of the server's certificate; every call uses TLS.")
    ] = None,
    cert: Annotated[Path | None, typer.Option(envvar=client.CERTIFICATE, help="Our client certificate.")] = None,
    key: Annotated[Path | None, typer.Option(envvar=client.KEY, help="Its private key.")] = None,
    tls_name: Annotated[
        str | None, typer.Option(envvar=client.TLS_NAME, help="Name in the server's certificate, if not the host's.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(envvar=client.TOKEN_FILE, help=f"File of our token; or {client.TOKEN} with the token itself."),
    ] = None,
) -> None:
    """Trade, no trade, or abstain? Answered for every order inside its deadline, with proof of why.

    The options stand before the command and are for those that call a server.
    """
    spare_this_machine()
    given = {client.CA: tls_ca, client.CERTIFICATE: cert, client.KEY: key, client.TLS_NAME: tls_name}
    for name, value in (given | {client.TOKEN_FILE: token_file}).items():
        if value is not None:
            os.environ[name] = str(value)


@app.command(rich_help_panel=_HERE)
def up(
    directory: Directory = None,
    data: Recording = None,
    speed: Speed = None,
    no_market: Annotated[bool, typer.Option("--no-market", help="Feed no market data.")] = False,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="Start this part alone; can be repeated. Of valkey, broker, postgres, primary, secondary, challenger, "
            "worker, market, server."
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Decision server processes; `kill -HUP` of the server replaces them.")
    ] = None,
    replica_tokens: Annotated[
        bool,
        typer.Option(
            envvar="PRETRADE_LOCAL_REPLICA_TOKENS",
            help="Have TorchServe ask for its own tokens, which the decision server shows it.",
        ),
    ] = True,
) -> None:
    """Run the whole stack on this machine until Ctrl-C: databases, broker, models, feature worker, decision server.

    Any part is replaced by an external one through PRETRADE_LOCAL_REDIS_URL, _DATABASE_URL, _KAFKA_BOOTSTRAP_SERVERS,
    _PRIMARY, _SECONDARY or _CHALLENGER.
    """
    from local.stack.up import run_up  # noqa: PLC0415 - the servers' clients, which the other commands do not need

    market = False if no_market else None
    given = _given(dir=directory, data=data, speed=speed, market=market, processes=processes)
    raise typer.Exit(run_up(given | {"replica_tokens": replica_tokens}, part or ()))


@app.command(rich_help_panel=_HERE)
def demo(
    duration: Annotated[float, typer.Option(min=1, help="How long orders are sent, in seconds.")] = 20.0,
    rate: Annotated[float, typer.Option(min=1, help="Orders a second.")] = 150.0,
    directory: Directory = None,
    data: Recording = None,
    speed: Speed = None,
    json: Annotated[Path | None, typer.Option(help="Write the summary to this file, as JSON.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write a picture of the last screen to this file, as SVG.")] = None,
) -> None:
    """Run the whole stack on this machine, send orders, kill a replica halfway, and print a summary."""
    from local.demo.demo import run_demo  # noqa: PLC0415 - as above

    raise typer.Exit(run_demo(_given(dir=directory, data=data, speed=speed), duration, rate, json, svg))


@app.command(rich_help_panel=_HERE)
def kill(
    part: Annotated[str, typer.Argument(help="The part, as `pretrade up --help` lists them.")],
    after: Annotated[float, typer.Option(min=0, help="Seconds until then.")] = 0.0,
    directory: Directory = None,
) -> None:
    """Kill a part of the stack that runs on this machine, as a fault would; `pretrade up` starts it again."""
    from local.stack.killing import kill_part  # noqa: PLC0415 - as above

    raise typer.Exit(kill_part(_given(dir=directory), part, after))


@app.command("trial-credentials", rich_help_panel=_HERE)
def trial_credentials(
    directory: Annotated[Path, typer.Argument(help="Where they are written.")],
    host: Annotated[list[str] | None, typer.Option(help="Name or address of the server; can be repeated.")] = None,
) -> None:
    """Make certificates and tokens for TRIALS on this machine, good for a day: never for production.

    `source DIRECTORY/trial.env` has a server ask for them, and this command show them.
    """
    from server.security import trial  # noqa: PLC0415 - cryptography, which the other commands do not need

    trial.write(directory.resolve(), host or ["localhost", "127.0.0.1"])
    print(f"{directory}: for trials only, until this time tomorrow; then: source {directory / 'trial.env'}")


app.command(rich_help_panel=_SERVER)(server_cli.decide)
app.command(rich_help_panel=_SERVER)(server_cli.status)
for steer in (steering_cli.state, steering_cli.breaker, steering_cli.flag, steering_cli.chain, steering_cli.changes):
    app.command(epilog=steering_cli.EXIT_CODES, rich_help_panel=_SERVER)(steer)
for group in (steering_cli.replica_app, steering_cli.config_app, drift_cli.app):
    app.add_typer(group, rich_help_panel=_SERVER)


@app.command(rich_help_panel=_MARKET)
def features(
    instrument: Annotated[str, typer.Argument(help="SYMBOL.VENUE, for example BTCUSDT.BINANCE.")],
    redis: Annotated[
        str | None, typer.Option(help="URL of the Redis that the worker writes to, instead of the stack's.")
    ] = None,
    directory: stack_file.Directory = stack_file.DEFAULT_DIRECTORY,
    once: Annotated[bool, typer.Option("--once", help="Show what there is now, and end.")] = False,
    as_json: server_cli.AsJson = False,
) -> None:
    """Watch one instrument's features as they change, with the state of its book and its worker's lag."""
    from feature_cache import logs  # noqa: PLC0415 - as above
    from feature_cache.store.cluster import check_url  # noqa: PLC0415 - as above
    from feature_cache.store.watch import watch  # noqa: PLC0415 - as above

    logs.configure("error", "features")  # what is printed is the features
    try:
        url = redis or stack_file.stack_endpoint(directory, "redis_url", "--redis URL")
        check_url(url)
    except stack_file.NoStackError as error:
        typer.echo(error, err=True)
        raise typer.Exit(3) from None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--redis") from error
    console = Console()
    once = once or not (as_json or console.is_terminal)
    try:
        raise typer.Exit(asyncio.run(watch(url, instrument, once=once, as_json=as_json, console=console)))
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


app.command(rich_help_panel=_MARKET)(ingest_cli.ingest)
app.command(rich_help_panel=_MARKET)(feature_cli.replay)
app.command("simulate", rich_help_panel=_MARKET)(feature_cli.simulate_market)
app.command(rich_help_panel=_MODELS)(training_cli.train)
for group in (canary_cli.models_app, canary_cli.canary_app, training_cli.dataset_app):
    app.add_typer(group, rich_help_panel=_MODELS)


@app.command("canary-demo", rich_help_panel=_MODELS)
def canary_demo(
    rate: Annotated[float, typer.Option(min=10, help="Orders a second.")] = 200.0,
    only: Annotated[list[str] | None, typer.Option(help="good, late or inverted; can be repeated. [all]")] = None,
    data: Recording = None,
    directory: Directory = None,
    json: Annotated[Path | None, typer.Option(help="File for the results and the affected decisions.")] = None,
) -> None:
    """Run the whole stack and three canaries, each to its end: a good one, one that is late, one that is inverted."""
    from local.demo.canaries import run_canaries  # noqa: PLC0415 - as above

    raise typer.Exit(run_canaries(_given(dir=directory, data=data), rate, only or [], json))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, rich_help_panel=_MEASURE)
def soak(context: typer.Context, directory: Directory = None, data: Recording = None) -> None:
    """Run the whole stack under load for half an hour; do memory, descriptors, tasks and latency stay flat?

    Options of its own: --minutes 30, --rate 300 (orders a second), --json FILE and those of
    `python -m loadtest.studies.soak`. PRETRADE_GRPC__EDGE=envoy has the server behind Envoy.
    """
    from local.bench.soak import run_soak  # noqa: PLC0415 - as above

    raise typer.Exit(run_soak(_given(dir=directory, data=data), context.args))


@app.command(rich_help_panel=_MEASURE)
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
    from loadtest.benchmark.bench import INSTRUMENTS, run_target  # noqa: PLC0415 - as above
    from loadtest.benchmark.load import plan  # noqa: PLC0415 - as above
    from local.bench.bench import Outputs, run_audit_bench, run_bench  # noqa: PLC0415 - as above

    given = _given(dir=directory, data=data)
    if audit:
        options = _given(seconds=seconds, rounds=rounds, json=json)
        values = [f"--{name}={value}" for name, value in options.items()]
        raise typer.Exit(run_audit_bench(given, [*values, f"--deadline-ms={deadline_ms:g}"]))
    wanted = plan(quick=quick, rounds=rounds, seconds=seconds, deadline_seconds=deadline_ms / 1e3)
    if target is not None:
        raise typer.Exit(run_target(target, instrument or INSTRUMENTS, wanted, json, Console()))
    raise typer.Exit(run_bench(given, wanted, Outputs(json, keep, profile)))


@app.command("bench-compare", rich_help_panel=_MEASURE)
def bench_compare(
    now: Annotated[Path | None, typer.Argument(help="Figures of a run. [the last one]")] = None,
    then: Annotated[Path | None, typer.Argument(help="Those to hold it against. [the last kept before it]")] = None,
    directory: Directory = None,
) -> None:
    """Show what changed between two runs of `pretrade bench`, and what the machine did meanwhile."""
    from loadtest.benchmark.compare import run_compare  # noqa: PLC0415 - as above
    from local.bench.bench import LAST_RUN  # noqa: PLC0415 - as above

    raise typer.Exit(run_compare(now or (directory or Path(".pretrade")) / LAST_RUN, then, Console()))


@app.command("bench-costs", rich_help_panel=_MEASURE)
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
    from local.bench.costs import run_cost_bench  # noqa: PLC0415 - as above

    raise typer.Exit(run_cost_bench(_given(dir=directory, data=data), edge, callers, seconds, rounds, json))


@app.command("bench-flips", rich_help_panel=_MEASURE)
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
    from local.bench.flips import run_flip_bench  # noqa: PLC0415 - as above

    raise typer.Exit(run_flip_bench(_given(dir=directory, data=data), flips, callers, json))


@app.command("bench-observability", rich_help_panel=_MEASURE)
def bench_observability(
    directory: Directory = None,
    edge: Annotated[str, typer.Option(help="`grpcio` or `envoy`.")] = "grpcio",
    seconds: Annotated[float, typer.Option(min=0.5, help="Load of one round, on each of the two servers.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of rounds of each number of callers.")] = 5,
    json: Annotated[Path | None, typer.Option(help="File for all figures.")] = None,
) -> None:
    """Measure what metrics, traces of 1 % and logs cost, against a server that has none of them."""
    from local.bench.observability import run_observability_bench  # noqa: PLC0415 - as above

    raise typer.Exit(run_observability_bench(_given(dir=directory), edge, seconds, rounds, json))


@app.command("bench-features", rich_help_panel=_MEASURE)
def bench_features(
    data: Recording = None,
    directory: Directory = None,
    seconds: Annotated[float, typer.Option(min=5, help="Length of the freshness run.")] = 12.0,
    rate: Annotated[float, typer.Option(min=100, help="Its events a second.")] = 10_000.0,
    json: Annotated[Path | None, typer.Option(help="File for all figures.")] = None,
) -> None:
    """Measure the feature worker: its steps next to pandas, events a second from Kafka to Redis, and freshness."""
    from local.bench.features import run_feature_bench  # noqa: PLC0415 - as above

    raise typer.Exit(run_feature_bench(_given(dir=directory, data=data), seconds, rate, json))


@app.command("bench-serving", rich_help_panel=_MEASURE)
def bench_serving(
    store: Annotated[
        Path | None, typer.Option(help="Directory of champion.mar and challenger.mar. [that of `make models`]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that each setting takes next to ours.")] = 3,
    json: Annotated[Path | None, typer.Option(help="File for all figures.")] = None,
) -> None:
    """Measure model serving: runtimes in process, TorchServe calls by rows, and what each of its settings does."""
    from local.bench.serving import run_serving_bench  # noqa: PLC0415 - as above
    from torchserve.config import store_directory  # noqa: PLC0415 - as above

    raise typer.Exit(run_serving_bench(store or store_directory(Path(".pretrade"), None), rounds, json))


def main() -> None:
    """Entry point of the command."""
    app()


def _given(**options: object) -> dict[str, object]:
    """The settings that were given; the environment and the defaults decide the rest."""
    return {name: value for name, value in options.items() if value is not None}
