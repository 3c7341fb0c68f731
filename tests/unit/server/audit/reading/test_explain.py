"""Explanations of decisions that a desk made, by the models from their archives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import psutil
import pytest
from support.desk import Desk, values
from support.labelled_rows import labelled_rows

from feature_cache import features
from feature_cache.features import MF1
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.explain import Explainer
from server.errors import NotReplayableError
from server.models.archive import ModelStore, RunningModel, read_archive
from torchserve.brought.adding import Added, Adding, add
from torchserve.brought.combining import Part, combine
from torchserve.brought.data import Data
from torchserve.brought.reading import read_model
from torchserve.dataset import Samples
from torchserve.export import write_archive
from torchserve.label import Label


@pytest.fixture
def desk(tmp_path: Path, model_store: Path) -> Iterator[Desk]:
    with RunningModel(read_archive(model_store / "champion.mar")) as champion:
        yield Desk(tmp_path, champion)


@pytest.fixture
def explainer(desk: Desk, model_store: Path) -> Iterator[Explainer]:
    with Explainer(desk.packets.get, ModelStore([model_store]).find) as explainer:
        yield explainer


async def test_contributions_and_base_sum_to_the_margin(desk: Desk, explainer: Explainer) -> None:
    packet = await desk.decide(values(3))
    explanation = explainer.explain(packet)
    assert explanation.status == pb.EXPLANATION_STATUS_READY, explanation.message
    assert [one.feature for one in explanation.contributions] == list(features.NAMES)
    total = explanation.base + sum(one.contribution for one in explanation.contributions)
    assert total == pytest.approx(explanation.margin, abs=2e-5)
    assert explanation.decision_id == packet.decision.decision_id


@pytest.mark.long
async def test_what_cannot_be_explained_says_why(desk: Desk, explainer: Explainer) -> None:
    packet = await desk.decide(values(3))
    unknown, short = packet_pb2.DecisionPacket.FromString(packet.SerializeToString()), await desk.decide(values(4))
    unknown.decision.model_version = "0" * 16
    short.model_input = short.model_input[:-4]
    short.feature_set_id = "of-yesterday"
    for wrong, why in (
        (unknown, "no archive of model version 0000"),
        (short, f"takes features of the set {features.MF1.version}, which"),
    ):
        explanation = explainer.explain(wrong)
        assert explanation.status == pb.EXPLANATION_STATUS_UNAVAILABLE
        assert why in explanation.message


@pytest.mark.long
async def test_a_model_that_was_warmed_up_is_not_loaded_again(desk: Desk, explainer: Explainer) -> None:
    packet = await desk.decide(values(3))
    before = set(psutil.Process().children())
    explainer.warm_up(packet.decision.model_version)
    (model,) = set(psutil.Process().children()) - before
    assert explainer.explain(packet).status == pb.EXPLANATION_STATUS_READY
    assert set(psutil.Process().children()) - before == {model}
    with pytest.raises(NotReplayableError, match="no archive"):
        explainer.warm_up("0" * 16)


@pytest.mark.long
async def test_a_model_whose_process_was_killed_explains_the_next_decision(desk: Desk, explainer: Explainer) -> None:
    packet = await desk.decide(values(3))
    before = set(psutil.Process().children())
    assert explainer.explain(packet).status == pb.EXPLANATION_STATUS_READY
    (model,) = set(psutil.Process().children()) - before
    model.kill()
    model.wait()
    failed = explainer.explain(packet)
    assert (failed.status, "gave no explanation" in failed.message) == (pb.EXPLANATION_STATUS_UNAVAILABLE, True)
    assert explainer.explain(packet).status == pb.EXPLANATION_STATUS_READY


def brought_data() -> Data:
    rows, labels = labelled_rows(900, 5)
    times = np.arange(900, dtype=np.int64) * 200_000_000
    nothing = np.zeros(900)
    label = Label(horizon_seconds=0.1)
    samples = Samples(
        rows, labels, nothing, times, nothing > 0, nothing.astype(np.int16), ("A.SIM",), "test", label=label
    )
    return Data(samples, has_time=True, step_seconds=0.2)


def explanation_of(added: Added, store: Path, row: bytes) -> pb.Explanation:
    version = write_archive(added, added.metadata, store, install=False)
    packet = packet_pb2.DecisionPacket(model_input=row, feature_set_id=features.MF1.id)
    packet.decision.source, packet.decision.model_version = pb.SOURCE_PRIMARY, version
    archive = read_archive(store / "versions" / f"{version}.mar")
    with Explainer(lambda _: None, lambda _: archive) as explainer:
        return explainer.explain(packet)


@pytest.mark.parametrize("with_data", [True, False])
def test_the_parts_of_an_ensemble_are_explained_with_it(tmp_path: Path, with_data: bool) -> None:
    parts = []
    for seed in (1, 2):
        rows, labels = labelled_rows(600, seed)
        parameters = {"objective": "binary", "verbose": -1, "num_threads": 1}
        lightgbm.train(parameters, lightgbm.Dataset(rows, labels), 5).save_model(tmp_path / "model")
        added = add(read_model(tmp_path / "model", "lightgbm", MF1), None, Adding(MF1, threshold=0.5))
        metadata: dict[str, Any] = json.loads(json.dumps(added.metadata))
        parts.append(Part(f"{seed:016x}", metadata, added.weights, 1.0))
    together = combine("mean", parts, brought_data() if with_data else None, Adding(MF1, threshold=0.5))
    row = labelled_rows(1, 9)[0].tobytes()
    found = explanation_of(together, tmp_path, row)
    if not with_data:
        assert found.status == pb.EXPLANATION_STATUS_UNAVAILABLE
        assert "the model was added without a dataset" in found.message
        return
    assert (found.status, found.method) == (pb.EXPLANATION_STATUS_READY, "sampled_shapley")
    assert [(one.model_version, one.weight) for one in found.parts] == [(one.version, 0.5) for one in parts]
    assert all(0 < one.score < 1 for one in found.parts)
    contributed = sum(one.contribution for one in found.contributions)
    assert found.base + contributed == pytest.approx(found.margin, abs=1e-4)
