"""`python -m torchserve.mlserver ARCHIVE DIRECTORY`: a champion as a plain XGBoost model, for other model servers.

Writes the folder that MLServer serves (`mlserver start DIRECTORY`)::

    model.json            the trees, as XGBoost's own JSON; Triton's FIL backend and KServe read it too
    model-settings.json   what MLServer needs to know
    NAME.json             the description that the decision server needs, see `PRETRADE_OIP__CHAMPION`

Further versions go into folders of their own beside it, for example `DIRECTORY/VERSION`: MLServer finds them when the
model is loaded again, and serves all of them.

The calibration is folded into the trees: every leaf is multiplied by the slope, and the intercept is added to the base
score. Such a server therefore predicts the score itself, except for float32 rounding (less than 1e-6).
"""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Self

import typer
import xgboost

from torchserve import handler

_LEAF: Final = -1
"""Child of a node that has none."""


@dataclass(frozen=True, slots=True)
class Archived:
    """What an archive holds of a model."""

    name: str
    version: str
    metadata: dict[str, Any]
    weights: bytes

    @classmethod
    def read(cls, archive: Path) -> Self:
        """Reads one. Raises OSError and zipfile.BadZipFile."""
        with zipfile.ZipFile(archive) as archived:
            manifest = json.loads(archived.read("MAR-INF/MANIFEST.json"))["model"]
            metadata = json.loads(archived.read(handler.METADATA_FILE))
            weights = archived.read(handler.WEIGHTS_FILE)
        return cls(str(manifest["modelName"]), str(manifest["modelVersion"]), metadata, weights)

    @property
    def described(self) -> str:
        """The description that the decision server needs, see `PRETRADE_OIP__CHAMPION`."""
        return json.dumps({"version": self.version, **self.metadata}, indent=2) + "\n"


def write_folder(archive: Path, directory: Path, name: str = "") -> str:
    """Writes an archive's model as an MLServer folder.

    Args:
        archive: The archive.
        directory: The folder.
        name: What the server is to call the model; empty for the archive's name.

    Returns:
        The model's name.

    Raises:
        OSError, zipfile.BadZipFile: The archive cannot be read.
        ValueError: Its model is not made of trees, or its calibration cannot be folded into them.
    """
    archived = Archived.read(archive)
    if handler.runtime_of(archived.metadata) != "xgboost":
        raise ValueError(
            f"{archived.name} is a model of the kind {archived.metadata['kind']}: MLServer gets only boosted trees of"
            " XGBoost, for it has no runtime for ONNX. Serve it by TorchServe, or by Triton (torchserve.triton)"
        )
    name = name or archived.name
    trees = plain_trees(archived)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.json").write_text(json.dumps(trees))
    settings = {
        "name": name,
        "implementation": "mlserver_xgboost.XGBoostModel",
        "parameters": {"uri": "./model.json", "version": archived.version},
    }
    (directory / "model-settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / f"{name}.json").write_text(archived.described)
    return name


def plain_trees(archived: Archived) -> dict[str, Any]:
    """Boosted trees in XGBoost's JSON, calibrated.

    Raises:
        ValueError: Their calibration cannot be folded into them.
    """
    calibration = archived.metadata["calibration"]
    if set(calibration) != {"slope", "intercept"}:
        raise ValueError(
            f"{archived.name} is not calibrated by a slope and an intercept: trees cannot hold its calibration"
        )
    return calibrated_trees(archived.weights, **calibration)


def calibrated_trees(weights: bytes, slope: float, intercept: float) -> dict[str, Any]:
    """A logistic booster, saved as UBJSON, as XGBoost's JSON with Platt's calibration in it."""
    booster = xgboost.Booster({"nthread": 1}, model_file=bytearray(weights))
    document: dict[str, Any] = json.loads(booster.save_raw(raw_format="json"))
    learner = document["learner"]
    # `binary:logistic` and `reg:logistic` compute the same; the second is what servers take for a model whose
    # prediction is the probability and not a class.
    learner["objective"]["name"] = "reg:logistic"
    parameters = learner["learner_model_param"]
    base = float(parameters["base_score"].strip("[]"))
    margin = slope * math.log(base / (1 - base)) + intercept
    parameters["base_score"] = f"[{1 / (1 + math.exp(-margin)):.9E}]"
    for tree in learner["gradient_booster"]["model"]["trees"]:
        for node, child in enumerate(tree["left_children"]):
            tree["base_weights"][node] *= slope
            if child == _LEAF:
                tree["split_conditions"][node] *= slope
    return document


def main(
    archive: Annotated[Path, typer.Argument(exists=True, help="The `.mar` of a champion.")],
    directory: Annotated[Path, typer.Argument(help="The folder; made when missing.")],
    name: Annotated[
        str, typer.Option(help="What the server calls the model, where that is not the archive's name.")
    ] = "",
) -> None:
    """Writes a champion as a plain XGBoost model, for MLServer, Triton or KServe."""
    try:
        served = write_folder(archive, directory, name)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        typer.echo(f"{archive}: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"mlserver start {directory}   # serves {served}")


if __name__ == "__main__":
    typer.run(main)
