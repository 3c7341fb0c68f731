"""The set `ta1` where it cannot be computed."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from feature_cache.feature_set import FeatureSetError
from feature_cache.ta1 import registration
from local.training.cli import app


@pytest.fixture
def without_talib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "talib", None)
    for name in [one for one in sys.modules if one.startswith("feature_cache.ta1.")]:
        if name.endswith((".computer", ".series", ".indicators")):
            monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("without_talib")
@pytest.mark.parametrize(
    "make", [registration.make, registration.resume, registration.make_long, registration.resume_long]
)
def test_without_talib_the_extra_that_has_it_is_named(make: object) -> None:
    assert callable(make)
    with pytest.raises(FeatureSetError, match=r"pip install 'pretrade-server\[ta\]'"):
        make("BTCUSDT.BINANCE")


@pytest.mark.usefixtures("without_talib")
def test_training_on_ta1_names_that_extra_and_no_other() -> None:
    result = CliRunner().invoke(app, ["dataset", "build", "--out", "x.parquet", "--features", "ta1", "--seconds", "60"])
    assert result.exit_code == 1, result.output
    said = " ".join(result.output.split())
    assert "pip install 'pretrade-server[ta]'" in said
    assert "mlflow" not in said
    assert "FeatureSetError" not in said
