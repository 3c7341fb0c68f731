"""`python -m torchserve.triton ARCHIVE REPOSITORY`: a model for Triton, which runs boosted trees by FIL, and ONNX.

Writes into Triton's model repository::

    NAME/NUMBER/xgboost.json   the trees of XGBoost with their calibration, as for MLServer (`mlserver.py`); or
    NAME/NUMBER/model.onnx     any other model that there is in ONNX, with its calibration (`portable.py`)
    NAME/config.pbtxt          `version_policy` all: every version that is there
    NAME.config.json           the same without the policy, for `PRETRADE_OIP__TRITON_CONFIGS`
    NAME.json                  the description that the decision server needs, see `PRETRADE_OIP__CHAMPION`

Triton's versions are numbers: this one is the first 15 hex digits of ours. All versions of a model share its
configuration, and so its backend and its number of features.

What this writes was never given to Triton itself: the tests have a server that is scripted by Triton's documentation.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from torchserve import portable
from torchserve.handler import runtime_of
from torchserve.mlserver import Archived, plain_trees

_NUMBER_DIGITS: Final = 15
_LARGEST_BATCH: Final = 8_192
_PBTXT: Final = """backend: "{backend}"
default_model_filename: "{file}"
max_batch_size: {max_batch_size}
input [{{ name: "{input}" data_type: TYPE_FP32 dims: [ {features} ] }}]
output [{{ name: "{output}" data_type: TYPE_FP32 dims: [ 1 ] }}]
instance_group [{{ kind: KIND_CPU }}]
version_policy: {{ all {{}} }}
"""


@dataclass(frozen=True, slots=True)
class _Backend:
    """What runs a model in Triton."""

    name: str
    file: str
    parameters: dict[str, str]


_TREES: Final = _Backend(
    "fil", "xgboost.json", {"model_type": "xgboost_json", "output_class": "false", "is_classifier": "false"}
)
"""The last parameter is what newer versions of the FIL backend call the one before."""
_ONNX: Final = _Backend("onnxruntime", "model.onnx", {"intra_op_thread_count": "1", "inter_op_thread_count": "1"})


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
        ValueError: Triton cannot be given this model, or not under this name.
    """
    archived = Archived.read(archive)
    name = name or archived.name
    number = str(int(archived.version[:_NUMBER_DIGITS], 16))
    if runtime_of(archived.metadata) == "xgboost":
        backend, content = _TREES, json.dumps(plain_trees(archived)).encode()
    else:
        backend, content = _ONNX, _in_onnx(archived)
    features = len(archived.metadata["feature_names"])
    _check_shared(repository, name, number, config := _config(backend, features))
    folder = repository / name / number
    folder.mkdir(parents=True, exist_ok=True)
    (folder / backend.file).write_bytes(content)
    (repository / name / "config.pbtxt").write_text(_pbtxt(backend, features))
    (repository / f"{name}.config.json").write_text(json.dumps(config, indent=2) + "\n")
    (repository / f"{name}.json").write_text(archived.described)
    return f"{name}/{number}"


def _in_onnx(archived: Archived) -> bytes:
    try:
        return portable.scoring(archived.metadata, archived.weights)
    except ValueError as error:
        raise ValueError(f"{archived.name} cannot be given to Triton: {error}") from error


def _check_shared(repository: Path, name: str, number: str, config: dict[str, Any]) -> None:
    """Raises ValueError if the model's other versions need another configuration."""
    try:
        known = json.loads((repository / f"{name}.config.json").read_text())
    except FileNotFoundError:
        return
    if known == config or not any(one.is_dir() and one.name != number for one in (repository / name).iterdir()):
        return
    was, now = ((one["backend"], one["input"][0]["dims"][0]) for one in (known, config))
    raise ValueError(
        f"the other versions of {name} are run by {was[0]} and take {was[1]} features, this one by {now[0]}, and it"
        f" takes {now[1]}: Triton has one configuration for all of them. Give this one another name"
    )


def _pbtxt(backend: _Backend, features: int) -> str:
    """The configuration as it lies beside the versions, in Protobuf's text format."""
    parameters = (
        f'parameters {{ key: "{key}" value: {{ string_value: "{text}" }} }}' for key, text in backend.parameters.items()
    )
    text = _PBTXT.format(
        backend=backend.name,
        file=backend.file,
        max_batch_size=_LARGEST_BATCH,
        input=portable.GIVEN,
        output=portable.SCORES,
        features=features,
    )
    return text + "\n".join(parameters) + "\n"


def _config(backend: _Backend, features: int) -> dict[str, Any]:
    """The configuration as a load request carries it."""
    return {
        "backend": backend.name,
        "default_model_filename": backend.file,
        "max_batch_size": _LARGEST_BATCH,
        "input": [{"name": portable.GIVEN, "data_type": "TYPE_FP32", "dims": [features]}],
        "output": [{"name": portable.SCORES, "data_type": "TYPE_FP32", "dims": [1]}],
        "parameters": {key: {"string_value": text} for key, text in backend.parameters.items()},
        "instance_group": [{"kind": "KIND_CPU"}],
    }


def main(
    archive: Annotated[Path, typer.Argument(exists=True, help="The `.mar` of a model.")],
    repository: Annotated[Path, typer.Argument(help="Triton's model repository; made when missing.")],
    name: Annotated[
        str, typer.Option(help="What the server calls the model, where that is not the archive's name.")
    ] = "",
) -> None:
    """Writes a model as a version of a model in Triton's repository."""
    try:
        written = write_version(archive, repository, name)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        typer.echo(f"{archive}: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{repository / written}")


if __name__ == "__main__":
    typer.run(main)
