"""`python -m torchserve`: trains and exports the champion and the challenger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from feature_cache.sources.session import SessionError
from pretrade.client.figures import figure
from torchserve.build import build_models
from torchserve.config import store_directory
from torchserve.dataset import SamplesError


def main(
    data: Annotated[
        Path | None, typer.Option(help="A recorded session: a .gz file or a folder of them. Default: simulated.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The model store. Default: the one that `pretrade up` looks in.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of simulation and training.")] = 1,
) -> None:
    """Trains and exports the champion and the challenger; does nothing when the store is up to date."""
    console = Console()
    try:
        with console.status("starting") as status:

            def report(doing: str) -> None:
                status.update(doing)
                if not console.is_terminal:
                    console.print(doing)

            models = build_models(data, out or store_directory(Path(".pretrade"), data), seed=seed, report=report)
    except (SessionError, SamplesError) as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from error
    first = next(iter(models.values()))
    console.print(f"{first['data']['source']}\neligible: {first['label']}", highlight=False)
    console.print(_table(models))
    for name, model in models.items():
        reached = "reached" if model["target_precision_reached"] else "out of reach"
        console.print(
            f"{name} {model['version']}: threshold {model['threshold']:.4f}, target precision"
            f" {model['target_precision']:.2f} {reached} on the calibration part",
            highlight=False,
        )


def _table(models: dict[str, Any]) -> Table:
    """A column for each model and part of the samples."""
    columns = [(name, part, metrics) for name, model in models.items() for part, metrics in model["metrics"].items()]
    table = Table(box=box.SIMPLE)
    table.add_column("at the threshold: precision, coverage", max_width=20)
    for name, part, _ in columns:
        table.add_column(f"{name}\n{part}", justify="right", no_wrap=True)
    rows: dict[str, Callable[[Any], str]] = {
        "samples": lambda part: f"{part['samples']:,}",
        "base rate": lambda part: f"{part['base_rate']:.3f}",
        "AUC": lambda part: figure(part["auc"], ".3f"),
        "Brier": lambda part: f"{part['brier']:.4f}",
        "Brier of base rate": lambda part: f"{part['brier_base_rate']:.4f}",
        "precision": lambda part: "none" if part["precision"] is None else f"{part['precision']:.3f}",
        "coverage": lambda part: f"{part['coverage']:.3f}",
    }
    for heading, cell in rows.items():
        table.add_row(heading, *(cell(metrics) for _, _, metrics in columns))
    return table


if __name__ == "__main__":
    typer.run(main)
