"""`pretrade train`: what does not beat the baselines is not published; what is published has a card that is true."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.text import Text
from support.guest_sets import ALL, RECORDED, know
from typer.testing import CliRunner

from feature_cache.features import NAMES
from feature_cache.sources.simulator import simulate
from local.training.cli import _expiry
from local.training.training import Plan, carry_out
from pretrade.client.cli.main import app
from server.models.registry import Registry
from torchserve.build import build_models
from torchserve.card import render_html
from torchserve.dataset import collect
from torchserve.label import Label
from torchserve.sources import read_dataset, write_dataset

SECONDS = 600.0
# A slow market: as much to learn from in a quarter of the time.
EVENTS_PER_SECOND = 60.0


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dataset") / "simulated.parquet"
    events = simulate(7, ["BTCUSDT.SIM"], events_per_second=EVENTS_PER_SECOND, duration_seconds=1200)
    write_dataset(collect(events, "simulated for tests"), path)
    return path


def train(dataset: Path, store: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and figures."""
    arguments = ["train", "--data", str(dataset), "--store", str(store), "--blocks", "2", "--json", *options]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what MLflow warns of when it is imported is not ours to answer for
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code in (0, 3), result.output
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture(scope="module")
def forced(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Both models in a store, and what the command said."""
    store = tmp_path_factory.mktemp("made") / "store"
    both = ("--model", "xgboost", "--model", "torch", "--force")
    code, said = train(dataset, store, *both, "--dir", str(store.parent / "dir"), "--mlflow", "local")
    assert code == 0
    return store, said


@pytest.mark.long
def test_what_does_not_beat_the_baselines_is_published_only_by_force(dataset: Path, tmp_path: Path) -> None:
    samples = read_dataset(dataset)
    # All that there is to learn is one feature's sign, which a logistic regression learns as well as any model.
    likely = np.where(samples.rows[:, NAMES.index("imbalance_l1")] > 0, 0.8, 0.5)
    turned = np.random.default_rng(1).random(len(likely)) < likely
    write_dataset(replace(samples, eligible=turned), tmp_path / "turned.parquet")
    both = ("--model", "xgboost", "--model", "torch", "--blocks", "1")
    code, said = train(tmp_path / "turned.parquet", tmp_path / "store", *both)
    assert code == 3
    assert said["walk_forward"]["beats_baselines"] == {"xgboost": False, "torch": False}
    assert (said["refused"], said["models"]) == (["xgboost", "torch"], [])
    assert not (tmp_path / "store").exists()
    code, forced = train(tmp_path / "turned.parquet", tmp_path / "store", *both, "--force")
    assert (code, forced["refused"]) == (0, [])
    assert forced["walk_forward"] == said["walk_forward"]
    assert len(list(tmp_path.rglob("*.mar"))) == len(forced["models"]) == 2
    for model in forced["models"]:
        differences = said["walk_forward"]["comparisons"][model["kind"]]
        lost = [name for name, (value, *_) in differences.items() if value is None or value <= 0]
        unsure = [name for name, (_, low, _) in differences.items() if low is None or low <= 0]
        assert unsure
        card = (Path(model["card"]) / "card.md").read_text()
        verdict = next(line for line in card.splitlines() if line.startswith("**"))
        assert [name for name in differences if name in verdict] == (lost or unsure)
        assert "xported by force, if at all." in verdict


@pytest.mark.long
def test_a_model_that_knows_nothing_is_not_published_by_force_either(dataset: Path, tmp_path: Path) -> None:
    samples = read_dataset(dataset)
    # What it learns holds until it is calibrated, and is wrong from then on.
    start, end = int(samples.time_ns.min()), int(samples.time_ns.max())
    right = samples.rows[:, 2] > 0
    turned = np.where(samples.time_ns > start + 0.55 * (end - start), ~right, right)
    write_dataset(replace(samples, eligible=turned), tmp_path / "turned.parquet")
    code, said = train(tmp_path / "turned.parquet", tmp_path / "store", "--blocks", "1", "--force")
    assert (code, said["refused"], said["models"]) == (3, ["monotone"], [])
    assert not list(tmp_path.rglob("*.mar"))


@pytest.mark.long
def test_a_model_of_another_set_is_measured_described_and_usable_like_one_of_mf1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(monkeypatch, *ALL)
    events = simulate(7, ["BTCUSDT.SIM"], events_per_second=EVENTS_PER_SECOND, duration_seconds=300)
    samples = collect(events, "simulated for tests", label=Label(horizon_seconds=0.5), feature_set=RECORDED)
    likely = 0.4 + 0.3 * (samples.rows[:, 0] > 0) + 0.2 * (samples.rows[:, 1] > 0)
    turned = np.random.default_rng(1).random(len(likely)) < likely
    path, once = tmp_path / "recorded.parquet", ("--blocks", "1", "--force")
    write_dataset(replace(samples, eligible=turned), path)
    code, said = train(path, tmp_path / "store", *once)
    assert (code, [model["kind"] for model in said["models"]]) == (0, ["xgboost"]), "the default where a set is another"
    assert {*said["walk_forward"]["comparisons"]["xgboost"]} == {
        *("always trade", "rules", "logistic regression", "monotone")
    }
    registry = Registry(tmp_path / "store")
    for model in said["models"]:
        assert model["feature_names"] == list(RECORDED.names)
        assert set(model["reference"]) == {*RECORDED.names, "score"}
        record = registry.usable(model["version"])
        assert (record.features, record.canned_rows.shape[1]) == (RECORDED, len(RECORDED))
        assert record.limits.domain is not None
        assert set(record.limits.domain.names) <= {*RECORDED.names}
        assert record.limits.has_band
        assert model["volatility_forecast"] is not None
        card = (Path(model["card"]) / "card.md").read_text()
        importance = card.split("## Feature importance")[1].split("##")[0]
        assert set(re.findall(r"`(\w+)`", importance)) == {*RECORDED.names}
        assert "Feature set `recorded`" in card
        assert "| `bought` | frozen |" in card or "bought" not in record.limits.domain.names
    own = said["walk_forward"]["figures"]["monotone"]
    write_dataset(read_dataset(path).of_mf1, tmp_path / "mf1.parquet")
    _, of_mf1 = train(tmp_path / "mf1.parquet", tmp_path / "other", "--model", "monotone", *once)
    assert own == of_mf1["walk_forward"]["figures"]["monotone"], "the champion of mf1 is the same baseline"
    wrong = ["--data", str(path), "--store", str(tmp_path / "other"), "--model", "monotone"]
    refused = CliRunner().invoke(app, ["train", *wrong])
    assert refused.exit_code == 1
    assert "monotone trees look at features of mf1 alone: train xgboost or torch" in " ".join(refused.output.split())


@pytest.mark.long
def test_the_same_input_gives_the_same_version_and_the_same_card(
    dataset: Path, forced: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    store, said = forced
    _, again = train(dataset, tmp_path, "--model", "xgboost", "--model", "torch", "--force")
    assert [model["version"] for model in again["models"]] == [model["version"] for model in said["models"]]
    for model in said["models"]:
        archive = Path("versions") / f"{model['version']}.mar"
        assert (tmp_path / archive).read_bytes() == (store / archive).read_bytes()
        for name in ("reliability.svg", "coverage.svg", "evaluation.json"):
            card = Path("cards") / model["version"] / name
            assert (tmp_path / card).read_bytes() == (store / card).read_bytes()


@pytest.mark.long
def test_a_published_version_is_a_candidate_and_not_what_the_stack_starts_with(
    forced: tuple[Path, dict[str, Any]],
) -> None:
    store, said = forced
    assert {path.name for path in store.iterdir()} == {"versions", "cards", "aliases"}
    registry = Registry(store)
    assert registry.aliases() == {"candidate": said["models"][-1]["version"]}
    for model in said["models"]:
        with zipfile.ZipFile(store / "versions" / f"{model['version']}.mar") as archive:
            manifest = json.loads(archive.read("MAR-INF/MANIFEST.json"))["model"]
            inside = json.loads(archive.read("metadata.json"))
        assert (manifest["modelName"], manifest["modelVersion"]) == ("champion", model["version"])
        assert inside.items() <= model.items()
        assert registry.usable(model["version"]).threshold == model["threshold"]


@pytest.mark.long
def test_the_card_tells_what_was_measured(forced: tuple[Path, dict[str, Any]]) -> None:
    _, said = forced
    for model in said["models"]:
        folder = Path(model["card"])
        card, page = (folder / "card.md").read_text(), render_html(folder)
        assert card.startswith(f"# Model card: champion `{model['version']}`\n")
        figures = said["walk_forward"]["figures"][model["kind"]]
        row = next(line for line in card.splitlines() if line.startswith(f"| **{model['kind']}**"))
        for name in ("precision", "coverage", "recall", "auc", "brier", "ece"):
            value, low, high = figures[name]
            assert f"{value:.3f} ({low:.3f} … {high:.3f})" in row
        for decider in ("always trade", "rules", "logistic regression"):
            assert re.search(rf"^\| {decider} \|", card, re.MULTILINE)
        assert all(f"`{name}`" in card for name in NAMES)
        assert model["data"]["sha256"][:16] in card
        assert "### By volatility" in card
        assert "- Does not expire\n" in card
        assert "The data is simulated" in card
        assert re.search(r"95% ± 2% at 5% coverage takes about [\d.]+ hours of each instrument's market", card)
        assert "## What can be foretold" not in card, "a dataset file has one label"
        assert page.count("<svg") == 2
        assert "<img" not in page
        assert f'<td style="text-align:right">{figures["auc"][0]:.3f} (' in page
    importance = [model["kind"] for model in said["models"] if "SHAP" in (Path(model["card"]) / "card.md").read_text()]
    assert importance == ["xgboost"]


@pytest.mark.long
def test_a_card_is_rendered_as_one_file_on_demand(
    forced: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(forced[1]["models"][0]["card"])
    result = CliRunner().invoke(app, ["card", str(folder), "--out", str(tmp_path / "card.html")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "card.html").read_text() == render_html(folder)
    monkeypatch.chdir(tmp_path)  # a long path would be wrapped
    result = CliRunner().invoke(app, ["card", "."])
    assert result.exit_code == 2
    assert "card.md" in result.output


@pytest.mark.long
@pytest.mark.parametrize("labels", [True, False])
def test_installed_models_are_those_that_the_stack_would_train_itself(tmp_path: Path, labels: bool) -> None:
    plan = Plan(
        kinds=("monotone", "torch"),
        label=None,
        valid_days=30.0,
        data=(),
        store=tmp_path / "store",
        name="champion",
        seed=3,
        simulated_seconds=SECONDS,
        blocks=2,
        trials=0,
        install=True,
        force=True,
        feature_set=None,
        labels=labels,
        cards=tmp_path / "cards",
        command="pretrade train",
    )
    outcome = carry_out(plan)
    assert {path.name for path in (tmp_path / "cards").iterdir()} == {"champion", "challenger", "evaluation.json"}
    assert ("labels" in json.loads((tmp_path / "cards" / "evaluation.json").read_text())) == labels
    reports: list[str] = []
    models = build_models(None, plan.store, seed=3, simulated_seconds=SECONDS, report=reports.append)
    assert reports == [f"{plan.store} is up to date"]
    assert {one.described["version"] for one in outcome.made} == {model["version"] for model in models.values()}


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        ("--model", "forest"),
        ("--name", "third"),
        ("--install", "--trials", "2"),
        ("--install", "--model", "torch"),
        ("--install",),  # of a dataset file
    ],
)
def test_what_makes_no_sense_is_refused(options: tuple[str, ...], dataset: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", "--data", str(dataset), "--store", str(tmp_path), *options])
    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_runs_are_kept_in_mlflow(forced: tuple[Path, dict[str, Any]]) -> None:
    from mlflow import MlflowClient  # noqa: PLC0415 - after it was imported without its warnings

    store, said = forced
    directory = store.parent / "dir"
    client = MlflowClient(tracking_uri=f"sqlite:///{directory}/mlflow.db")
    experiment = client.get_experiment_by_name("pretrade")
    assert experiment is not None
    runs = {run.data.tags["version"]: run for run in client.search_runs([experiment.experiment_id])}
    registered = {one.tags["version"]: one for one in client.search_model_versions("name = 'pretrade-champion'")}
    assert set(registered) == set(runs) == {model["version"] for model in said["models"]}
    for model in said["models"]:
        run = runs[model["version"]]
        auc = said["walk_forward"]["figures"][model["kind"]]["auc"][0]
        assert run.data.metrics["walk_forward.auc"] == pytest.approx(auc)
        assert np.isfinite(list(run.data.metrics.values())).all()
        assert run.data.params["xgboost.max_depth"] == "3"
        assert run.info.status == "FINISHED"
        assert "card/card.md" in {file.path for file in client.list_artifacts(run.info.run_id, "card")}
        kept = Path(str(registered[model["version"]].source).removeprefix("file://"))
        assert kept.read_bytes() == Path(model["archive"]).read_bytes()
        assert kept.is_relative_to(directory)
    assert not Path("mlruns").exists()


@pytest.mark.parametrize(("now", "late"), [(1_700_000_000, False), (1_800_000_000, True)])
def test_when_a_model_expires_is_said_and_that_it_has_already(now: int, late: bool) -> None:
    said = Text.from_markup(_expiry(1_723_161_900, 1_725_753_900, now)).plain
    assert said.startswith("its data ends at 2024-08-09 00:05 UTC, and it may decide until 2024-09-08 00:05 UTC")
    assert said.endswith("on a live market it has expired already") == late
