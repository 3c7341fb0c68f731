"""Models small enough to train in every run, made by the code that makes the real ones."""

from __future__ import annotations

import gc
import json
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from feature_cache.sources.simulator import simulate
from torchserve.dataset import Samples, collect
from torchserve.export import metadata_of, write_archive
from torchserve.handler import ModelHandler
from torchserve.training import KINDS, TrainedModel, TrainingSettings, train


@pytest.fixture(scope="session")
def settings() -> TrainingSettings:
    return TrainingSettings(seed=5, trees=20, epochs=3)


@pytest.fixture(scope="session")
def samples() -> Samples:
    # A slow market: as much to learn from in a quarter of the time.
    events = simulate(7, ["BTCUSDT.SIM"], events_per_second=60, duration_seconds=1200)
    return collect(events, "simulated for tests")


@pytest.fixture(scope="session")
def models(samples: Samples, settings: TrainingSettings) -> dict[str, TrainedModel]:
    return {name: train(name, samples, settings) for name in KINDS}


@pytest.fixture(scope="session")
def store(
    models: dict[str, TrainedModel],
    samples: Samples,
    settings: TrainingSettings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    directory = tmp_path_factory.mktemp("store")
    for model in models.values():
        write_archive(model, metadata_of(model, samples, settings) | {"expires_at": 4_102_444_800}, directory)
    return directory


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[[Path], ModelHandler]]:
    """Loads an archive as TorchServe's worker does: unpacked, with TorchServe's own context."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # TorchServe's package leaves a file open when it is imported
        from ts.context import Context  # noqa: PLC0415

    def loaded(archive: Path) -> ModelHandler:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(tmp_path)
        manifest = json.loads((tmp_path / "MAR-INF" / "MANIFEST.json").read_text())
        handler = ModelHandler()
        handler.initialize(Context(manifest["model"]["modelName"], str(tmp_path), manifest, 1, None, "0.12.0"))
        return handler

    yield loaded
    gc.unfreeze()
