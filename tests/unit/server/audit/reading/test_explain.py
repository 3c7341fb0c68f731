"""Explanations of decisions that a desk made, by the models from their archives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.desk import Desk, values

from feature_cache import features
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.explain import Explainer
from server.errors import NotReplayableError
from server.models.archive import ModelStore, RunningModel, read_archive


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


async def test_what_cannot_be_explained_says_why(desk: Desk, explainer: Explainer) -> None:
    packet = await desk.decide(values(3))
    unknown, short = packet_pb2.DecisionPacket.FromString(packet.SerializeToString()), await desk.decide(values(4))
    unknown.decision.model_version = "0" * 16
    short.model_input = short.model_input[:-4]
    short.feature_set_id = "of-yesterday"
    for wrong, why in ((unknown, "no archive of model version 0000"), (short, "the features are of the set")):
        explanation = explainer.explain(wrong)
        assert explanation.status == pb.EXPLANATION_STATUS_UNAVAILABLE
        assert why in explanation.message


async def test_a_model_that_was_warmed_up_is_not_loaded_again(desk: Desk, explainer: Explainer) -> None:
    packet = await desk.decide(values(3))
    before = set(psutil.Process().children())
    explainer.warm_up(packet.decision.model_version)
    (model,) = set(psutil.Process().children()) - before
    assert explainer.explain(packet).status == pb.EXPLANATION_STATUS_READY
    assert set(psutil.Process().children()) - before == {model}
    with pytest.raises(NotReplayableError, match="no archive"):
        explainer.warm_up("0" * 16)


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
