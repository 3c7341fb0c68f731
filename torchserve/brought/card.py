"""The card of a brought model: what is known of it, and what nobody here can know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from torchserve.brought.adding import Added
from torchserve.validity import expiry_text

FILE: Final = "card.md"
STANDING: Final = "brought, not trained here: not held against the baselines"
_COLUMNS: Final = ("samples", "independent", "base_rate", "auc", "brier", "precision", "precision_low", "coverage")


def write_card(version: str, added: Added, source: str, command: str, directory: Path) -> Path:
    """Writes the card into a folder of its own.

    Args:
        version: Of the archive.
        added: The model.
        source: What it was made of, for people.
        command: What made it.
        directory: The folder, made when missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE
    path.write_text("\n".join(_lines(version, added, source, command)) + "\n")
    return path


def _lines(version: str, added: Added, source: str, command: str) -> Iterable[str]:
    about = added.metadata
    yield f"# Model card: {added.name} `{version}`"
    yield ""
    yield (
        f"**This model was brought, not trained here.** Kind `{about['kind']}`, scored by `{about['runtime']}`; feature"
        f" set `{about['feature_set']}`. It was made of {source}. What it was trained on, and how well it did there,"
        " nobody here knows. It was not held against the rules and the other baselines."
    )
    yield ""
    yield (
        f"A score is the probability of {about['label']['text']}, as far as the dataset's label is that. TRADE at"
        f" {about['threshold']:.4f} or more. It {expiry_text(about['expires_at'])}."
    )
    yield ""
    yield from _parts(about.get("ensemble"))
    yield from _measured(added)
    if added.lacks:
        yield "## What does not work with it"
        yield ""
        yield from (f"- {one}" for one in added.lacks)
        yield ""
    if added.notes:
        yield "## Decided when it was added"
        yield ""
        yield from (f"- {one}" for one in added.notes)
        yield ""
    yield "## Made by"
    yield ""
    yield f"`{command}`"


def _parts(ensemble: Mapping[str, Any] | None) -> Iterable[str]:
    if ensemble is None:
        return
    yield f"## Parts ({ensemble['how']})"
    yield ""
    yield from (f"- `{one['version']}` ({one['kind']}), weight {one['weight']:.4g}" for one in ensemble["parts"])
    yield ""


def _measured(added: Added) -> Iterable[str]:
    if not added.metrics:
        return
    yield "## Measured on the dataset"
    yield ""
    yield (
        "The dataset's first part calibrated the model, the second chose its threshold, the third measured it. The"
        " figures are worth nothing if any of it trained the model. `independent` is how many observations the"
        " samples are worth."
    )
    yield ""
    yield "| part | " + " | ".join(_COLUMNS) + " |"
    yield "|---|" + "---|" * len(_COLUMNS)
    for part, metrics in added.metrics.items():
        values = (getattr(metrics, name) for name in _COLUMNS)
        shown = ("–" if one is None else f"{one:,}" if isinstance(one, int) else f"{one:,.3f}" for one in values)
        yield f"| {part} | " + " | ".join(shown) + " |"
    yield ""
