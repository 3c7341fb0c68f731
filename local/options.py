"""Options that the commands of the embedded stack share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from feature_cache.sources.simulated.scenarios import ScenarioName

Directory = Annotated[
    Path | None, typer.Option("--dir", help="Folder of databases, models, journal and logs. [.pretrade]")
]
Recording = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of recordings to replay, as for `pretrade replay`; without it, the simulator."),
]
Scenario = Annotated[
    ScenarioName | None, typer.Option(help="What kind of market the simulator makes, without --data. [normal]")
]
Speed = Annotated[str | None, typer.Option(help="Speed of the market data: a factor, or max. [1]")]


def given(**options: object) -> dict[str, object]:
    """The settings that were given; the environment and the defaults decide the rest."""
    return {name: value for name, value in options.items() if value is not None}
