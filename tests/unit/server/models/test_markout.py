"""A server goes by the label that the model's metadata say."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from server.models.markout import Markout, markout_of
from server.models.registry import Registry
from torchserve.label import Label


def test_a_label_is_read_as_training_writes_it() -> None:
    learnt = Label(horizon_seconds=0.5, delay_seconds=0.2, price="touch", worst_markout_bps=-0.4)
    assert markout_of({"label": learnt.described}) == Markout(0.5, 0.2, "touch", -0.4)


def test_a_model_that_was_made_before_labels_were_said_has_the_default() -> None:
    assert markout_of({"label": "side-signed mid markout"}) == markout_of({}) == Markout()


def test_a_price_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="no price 'close'"):
        markout_of({"label": Label().described | {"price": "close"}})


def test_the_champions_label_is_that_of_its_archive(model_store: Path, tmp_path: Path) -> None:
    registry = Registry(Path(shutil.copytree(model_store, tmp_path / "store")))
    assert Registry(tmp_path / "nothing").champions_markout() == Markout()
    (record, *_) = registry.records()
    assert record.markout == Markout(horizon_seconds=0.1, worst_bps=-0.5)
    registry.set_alias("champion", record.version)
    assert registry.champions_markout() == record.markout


@pytest.mark.parametrize(
    "change",
    [
        {"horizon_seconds": math.nan},
        {"horizon_seconds": 0.0},
        {"delay_seconds": -0.1},
        {"delay_seconds": math.inf},
        {"worst_markout_bps": math.nan},
    ],
)
def test_a_label_that_no_market_can_answer_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="label"):
        markout_of({"label": Label().described | change})
