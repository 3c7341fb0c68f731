"""`python -m local.training`: makes the models that a stack starts with, and their cards, unless they are there."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.markup import escape

from feature_cache.sources.session import SessionError
from local.training.installed import is_installed
from torchserve.build import installed_choice
from torchserve.dataset import SamplesError
from torchserve.sources import SIMULATED_SECONDS

_SEED: Final = 1
_BLOCKS: Final = 5


def main(
    store: Annotated[Path, typer.Option(help="The model store.")],
    data: Annotated[
        Path | None, typer.Option(help="A recorded session: a .gz file or a folder of them. Default: simulated.")
    ] = None,
) -> None:
    """Trains, evaluates and installs the champion and the challenger; does nothing when they are there."""
    console = Console()
    try:
        if is_installed(data, store):
            console.print(f"{store} is up to date")
            return
        from local.training.training import Plan, carry_out  # noqa: PLC0415 - the machine-learning libraries

        chosen = installed_choice(store)
        plan = Plan(
            kinds=("monotone", "torch"),
            data=() if data is None else (data,),
            store=store,
            name="champion",
            seed=_SEED,
            simulated_seconds=SIMULATED_SECONDS,
            label=chosen.label,
            valid_days=chosen.valid_days,
            blocks=_BLOCKS,
            trials=0,
            install=True,
            force=True,  # a stack that has no better model starts with this one, and says how it stands
            feature_set=None,
            labels=False,  # a newcomer waits for this
            cards=None,
            command=shlex.join(
                ["pretrade", "train", "--install", "--force", *([] if data is None else ["--data", str(data)])]
            ),
        )
        carry_out(plan, lambda doing: console.print(escape(doing), highlight=False))
    except (SessionError, SamplesError) as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
