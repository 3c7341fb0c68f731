"""Commands of the embedded stack: `up`, `kill`, `trial-credentials`. Each loads what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from local.options import Directory, Recording, Scenario, Speed, given

app = typer.Typer()


@app.command()
def up(
    directory: Directory = None,
    data: Recording = None,
    speed: Speed = None,
    scenario: Scenario = None,
    no_market: Annotated[bool, typer.Option("--no-market", help="Feed no market data.")] = False,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="Start this part alone; can be repeated. Of valkey, broker, postgres, primary, secondary, challenger, "
            "worker, bars, market, server, console, prometheus, alertmanager."
        ),
    ] = None,
    bars: Annotated[
        bool, typer.Option("--bars", help="Keep bars of each instrument in the database; see `pretrade bars`.")
    ] = False,
    alerts: Annotated[
        bool,
        typer.Option(
            "--alerts", help="Run Prometheus and Alertmanager, where they are installed; see `pretrade alerts`."
        ),
    ] = False,
    console: Annotated[
        bool, typer.Option(envvar="PRETRADE_LOCAL_CONSOLE", help="Serve the console, the pages for a browser.")
    ] = True,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Decision server processes; `kill -HUP` of the server replaces them.")
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(min=1, max=8, help="TorchServes that serve the primary: a pool, primary-1, primary-2 and so on."),
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
    from local.stack.up import run_up  # noqa: PLC0415

    market = False if no_market else None
    keeping = True if bars or "bars" in (part or ()) else None
    alerting = True if alerts or {"prometheus", "alertmanager", "rules"} & set(part or ()) else None
    chosen = given(
        dir=directory,
        data=data,
        speed=speed,
        scenario=scenario,
        market=market,
        bars=keeping,
        alerts=alerting,
        processes=processes,
        replicas=replicas,
    )
    raise typer.Exit(run_up(chosen | {"replica_tokens": replica_tokens, "console": console}, part or ()))


@app.command()
def kill(
    part: Annotated[str, typer.Argument(help="The part, as `pretrade up --help` lists them.")],
    after: Annotated[float, typer.Option(min=0, help="Seconds until then.")] = 0.0,
    directory: Directory = None,
) -> None:
    """Kill a part of the stack that runs on this machine, as a fault would; `pretrade up` starts it again."""
    from local.stack.killing import kill_part  # noqa: PLC0415

    raise typer.Exit(kill_part(given(dir=directory), part, after))


@app.command("trial-credentials")
def trial_credentials(
    directory: Annotated[Path, typer.Argument(help="Where they are written.")],
    host: Annotated[list[str] | None, typer.Option(help="Name or address of the server; can be repeated.")] = None,
) -> None:
    """Make certificates and tokens for TRIALS on this machine, valid for a day. Never use them in production.

    `source DIRECTORY/trial.env` makes a server require them, and this command send them.
    """
    from server.security import trial  # noqa: PLC0415 - cryptography, which the other commands do not need

    trial.write(directory.resolve(), host or ["localhost", "127.0.0.1"])
    print(f"{directory}: for trials only, until this time tomorrow; then: source {directory / 'trial.env'}")
