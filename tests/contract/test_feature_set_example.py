"""The example in docs/feature-sets.md, exactly as it stands there."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from support.waiting import until
from typer.testing import CliRunner

from feature_cache import feature_sets, logs
from feature_cache.feature_set import CALLER
from feature_cache.sources.simulator import simulate
from feature_cache.store.codec import FeatureSnapshot
from feature_cache.worker.cli import app
from feature_cache.worker.engines import Engines
from feature_cache.worker.guests import Guest, Guests, launcher
from feature_cache.worker.settings import WorkerSettings, computed_by

PAGE = Path(__file__).parents[2] / "docs" / "feature-sets.md"
NAME = "A.SIM"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(feature_sets, "_loaded", {})
    monkeypatch.setattr(logs, "configure", lambda *_: None)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code.count("\n") < 60, "the page promises an example of less than 60 lines"
    path = tmp_path / "sets.py"
    path.write_text(code)
    return path


def test_the_example_passes_its_own_check(file: Path) -> None:
    ended = CliRunner().invoke(app, ["check", str(file)])
    assert ended.exit_code == 0, ended.stderr
    assert "numbers/" in ended.stdout


async def test_a_worker_computes_the_example_from_a_market(file: Path) -> None:
    (registered,) = computed_by(WorkerSettings(features_file=file))
    numbers = registered.feature_set
    assert [feature.source for feature in numbers.features] == ["mf1", "mf1", "mf1", "", "", CALLER]
    guest = Guest(registered, launcher(registered, file))
    engines = Engines(1, Guests([guest]))
    engines.assign(0, 0, 0)
    ready: list[FeatureSnapshot] = []
    for offset, event in enumerate(itertools.islice(simulate(1, [NAME]), 1500)):
        engines.take(0, offset, NAME.encode(), event.SerializeToString())
    (of_mf1,) = engines.take_changed()

    def newest() -> bool:
        ready.extend(snapshot for _, snapshot in guest.exchange())
        return bool(ready) and ready[-1].sequence == of_mf1.sequence

    try:
        await until(newest)
    finally:
        guest.close()
    assert guest.suspensions == {}
    found = ready[-1]
    assert found.feature_set is numbers
    values = dict(zip(numbers.names, found.values.tolist(), strict=True))
    assert -1.0 <= values["flow"] <= 1.0
    assert abs(values["momentum_bps"]) < 100.0
    elsewhere = [place for place, feature in enumerate(numbers.features) if feature.source]
    assert np.isnan(found.values[elsewhere]).all()
