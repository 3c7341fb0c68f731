"""A model store is built once, and again only when what it is made from has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from feature_cache.sources.session import SessionError
from pretrade.client.cli.main import app
from torchserve.build import NAMES, build_models

ROOT = Path(__file__).parents[3]
RECORDED = ROOT / "../shared/data/binance_spot"
CARDS = ROOT / "docs/models"
SECONDS = 120.0


def build(store: Path, seed: int = 3) -> tuple[dict[str, str], list[str]]:
    """Versions by model, and what was reported."""
    reports: list[str] = []
    models = build_models(None, store, seed=seed, simulated_seconds=SECONDS, report=reports.append)
    return {name: model["version"] for name, model in models.items()}, reports


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("parent") / "store"
    build(store)
    return store


def test_a_store_holds_both_models(store: Path) -> None:
    assert {path.name for path in store.iterdir()} == {
        "champion.mar",
        "champion.json",
        "challenger.mar",
        "challenger.json",
        "inputs.json",
        "versions",
    }
    for name in NAMES:
        described = json.loads((store / f"{name}.json").read_text())
        kept = store / "versions" / f"{described['version']}.mar"
        assert kept.read_bytes() == (store / f"{name}.mar").read_bytes()
        assert described["data"]["source"] == "simulated, 120 s, seed 3"


def test_an_up_to_date_store_is_left_alone(store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    versions, reports = build(store)
    assert {path: path.stat().st_mtime_ns for path in store.iterdir()} == before
    assert reports == [f"{store} is up to date"]
    assert set(versions) == set(NAMES)


@pytest.mark.long
@pytest.mark.parametrize("damage", ["another seed", "archive gone", "unreadable inputs"])
def test_any_other_store_is_made_anew(damage: str, store: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(store, tmp_path / "store")
    if damage == "archive gone":
        (copy / "champion.mar").unlink()
    elif damage == "unreadable inputs":
        (copy / "inputs.json").write_text("{")
    _, reports = build(copy, seed=4 if damage == "another seed" else 3)
    assert any(report.startswith("training the champion") for report in reports)
    same = (copy / "champion.mar").read_bytes() == (store / "champion.mar").read_bytes()
    assert same == (damage != "another seed")


def test_a_missing_recording_is_an_error_and_leaves_no_store(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="no such file"):
        build_models(tmp_path / "nothing", tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.long
def test_the_card_of_the_recorded_session_is_what_its_command_makes(tmp_path: Path) -> None:
    if not RECORDED.exists():
        pytest.skip("the recorded sessions are not there")
    options = ["--data", str(RECORDED), "--store", str(tmp_path / "store"), "--cards", str(tmp_path / "cards")]
    result = CliRunner().invoke(app, ["train", "--install", "--force", "--horizon", "0.5", *options])
    assert result.exit_code == 0, result.output
    for name in NAMES:
        described = json.loads((tmp_path / "store" / f"{name}.json").read_text())
        card = (CARDS / name / "card.md").read_text()
        assert f"{described['data']['samples']:,} samples" in card
        assert "minutes of one session: one regime of BTCUSDT.BINANCE and ETHUSDT.BINANCE" in card
    made = json.loads((tmp_path / "cards" / "evaluation.json").read_text())
    committed = json.loads((CARDS / "evaluation.json").read_text())
    assert made["beats_baselines"] == committed["beats_baselines"]
    for decider, figures in committed["figures"].items():
        for figure, (value, *_) in figures.items():
            # Another processor may add up in another order, which early stopping may turn into another tree.
            assert made["figures"][decider][figure][0] == pytest.approx(value, abs=0.05), (decider, figure)
