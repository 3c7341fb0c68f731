"""The runtimes that bench-serving compares compute the same model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from local.bench.runtimes import champion_margins, metadata_and_weights, network_margins


@pytest.fixture(scope="module")
def rows() -> NDArray[np.float32]:
    random = np.random.default_rng(2)
    rows = random.normal(size=(300, 25)).astype(np.float32)
    rows[random.random(rows.shape) < 0.1] = np.nan
    return rows


def probabilities(margins: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-margins.astype(np.float64))))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of runtimes that are not ours
def test_every_runtime_that_is_installed_gives_the_handlers_scores(
    model_store: Path, rows: NDArray[np.float32]
) -> None:
    _, weights = metadata_and_weights(model_store / "champion.mar")
    margins = champion_margins(weights, rows.shape[1])
    expected = probabilities(next(iter(margins.values()))(rows))
    assert {name.partition(" ")[0] for name in margins} >= {"xgboost"}
    for name, margin in margins.items():
        np.testing.assert_allclose(probabilities(margin(rows)), expected, rtol=0, atol=1e-6, err_msg=name)
    assert np.ptp(expected) > 0.1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's own
def test_the_scripted_network_is_the_network(model_store: Path, rows: NDArray[np.float32]) -> None:
    metadata, weights = metadata_and_weights(model_store / "challenger.mar")
    eager, scripted = network_margins(weights, metadata["network"]).values()
    np.testing.assert_allclose(scripted(rows), eager(rows), rtol=0, atol=1e-5)
