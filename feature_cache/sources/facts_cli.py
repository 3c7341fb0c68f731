"""The command `market-facts`: the simulated market beside a recorded one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from feature_cache.sources.simulated.scenarios import ScenarioName

app = typer.Typer(add_completion=False)


@app.command("market-facts")
def market_facts(
    data: Annotated[
        Path | None,
        typer.Option(help="Recorded session, or a folder of them, to compute the same statistics of."),
    ] = None,
    instrument: Annotated[str, typer.Option(help="Which of the recorded instruments.")] = "BTCUSDT.BINANCE",
    seeds: Annotated[int, typer.Option(min=1, help="Simulated sessions, whose median counts.")] = 5,
    seconds: Annotated[float, typer.Option(min=60, help="Length of each.")] = 650.0,
    scenario: Annotated[ScenarioName, typer.Option(help="What kind of market.")] = ScenarioName.NORMAL,
    svg: Annotated[Path | None, typer.Option(help="Write both markets' pictures to this file; needs --data.")] = None,
) -> None:
    """Hold the simulated market against a recorded one: fifteen statistics, each met or missed.

    The recorded figures are those of BTCUSDT on Binance, 650 s in August 2024. A statistic is met when the median of
    the simulated sessions is within its tolerance.
    """
    from rich.console import Console  # noqa: PLC0415 - numpy and the decoders, which other commands do not need

    from feature_cache.sources import facts_report  # noqa: PLC0415 - as above
    from feature_cache.sources.facts_picture import picture  # noqa: PLC0415 - as above
    from feature_cache.sources.market_facts import RECORDED, facts  # noqa: PLC0415 - as above
    from feature_cache.sources.session import SessionError  # noqa: PLC0415 - as above

    if svg is not None and data is None:
        raise typer.BadParameter("a picture shows both markets: give --data", param_hint="--svg")
    try:
        recorded = None if data is None else facts_report.recorded_tape(data, instrument)
    except (SessionError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error
    sessions = []
    for seed in range(1, seeds + 1):
        print(f"simulating session {seed} of {seeds}", file=sys.stderr)
        sessions.append(facts_report.simulated_tape(seed, seconds, scenario))
    here, found = None if recorded is None else facts(recorded), [facts(session) for session in sessions]
    console = Console(highlight=False)
    console.print(f"recorded: {RECORDED}")
    console.print(facts_report.table(found, here))
    console.print(facts_report.verdict(found))
    if svg is not None and recorded is not None:
        svg.write_text(picture(recorded, sessions))


if __name__ == "__main__":
    app()
