"""Commands that show the whole stack at work: `demo`, `canary-demo`. Each loads what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from local.options import Directory, Recording, Scenario, Speed, given

app = typer.Typer()


@app.command()
def demo(
    duration: Annotated[float, typer.Option(min=1, help="How long orders are sent, in seconds.")] = 20.0,
    rate: Annotated[float, typer.Option(min=1, help="Orders a second.")] = 150.0,
    directory: Directory = None,
    data: Recording = None,
    speed: Speed = None,
    scenario: Scenario = None,
    json: Annotated[Path | None, typer.Option(help="Write the summary to this file, as JSON.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write a picture of the last screen to this file, as SVG.")] = None,
) -> None:
    """Run the whole stack on this machine, send orders, kill a replica halfway, and print a summary."""
    from local.demo.demo import run_demo  # noqa: PLC0415

    chosen = given(dir=directory, data=data, speed=speed, scenario=scenario)
    raise typer.Exit(run_demo(chosen, duration, rate, json, svg))


@app.command("canary-demo")
def canary_demo(
    rate: Annotated[float, typer.Option(min=10, help="Orders a second.")] = 200.0,
    only: Annotated[list[str] | None, typer.Option(help="good, late or inverted; can be repeated. [all]")] = None,
    data: Recording = None,
    directory: Directory = None,
    json: Annotated[Path | None, typer.Option(help="File for the results and the affected decisions.")] = None,
) -> None:
    """Run the whole stack and three canaries: a good one is promoted, a late and an inverted one are rolled back."""
    from local.demo.canaries import run_canaries  # noqa: PLC0415

    raise typer.Exit(run_canaries(given(dir=directory, data=data), rate, only or [], json))
