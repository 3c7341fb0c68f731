"""`python -m torchserve.triton ARCHIVE REPOSITORY`: a champion for Triton, whose FIL backend runs boosted trees.

Writes into Triton's model repository::

    NAME/NUMBER/xgboost.json   the trees with their calibration, as for MLServer (`mlserver.py`)
    NAME/config.pbtxt          `version_policy` all: every version that is there
    NAME.config.json           the same without the policy, for `PRETRADE_OIP__TRITON_CONFIGS`
    NAME.json                  the description that the decision server needs, see `PRETRADE_OIP__CHAMPION`

Triton's versions are numbers: this one is the first 15 hex digits of ours. What this writes was never given to Triton
itself: the tests have a server that is scripted by Triton's documentation.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from torchserve.mlserver import plain_trees

_NUMBER_DIGITS: Final = 15
_LARGEST_BATCH: Final = 8_192
_FILE: Final = "xgboost.json"
_PARAMETERS: Final = {"model_type": "xgboost_json", "output_class": "false", "is_classifier": "false"}
"""Of the FIL backend: the third is what its newer versions call the second."""
_PBTXT: Final = """backend: "fil"
default_model_filename: "{file}"
max_batch_size: {max_batch_size}
input [{{ name: "input__0" data_type: TYPE_FP32 dims: [ {features} ] }}]
output [{{ name: "output__0" data_type: TYPE_FP32 dims: [ 1 ] }}]
instance_group [{{ kind: KIND_CPU }}]
version_policy: {{ all {{}} }}
"""


def write_version(archive: Path, repository: Path, name: str = "") -> str:
    """Writes an archive's model as a version of a model in Triton's repository.

    Args:
        archive: The archive.
        repository: The repository.
        name: What Triton is to call the model; empty for the archive's name.

    Returns:
        `NAME/NUMBER`.

    Raises:
        OSError, zipfile.BadZipFile: The archive cannot be read.
        ValueError: Its model is not made of trees, or its calibration cannot be folded into them.
    """
    archived, version, trees, metadata = plain_trees(archive)
    name = name or archived
    number = str(int(version[:_NUMBER_DIGITS], 16))
    folder, features = repository / name / number, len(metadata["feature_names"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILE).write_text(json.dumps(trees))
    (repository / name / "config.pbtxt").write_text(_pbtxt(features))
    (repository / f"{name}.config.json").write_text(json.dumps(_config(features), indent=2) + "\n")
    (repository / f"{name}.json").write_text(json.dumps({"version": version, **metadata}, indent=2) + "\n")
    return f"{name}/{number}"


def _pbtxt(features: int) -> str:
    """The configuration as it lies beside the versions, in Protobuf's text format."""
    parameters = (
        f'parameters {{ key: "{key}" value: {{ string_value: "{text}" }} }}' for key, text in _PARAMETERS.items()
    )
    return _PBTXT.format(file=_FILE, max_batch_size=_LARGEST_BATCH, features=features) + "\n".join(parameters) + "\n"


def _config(features: int) -> dict[str, Any]:
    """The configuration as a load request carries it."""
    return {
        "backend": "fil",
        "default_model_filename": _FILE,
        "max_batch_size": _LARGEST_BATCH,
        "input": [{"name": "input__0", "data_type": "TYPE_FP32", "dims": [features]}],
        "output": [{"name": "output__0", "data_type": "TYPE_FP32", "dims": [1]}],
        "parameters": {key: {"string_value": text} for key, text in _PARAMETERS.items()},
        "instance_group": [{"kind": "KIND_CPU"}],
    }


def main(
    archive: Annotated[Path, typer.Argument(exists=True, help="The `.mar` of a champion.")],
    repository: Annotated[Path, typer.Argument(help="Triton's model repository; made when missing.")],
    name: Annotated[
        str, typer.Option(help="What the server calls the model, where that is not the archive's name.")
    ] = "",
) -> None:
    """Writes a champion as a version of a model in Triton's repository."""
    try:
        written = write_version(archive, repository, name)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        typer.echo(f"{archive}: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{repository / written}")


if __name__ == "__main__":
    typer.run(main)
