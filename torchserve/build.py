"""From market data to a model store: replay, train, export. Does nothing if the store already holds the same models."""

from __future__ import annotations

import json
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

import feature_cache
from feature_cache.sources.session import session_files
from torchserve.dataset import Samples
from torchserve.label import Label
from torchserve.sources import SIMULATED_SECONDS, Report, load_samples, sha256_of
from torchserve.validity import VALID_DAYS

NAMES: Final = ("champion", "challenger")

_INPUTS_FILE: Final = "inputs.json"
_LIBRARIES: Final = ("numpy", "scikit-learn", "torch", "xgboost-cpu")


class Chosen(BaseModel):
    """What an operator may choose of the models that a stack starts with."""

    model_config = ConfigDict(frozen=True)

    label: Label = Label()
    """What they learn."""
    valid_days: float | None = VALID_DAYS
    """How long they may decide after the newest market in their data, in days; None: for ever."""


def build_models(
    data: Path | None,
    out: Path,
    *,
    seed: int = 1,
    simulated_seconds: float = SIMULATED_SECONDS,
    chosen: Chosen | None = None,
    samples: Samples | None = None,
    report: Report = lambda _: None,
) -> dict[str, Any]:
    """Trains both models and writes `NAME.mar` and `NAME.json` of each into a store.

    A store that was made from the same data, seed, code and libraries is left as it is; finding that out takes
    milliseconds, while a build takes seconds, needs about 500 MiB, and imports Torch and XGBoost into the process.

    Args:
        data: A recorded session, a file or a folder of them. None for a simulated session.
        out: The store; created if missing.
        seed: Of the simulation and of all that is random in training.
        simulated_seconds: Length of the simulated session.
        chosen: What they learn, and when they expire; None for the defaults.
        samples: What `load_samples` gives for these arguments, where they are at hand already.
        report: Called with what is being done.

    Returns:
        Model name → its metadata with the version, as in `NAME.json`.

    Raises:
        feature_cache.sources.session.SessionError: The recording cannot be read.
        torchserve.dataset.SamplesError: It is too short or too uniform to learn from.
    """
    files = None if data is None else session_files([data])
    chosen = chosen or Chosen()
    inputs = _inputs(files, seed, simulated_seconds, chosen)
    if _holds(out, inputs):
        report(f"{out} is up to date")
        return descriptions(out)

    # A store that is up to date must not cost the import of two machine-learning libraries.
    from torchserve.export import metadata_of, write_archive  # noqa: PLC0415
    from torchserve.training import TrainingSettings, train  # noqa: PLC0415

    if samples is None:
        samples = load_samples(
            files or [], seed=seed, simulated_seconds=simulated_seconds, label=chosen.label, report=report
        )
    settings = TrainingSettings(seed=seed, label=chosen.label, valid_days=chosen.valid_days)
    out.mkdir(parents=True, exist_ok=True)
    # Until the last file is written, the store is nobody's.
    (out / _INPUTS_FILE).unlink(missing_ok=True)
    for name in NAMES:
        report(f"training the {name} on {len(samples.rows):,} samples")
        model = train(name, samples, settings)
        write_archive(model, metadata_of(model, samples, settings), out)
    (out / _INPUTS_FILE).write_text(json.dumps(inputs, indent=2) + "\n")
    return descriptions(out)


def installed_choice(store: Path) -> Chosen:
    """What was chosen of the models of a store; the defaults where there are none."""
    try:
        return Chosen.model_validate_json((store / _INPUTS_FILE).read_bytes())
    except (OSError, ValueError):
        return Chosen()


def is_built(data: Path | None, out: Path, *, seed: int = 1, simulated_seconds: float = SIMULATED_SECONDS) -> bool:
    """Whether `build_models` would leave the store as it is, for what was chosen of its models.

    Raises:
        feature_cache.sources.session.SessionError: There is no recording.
    """
    files = None if data is None else session_files([data])
    return _holds(out, _inputs(files, seed, simulated_seconds, installed_choice(out)))


def descriptions(store: Path) -> dict[str, Any]:
    """Model name → its metadata with the version, of the models that a store was built with."""
    return {name: json.loads((store / f"{name}.json").read_text()) for name in NAMES}


def _inputs(files: list[Path] | None, seed: int, simulated_seconds: float, chosen: Chosen) -> dict[str, Any]:
    """All that decides what a build makes."""
    packages = (Path(feature_cache.__file__).parent, Path(__file__).parent)
    code = [path for package in packages for path in sorted(package.rglob("*.py"))]
    return {
        "data": {path.name: sha256_of([path]) for path in files} if files else f"simulated {simulated_seconds:.0f} s",
        "seed": seed,
        **chosen.model_dump(),
        "code": sha256_of(code),
        "libraries": {name: installed_version(name) for name in _LIBRARIES},
    }


def _holds(store: Path, inputs: dict[str, Any]) -> bool:
    try:
        made_from = json.loads((store / _INPUTS_FILE).read_text())
    except (OSError, ValueError):
        return False
    return made_from == inputs and all(
        (store / f"{name}{suffix}").is_file() for name in NAMES for suffix in (".mar", ".json")
    )
