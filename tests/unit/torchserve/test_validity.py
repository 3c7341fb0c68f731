"""A model expires some days after its data ends, whenever it was made."""

from __future__ import annotations

from dataclasses import replace

import pytest

from torchserve.dataset import Samples
from torchserve.export import metadata_of
from torchserve.training import TrainedModel, TrainingSettings

DAY = 86_400


def test_a_model_of_a_recording_expires_thirty_days_after_its_data_ends(
    models: dict[str, TrainedModel], samples: Samples, settings: TrainingSettings
) -> None:
    recorded = replace(samples, source="recorded: session.jsonl.gz")
    described = metadata_of(models["champion"], recorded, settings)
    until = (int(samples.time_ns.max()) + samples.label.span_ns) / 1e9
    assert until <= described["trained_until"] < until + 1
    assert described["expires_at"] == described["trained_until"] + 30 * DAY
    assert described == metadata_of(models["champion"], recorded, settings), "whenever it is made"


@pytest.mark.parametrize(("valid_days", "after"), [(0.5, DAY // 2), (90.0, 90 * DAY), (None, None)])
def test_how_long_is_a_setting(
    valid_days: float | None,
    after: int | None,
    models: dict[str, TrainedModel],
    samples: Samples,
    settings: TrainingSettings,
) -> None:
    recorded = replace(samples, source="recorded: session.jsonl.gz")
    described = metadata_of(models["champion"], recorded, settings.model_copy(update={"valid_days": valid_days}))
    assert described["expires_at"] == (0 if after is None else described["trained_until"] + after)
    assert described["training"]["valid_days"] == valid_days


def test_what_was_learnt_from_a_simulated_market_does_not_expire(
    models: dict[str, TrainedModel], samples: Samples, settings: TrainingSettings
) -> None:
    assert samples.is_simulated
    assert metadata_of(models["champion"], samples, settings)["expires_at"] == 0
