"""Population stability, its limit, and what recorded decisions say of drift."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from feature_engine.selection import DropHighPSIFeatures
from numpy.typing import NDArray
from sklearn.metrics import brier_score_loss
from support.drift_alarms import rates
from support.guest_sets import know
from support.waiting import until
from torchmetrics.classification import BinaryCalibrationError
from typer.testing import CliRunner

from feature_cache import features
from feature_cache.feature_set import CALLER, Feature, FeatureSet
from feature_cache.feature_sets import Registered
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.wire.reading import reading_pb2
from server.audit.commands import app as commands
from server.audit.reading.labels import LabelledDecision, quality
from server.audit.reading.reading import Question, Reading, ReadingProcess, Task
from server.decision.ids import id_bound
from server.drift.cli import print_report
from server.drift.psi import Reference, independent_values, limit, psi, references_of
from server.drift.report import write_report
from server.drift.summary import Drift, Summary, summarise
from server.drift.watch import DriftSettings, DriftWatch
from server.errors import ModelUnknownError
from server.journal.journal_file import JournalFile
from server.rpc.call import Call
from server.rpc.reading import ReadingServicer, drift_status
from torchserve.dataset import STEP_NS, Samples
from torchserve.reference import correlation_steps, reference_histogram

DECILES = tuple([0.1] * 10 + [0.0])


def test_psi_is_what_an_independent_library_computes() -> None:
    random = np.random.default_rng(3)
    before, after = random.normal(size=5_000), random.normal(0.3, 1.2, size=3_000)
    frame = pd.DataFrame({"feature": np.concatenate([before, after]), "other": np.arange(8_000.0)})
    frame["half"] = [0] * 5_000 + [1] * 3_000
    library = DropHighPSIFeatures(split_col="half", cut_off=0, bins=10, strategy="equal_frequency", threshold=100)
    library.fit(frame)
    histogram = reference_histogram(before, sampled(np.zeros((len(before), 0), np.float32)))
    reference = Reference.of(asdict(histogram))
    expected = reference.mixed({"BTCUSDT.SIM": 1.0})
    ours = psi(expected.shares[:-1], expected.independent, reference.counts(after)[:-1], pseudo_count=0)
    assert float(ours) == pytest.approx(library.psi_values_["feature"], rel=0.02)


def test_brier_and_calibration_error_are_what_independent_libraries_compute() -> None:
    random = np.random.default_rng(4)
    scores = random.uniform(size=2_000)
    eligible = random.uniform(size=2_000) < scores**1.5
    pairs = zip(scores.tolist(), eligible.tolist(), strict=True)
    found = quality([LabelledDecision("TRADE", "PRIMARY", score, label) for score, label in pairs])
    assert found.brier == pytest.approx(brier_score_loss(eligible, scores), abs=1e-9)
    metric = BinaryCalibrationError(n_bins=10, norm="l1")
    error = metric(torch.tensor(scores, dtype=torch.float64), torch.tensor(eligible.astype(int)))
    assert found.calibration_error == pytest.approx(float(error), abs=1e-6)


@pytest.mark.parametrize(("reference_of", "sample_of"), [(1_000, 100), (5_000, 2_000), (20_000, 40)])
def test_a_sample_without_drift_is_beyond_the_limit_as_rarely_as_asked(reference_of: int, sample_of: int) -> None:
    random = np.random.default_rng(5)
    references = random.multinomial(reference_of, DECILES, size=4_000)
    samples = random.multinomial(sample_of, DECILES, size=4_000)
    found = np.array([psi(r / reference_of, reference_of, s) for r, s in zip(references, samples, strict=True)])
    alarms = float(np.mean(found > limit(DECILES, reference_of, sample_of, 0.02)))
    assert 0.005 < alarms < 0.04


def test_a_fixed_limit_of_a_tenth_would_be_luck() -> None:
    assert limit(DECILES, 10_000, 80, 0.01) > 0.2
    assert limit(DECILES, 100_000, 100_000, 0.01) < 0.001


def test_values_that_only_repeat_others_count_once() -> None:
    random = np.random.default_rng(6)
    assert correlation_steps(random.normal(size=2_000)) < 1.5
    slow = np.repeat(random.normal(size=100), 20)
    assert 12 < correlation_steps(slow) < 30
    assert correlation_steps(np.ones(50)) == 1
    times = np.arange(100.0)
    assert independent_values(times, 0.0) == 100
    assert independent_values(times, 0.01) == pytest.approx(100)
    assert independent_values(np.repeat(times, 7), 0.01) == pytest.approx(100), "the same instant counts once"
    assert independent_values(times, 20.0) == pytest.approx(100 / 20, rel=0.2)
    assert independent_values(np.full(1_000, 3.0), 20.0) == pytest.approx(1)
    assert independent_values(np.empty(0), 1.0) == 0


def test_a_series_hardly_longer_than_what_it_remembers_does_not_pass_for_a_quick_one() -> None:
    """Its mean follows it, which hides a part of the correlation."""
    found = [correlation_steps(markov(3_000, 150.0, seed)) for seed in range(100)]
    assert np.median(found) == pytest.approx(300, rel=0.25)


def test_undefined_values_are_a_bin_of_their_own() -> None:
    reference = Reference.of(histogram(edges=[0.0], shares=[0.5, 0.5], undefined=0.2))
    expected = reference.mixed({"BTCUSDT.SIM": 1.0})
    assert expected.shares == pytest.approx((0.4, 0.4, 0.2))
    values = np.array([-1, 1, 0, np.nan, np.nan], dtype=np.float32)
    assert reference.counts(values).tolist() == [1, 2, 2]
    gone = np.full(1_000, np.nan, dtype=np.float32)
    assert psi(expected.shares, 1_000, reference.counts(gone)) > 2


def test_a_histogram_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="3 bins between 1 edges"):
        Reference.of(histogram(edges=[0.0], shares=[0.5, 0.2, 0.3]))
    with pytest.raises(ValueError, match="without values"):
        Reference.of(histogram() | {"instruments": {}})


def test_instruments_are_expected_in_the_mixture_in_which_they_were_decided() -> None:
    parts = {
        "A.SIM": {"shares": [1.0, 0.0], "undefined": 0.0, "samples": 90, "independent": 30.0},
        "B.SIM": {"shares": [0.0, 1.0], "undefined": 0.0, "samples": 90, "independent": 10.0},
    }
    reference = Reference.of({"edges": [0.0], "correlation_seconds": 1.0, "instruments": parts})
    for weights, shares, independent in (
        ({"A.SIM": 1.0}, (1.0, 0.0, 0.0), 30),
        ({"A.SIM": 0.5, "B.SIM": 0.5}, (0.5, 0.5, 0.0), 30),
        ({"C.SIM": 1.0}, (0.75, 0.25, 0.0), 40),  # not learnt from: all that was learnt from
    ):
        found = reference.mixed(weights)
        assert found.shares == pytest.approx(shares)
        assert found.independent == pytest.approx(independent)


def histogram(
    edges: tuple[float, ...] | list[float] = (0.25, 0.5, 0.75),
    shares: list[float] | None = None,
    undefined: float = 0.0,
    independent: float = 1_000.0,
) -> dict[str, Any]:
    """The metadata's histogram of one instrument."""
    part = {"shares": shares or [0.25] * 4, "undefined": undefined, "samples": 1_000, "independent": independent}
    return {"edges": list(edges), "correlation_seconds": 0.2, "instruments": {"BTCUSDT.SIM": part}}


def markov(count: int, memory: float, seed: int) -> NDArray[np.float64]:
    """A stationary Gaussian series of unit variance with the autocorrelation exp(-lag / memory)."""
    random = np.random.default_rng(seed)
    decay = np.exp(-1 / memory)
    steps = random.normal(size=count) * np.sqrt(1 - decay**2)
    steps[0] = random.normal()
    return np.array(list(accumulate(steps.tolist(), lambda before, step: decay * before + step)))


def sampled(rows: NDArray[np.float32]) -> Samples:
    """Buys of one instrument, a row every step of the grid."""
    count = len(rows)
    return Samples(
        rows=rows,
        eligible=np.zeros(count, np.bool_),
        markout_bps=np.zeros(count),
        time_ns=np.arange(count, dtype=np.int64) * STEP_NS,
        sell=np.zeros(count, np.bool_),
        instrument=np.zeros(count, np.int16),
        instruments=("BTCUSDT.SIM",),
        source="test",
    )


def learnt(rows: NDArray[np.float32]) -> dict[str, Any]:
    """A model's metadata when it learnt from these rows, and its scores were spread evenly."""
    histograms = {name: asdict(reference_histogram(rows[:, i], sampled(rows))) for name, i in features.INDEX.items()}
    return {"reference": histograms | {"score": histogram(independent=float(len(rows)))}}


def packets(
    rows: NDArray[np.float32], scores: NDArray[np.float64], instrument: str = "BTCUSDT.SIM", version: str = "v1"
) -> list[packet_pb2.DecisionPacket]:
    found = []
    for number, (row, score) in enumerate(zip(rows, scores, strict=True)):
        packet = packet_pb2.DecisionPacket(feature_set_id=features.MF1.id, model_input=row.astype("<f4").tobytes())
        packet.order.instrument, packet.order.side = instrument, pb.SIDE_BUY
        packet.features.sequence = number + 1
        packet.decision.decision_id = f"{instrument}-{number:06}"
        packet.decision.source, packet.decision.model_version = pb.SOURCE_PRIMARY, version
        packet.decision.score = score
        packet.decision.decided_at.FromNanoseconds(1_700_000_000_000_000_000 + number * 10**9)
        found.append(packet)
    return found


def market(count: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, features.N_FEATURES)).astype(np.float32)


def uniform(count: int) -> NDArray[np.float64]:
    return np.random.default_rng(9).uniform(size=count)


def known(metadata: Mapping[str, Any]) -> Any:
    def find(version: str) -> Mapping[str, Any]:
        if version != "v1":
            raise ModelUnknownError(f"no archive of model version {version}")
        return metadata

    return find


def test_decisions_like_those_learnt_from_have_not_drifted() -> None:
    found = summarise(packets(market(1_500, 1), uniform(1_500)), known(learnt(market(8_000, 2))))
    assert found.problem == ""
    assert [one.name for one in found.drifts] == [*features.NAMES, "score"]
    assert found.drifted == ()
    assert found.model_version == "v1"
    assert len(found.windows) == 12


def test_who_compares_may_rest_between_features_and_between_parts_of_the_time() -> None:
    rests = list[int]()
    found = summarise(
        packets(market(1_500, 1), uniform(1_500)), known(learnt(market(8_000, 2))), rest=lambda: rests.append(1)
    )
    assert len(rests) == len(found.drifts) + len(found.windows)


def test_decisions_of_the_embedded_model_are_the_champions() -> None:
    found = packets(market(1_500, 1), uniform(1_500))
    for packet in found:
        packet.decision.source = pb.SOURCE_EMBEDDED
    assert summarise(found, known(learnt(market(8_000, 2)))).model_version == "v1"


def test_a_feature_that_moved_a_score_that_fell_and_one_that_is_missing_are_named() -> None:
    rows = market(1_500, 3)
    rows[:, 2] += 0.5
    rows[:, 7] = np.nan
    found = summarise(packets(rows, uniform(1_500) ** 3), known(learnt(market(8_000, 4))))
    assert {one.name for one in found.drifted} == {features.NAMES[2], features.NAMES[7], "score"}
    assert found.missing["BTCUSDT.SIM"][features.NAMES[7]] == 1
    assert found.missing["BTCUSDT.SIM"][features.NAMES[2]] == 0


def test_the_same_state_of_the_market_counts_once_and_too_few_say_nothing() -> None:
    rows, scores = market(20, 5), uniform(20)
    found = summarise(packets(rows, scores) * 50, known(learnt(market(8_000, 6))))
    assert (found.decisions, found.rows) == (1_000, 20)
    assert all(one.limit is None for one in found.drifts)
    assert found.drifted == ()


def test_without_scores_or_model_it_says_why() -> None:
    rows = packets(market(40, 7), uniform(40))
    assert summarise([], known({})).problem == "no decision was scored by a model"
    for packet in rows:
        packet.decision.model_version = "v2"
    assert summarise(rows, known({})).problem == "no archive of model version v2"


def test_decisions_without_features_count_as_missing() -> None:
    empty = packet_pb2.DecisionPacket()
    empty.order.instrument = "ETHUSDT.SIM"
    found = summarise([empty], known({}))
    assert set(found.missing["ETHUSDT.SIM"].values()) == {1.0}


def test_a_comparison_is_told_in_the_words_of_the_contract() -> None:
    found = summarise(packets(market(600, 8), uniform(600)), known(learnt(market(2_000, 9))))
    told = drift_status(found)
    assert (told.model_version, told.problem, told.rows) == (found.model_version, "", 600)
    for one, feature in zip(told.features, found.drifts, strict=True):
        assert (one.name, one.psi, one.undefined) == (feature.name, feature.psi, feature.undefined)
        assert (one.limit if one.HasField("limit") else None, one.drifted) == (feature.limit, feature.drifted)
    assert len(told.windows) > 1
    for part, window in zip(told.windows, found.windows, strict=True):
        assert (part.since.ToNanoseconds(), part.rows) == (window.since_ns, window.rows)
        assert dict(zip([one.name for one in told.features], part.psi, strict=True)) == dict(window.psi)


async def test_comparisons_that_are_switched_off_do_not_end_the_component_and_the_server_with_it() -> None:
    task = Task(journal=Path("nowhere"), database_url="sqlite://", model_store=None)
    nobody = Reading("drift", ReadingProcess("reads", task))
    watching = asyncio.create_task(DriftWatch(nobody, DriftSettings(interval_seconds=0), dict).run())
    done, _ = await asyncio.wait((watching,), timeout=0.05)
    assert not done
    watching.cancel()


def test_references_are_those_of_the_metadata() -> None:
    assert set(references_of(learnt(market(100, 1)))) == {*features.NAMES, "score"}


def test_a_model_of_another_set_is_compared_by_what_it_scored() -> None:
    names = ("spread_bps", "momentum")
    learnt_from, scored = (np.random.default_rng(seed).normal(size=(n, 2)) for seed, n in ((14, 8_000), (15, 1_500)))
    scored[:, 1] += 0.5
    histograms = {
        name: asdict(reference_histogram(learnt_from[:, i], sampled(learnt_from.astype(np.float32))))
        for i, name in enumerate(names)
    }
    found = packets(market(1_500, 13) + 3, uniform(1_500))
    for packet, row in zip(found, scored, strict=True):
        packet.scored_input, packet.scored_feature_set = row.astype("<f4").tobytes(), "numbers/1f0c83aa"
    told = summarise(found, known({"feature_names": list(names), "reference": histograms}))
    assert (told.problem, [one.name for one in told.drifts]) == ("", list(names))
    assert [one.name for one in told.drifted] == ["momentum"]
    found[7].scored_input = bytes(4)
    told = summarise(found, known({"feature_names": list(names), "reference": histograms}))
    assert told.problem == "model v1 takes other features than its decisions say"


def test_what_callers_bring_is_compared_order_by_order_but_is_no_more_evidence_than_its_instant() -> None:
    names, states, each = ("spread_bps", "urgency"), 300, 5
    learnt_from = np.random.default_rng(14).uniform(size=(8_000, 2)).astype(np.float32)
    histograms = {
        name: asdict(reference_histogram(learnt_from[:, i], sampled(learnt_from))) for i, name in enumerate(names)
    }
    found = [packet for packet in packets(market(states, 13), uniform(states)) for _ in range(each)]
    found = [packet_pb2.DecisionPacket.FromString(packet.SerializeToString()) for packet in found]
    urgencies = np.random.default_rng(15).uniform(size=len(found)).astype(np.float32)
    for number, (packet, urgency) in enumerate(zip(found, urgencies, strict=True)):
        packet.decision.decision_id += f"-{number}"
        packet.features.event_time_ns = packet.decision.decided_at.ToNanoseconds()
        packet.order.features.feature_set_id = "numbers"
        packet.order.features.values.extend([np.nan, urgency])
        row = np.array([learnt_from[number // each, 0], urgency], dtype="<f4")
        packet.scored_input, packet.scored_feature_set = row.tobytes(), "numbers/1f0c83aa"
    about = {"feature_names": list(names), "reference": histograms}
    told = summarise(found, known(about))
    assert (told.rows, told.drifted) == (states * each, ())
    assert [one.independent for one in told.drifts] == [states] * 2
    assert told.drifts[1].psi < 0.1, "all that callers brought, and not the first of each instant"
    for packet in found[1::each]:
        packet.order.features.CopyFrom(found[0].order.features)
    for packet in found:
        packet.features.sequence = 1
    repeated = summarise(found, known(about))
    assert repeated.rows == len(found) - states, "the same features in the same state of the market count once"


def test_of_a_model_of_another_set_ages_are_not_judged_and_what_is_missing_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aged = FeatureSet(
        "aged",
        (
            Feature("imbalance_l1", "", "Copied.", -1.0, 1.0, signed=True, source="mf1"),
            Feature("halt_age_ms", "ms", "Since the last halt.", lowest=0.0, is_age=True, source=CALLER),
        ),
    )
    learnt_from = np.random.default_rng(14).uniform(-1, 1, size=(8_000, 2))
    scored = np.random.default_rng(15).uniform(-1, 1, size=(1_500, 2))
    scored[:, 1] += 5
    scored[::4, 1] = np.nan
    histograms = {
        name: asdict(reference_histogram(learnt_from[:, i], sampled(learnt_from.astype(np.float32))))
        for i, name in enumerate(aged.names)
    }
    found = packets(market(1_500, 13), uniform(1_500))
    for packet, row in zip(found, scored, strict=True):
        packet.scored_input, packet.scored_feature_set = row.astype("<f4").tobytes(), aged.version
    elsewhere = packets(market(3, 13), uniform(3))
    for packet in elsewhere:
        packet.order.instrument, packet.decision.model_version = "ETHUSDT.SIM", "v0"
    about = {"feature_names": list(aged.names), "feature_set_fingerprint": aged.fingerprint, "reference": histograms}
    know(monkeypatch, Registered(aged, None, "the tests"))
    told = summarise(found + elsewhere, known(about), "v1")
    assert [one.name for one in told.drifts if one.not_judged] == ["halt_age_ms"]
    assert told.drifted == ()
    assert {name: shares.get("halt_age_ms") for name, shares in told.missing.items()} == {
        "BTCUSDT.SIM": pytest.approx(0.25),
        "ETHUSDT.SIM": None,
    }
    assert all(shares["spread_bps"] == 0 for shares in told.missing.values())
    write_report(tmp_path / "report.html", told, {})
    assert "<!-- halt_age_ms -->" in (tmp_path / "report.html").read_text().split("Missing values")[1]


def test_after_a_change_of_model_only_what_the_champion_scored_is_compared() -> None:
    before = packets(market(1_000, 10) + 3, uniform(1_000), version="v0")
    after = packets(market(900, 11), uniform(900))
    for packet in after:
        packet.decision.decision_id = f"z{packet.decision.decision_id}"  # made after all others
        packet.features.sequence += 5_000
    found = summarise(before + after, known(learnt(market(8_000, 12))))
    assert (found.model_version, found.decisions, found.rows, dict(found.others)) == ("v1", 1_900, 900, {"v0": 1_000})
    assert found.drifted == (), "the inputs of its predecessor are not its own"
    other = summarise(before + after, known(learnt(market(8_000, 12))), "v0")
    assert (other.model_version, other.problem) == ("v0", "no archive of model version v0")


def test_a_canary_is_compared_when_it_is_asked_for_and_is_no_champion() -> None:
    canary = packets(market(200, 1), uniform(200))
    for packet in canary:
        packet.decision.source = pb.SOURCE_CANARY
    assert summarise(canary, known(learnt(market(2_000, 2)))).problem == "no decision was scored by a model"
    found = summarise(canary, known(learnt(market(2_000, 2))), "v1")
    assert (found.rows, found.problem) == (200, "")


def said_of(folder: Path, *arguments: str) -> str:
    """What the command says of a journal."""
    given = ["drift", "--journal", str(folder / "journal.db"), "--models", str(folder), *arguments]
    return CliRunner().invoke(commands, given, env={"COLUMNS": "200"}).output


def write_journal(folder: Path, written: Iterable[tuple[int, packet_pb2.DecisionPacket]]) -> None:
    """Writes decisions to a journal: each with the milliseconds after the first at which it was made."""
    entries = []
    for number, (at_ms, packet) in enumerate(written):
        packet.decision.decided_at.FromMilliseconds(1_700_000_000_000 + at_ms)
        made = id_bound(packet.decision.decided_at.ToDatetime(dt.UTC))
        packet.decision.decision_id = f"{made}-7000-8000-{number:012}"
        entries.append(packet_pb2.JournalEntry(decision=packet).SerializeToString())
    with closing(JournalFile(folder / "journal.db", sync_commits=False)) as journal:
        journal.append(entries)


def test_of_several_models_the_command_compares_the_one_that_is_named(tmp_path: Path) -> None:
    ours, theirs = (packets(market(9, 1), uniform(9), version=letter * 16) for letter in "ab")
    for packet in theirs:
        packet.chosen_model = "desk"
    write_journal(tmp_path, ((1_000 * second, packet) for second, packet in enumerate([*theirs, *ours])))
    by_newest = said_of(tmp_path)
    assert by_newest.startswith("model aaaaaaaaaaaaaaaa: 18 decisions looked at, 9 different"), by_newest
    by_version, by_name = said_of(tmp_path, "--model", "b" * 16), said_of(tmp_path, "--model", "desk")
    assert by_version.startswith("model bbbbbbbbbbbbbbbb: 18 decisions looked at, 9 different"), by_version
    assert by_name.startswith("model bbbbbbbbbbbbbbbb: 9 decisions looked at, 9 different"), by_name
    default = said_of(tmp_path, "--model", "default")
    assert default.startswith("model aaaaaaaaaaaaaaaa: 9 decisions looked at, 9 different"), default
    unknown = said_of(tmp_path, "--model", "scalper")
    assert "of the 18 decisions that were looked at none was of a model 'scalper': " in unknown


def test_a_model_of_few_orders_is_compared_by_all_of_them_that_the_limit_allows(tmp_path: Path) -> None:
    """A sample of every model's decisions has one of its own in a second; so many of them would say nothing."""
    ours = packets(market(480, 1), uniform(480), version="a" * 16)
    theirs = packets(market(30, 2), uniform(30), version="b" * 16)
    for packet in theirs:
        packet.chosen_model = "desk"
    busy = [(1_000 * (number // 4) + number % 4, packet) for number, packet in enumerate(ours)]
    rare = [(4_000 * number + (500 if number == 9 else 0), packet) for number, packet in enumerate(theirs)]
    write_journal(tmp_path, sorted([*rare, *busy], key=lambda one: one[0]))
    begin, end = (dt.datetime.fromtimestamp(1_700_000_000 + second, dt.UTC).isoformat() for second in (0, 120))
    said = said_of(tmp_path, "--model", "desk", "--limit", "120", "--since", begin, "--until", end)
    assert said.startswith("model bbbbbbbbbbbbbbbb: 30 decisions looked at, 30 different"), said


async def test_the_server_compares_two_models_of_one_version_by_the_orders_of_each(tmp_path: Path) -> None:
    ours, theirs = packets(market(40, 1), uniform(40)), packets(market(9, 2), uniform(9))
    for packet in theirs:
        packet.chosen_model = "desk"
    now_ms = time.time_ns() // 10**6 - 1_700_000_000_000
    write_journal(
        tmp_path, ((now_ms - 60_000 + 1_000 * second, packet) for second, packet in enumerate([*ours, *theirs]))
    )
    task = Task(journal=tmp_path / "journal.db", database_url=f"sqlite:///{tmp_path / 'audit.db'}", model_store=None)
    reader = ReadingServicer(task)

    async def rows_of(name: str) -> int:
        request = reading_pb2.CompareDriftRequest(
            window_seconds=900, max_decisions=2_000, model_version="v1", model_name=name
        )
        return (await reader.CompareDrift(request, Call(None, ()))).rows

    assert [await rows_of(name) for name in ("default", "desk", "nobody")] == [40, 9, 0]


async def test_the_server_asks_for_each_model_by_its_name_and_the_version_that_decides() -> None:
    asked: list[tuple[str, str]] = []

    class Recorder(Reading):
        async def ask(self, question: Question, request: bytes) -> bytes:
            wanted = reading_pb2.CompareDriftRequest.FromString(request)
            asked.append((wanted.model_name, wanted.model_version))
            return b""

    task = Task(journal=Path("nowhere"), database_url="sqlite://", model_store=None)
    reading = Recorder("drift", ReadingProcess("reads", task))
    champions = {"default": "v1", "desk": "v1", "new": ""}
    watch = DriftWatch(reading, DriftSettings(interval_seconds=0.001), lambda: champions)
    watching = asyncio.create_task(watch.run())
    await until(lambda: len(asked) >= 2)
    watching.cancel()
    assert asked[:2] == [("default", "v1"), ("desk", "v1")]


def test_ages_are_shown_and_not_judged_because_training_knows_nothing_of_the_way_to_the_server() -> None:
    rows = market(1_500, 3)
    rows[:, list(features.MF1.ages)] += 5
    found = summarise(packets(rows, uniform(1_500)), known(learnt(market(8_000, 4))))
    ages = [one for one in found.drifts if one.not_judged]
    assert {one.name for one in ages} == {"book_age_ms", "trade_age_ms"}
    assert all(one.psi > 1 and one.limit is None and not one.too_few for one in ages)
    assert found.drifted == ()


def test_another_mixture_of_the_same_instruments_is_no_drift() -> None:
    rows = market(4_000, 5)
    both = sampled(rows)
    both.instrument[1::2] = 1
    rows[1::2] += 4  # the second instrument is another market
    both = replace(both, instruments=("BTCUSDT.SIM", "ETHUSDT.SIM"))
    histograms = {name: asdict(reference_histogram(rows[:, i], both)) for name, i in features.INDEX.items()}
    first = summarise(packets(market(1_500, 6), uniform(1_500)), known({"reference": histograms}))
    assert first.drifted == ()
    second = packets(market(1_500, 7), uniform(1_500), "ETHUSDT.SIM")
    drifted = summarise(second, known({"reference": histograms})).drifted
    assert len(drifted) == len(features.MF1) - len(features.MF1.ages)


@pytest.mark.long
@pytest.mark.parametrize("memory_seconds", [1.0, 30.0])
def test_a_slow_market_without_drift_raises_no_false_alarm(memory_seconds: float) -> None:
    """Ten minutes to learn from, a quarter of an hour to compare, as on a new stack: values with a long memory."""
    reports = 8
    steps = memory_seconds / (STEP_NS / 1e9)
    seconds = np.arange(0, 900, 0.6)
    alarms, independent = 0, []
    for report in range(reports):
        rows = np.empty((3_000, features.N_FEATURES), np.float32)
        now = np.empty((len(seconds), features.N_FEATURES), np.float32)
        for i in range(features.N_FEATURES):
            seed = 1_000 * report + 2 * i
            rows[:, i] = markov(3_000, steps, seed)
            now[:, i] = markov(4_500, steps, seed + 1)[(seconds * 5).astype(int)]
        found = packets(now, uniform(len(now)))
        for packet, at in zip(found, seconds, strict=True):
            packet.features.event_time_ns = 1_700_000_000_000_000_000 + round(at * 1e9)
        summary = summarise(found, known(learnt(rows)))
        alarms += any(one.name != "score" for one in summary.drifted)
        independent += [one.independent for one in summary.drifts if one.name != "score"]
    assert not alarms, f"{alarms} of {reports} reports, of which one in a hundred may be wrong"
    assert np.median(independent) == pytest.approx(900 / (2 * memory_seconds), rel=0.5)


@pytest.mark.long
@pytest.mark.parametrize(("memory_seconds", "window_seconds"), [(0.5, 900.0), (5.0, 900.0), (30.0, 3_600.0)])
def test_false_alarms_are_rare_and_a_shift_is_seen_in_a_market_with_a_memory(
    memory_seconds: float, window_seconds: float
) -> None:
    """As a busy server samples: 16 decisions within milliseconds, 120 times. One in a hundred may be wrong."""
    found = rates(np.random.default_rng(1), 60, memory_seconds, window_seconds)
    assert found.false_alarms <= 0.02
    assert found.judged >= 0.9
    if memory_seconds <= 5.0:
        assert found.found >= 0.9
    assert found.independent == pytest.approx(min(120, window_seconds / (2 * memory_seconds)), rel=0.35)


def test_the_picture_over_time_leaves_room_for_what_is_judged(tmp_path: Path) -> None:
    rows = market(600, 3)
    rows[:, 2] += 1
    rows[:, list(features.MF1.ages)] += 1_000
    write_report(tmp_path / "drift.html", summarise(packets(rows, uniform(600)), known(learnt(market(4_000, 4)))), {})
    picture = (tmp_path / "drift.html").read_text().partition("PSI over time")[2].partition("<h2>")[0]
    assert f"<!-- {features.NAMES[2]} -->" in picture
    assert [name for name in ("book_age_ms", "trade_age_ms") if f"<!-- {name} -->" in picture] == []


@pytest.mark.parametrize("compared", [True, False])
def test_the_report_is_one_page_that_stands_by_itself(tmp_path: Any, compared: bool) -> None:
    rows = market(600, 3)
    rows[:, 2] += 1
    found = summarise(packets(rows, uniform(600)), known(learnt(market(4_000, 4)))) if compared else Summary(0, 0, 0, 0)
    labelled = quality(
        [LabelledDecision("TRADE", "PRIMARY", 0.7, True), LabelledDecision("NO_TRADE", "PRIMARY", 0.2, False)]
    )
    of_rules = quality([LabelledDecision("NO_TRADE", "RULES", None, False)])
    write_report(tmp_path / "drift.html", found, {"all": labelled, "RULES": of_rules})
    page = (tmp_path / "drift.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == (3 if compared else 1)
    assert (f"class=drifted><td>{features.NAMES[2]}" in page) == compared
    assert "http-equiv" not in page
    assert "src=" not in page
    assert "RULES: 1 labelled; of what callers heard as TRADE, precision – at coverage 0.000; Brier –" in page


def with_regimes(count: int, eligible: Mapping[str, bool] | None = None) -> tuple[Summary, dict[str, bool]]:
    """A report on decisions a third of which each regime holds, and the labels of all of them.

    Every second decision is TRADE; in the calm regime all are eligible, in the others every second TRADE is.
    """
    rows = market(count, 3)
    rows[:, features.INDEX["rv_30s_bps"]] = np.tile([1.0, 2.0, 3.0], count)[:count]
    made = packets(rows, uniform(count))
    labels = {}
    for number, packet in enumerate(made):
        packet.decision.action = pb.ACTION_TRADE if number // 3 % 2 else pb.ACTION_NO_TRADE
        labels[packet.decision.decision_id] = number % 3 == 0 or number // 6 % 2 == 0
    edges = [np.sqrt(5 * 2.5 / 30), np.sqrt(5 * 6.5 / 30)]  # between the volatilities of 1, 2 and 3 bps in 30 s
    forecast = {"intercept": 0.0, "weights": [0.0, 0.0, 1.0], "edges": edges}
    metadata = learnt(market(4_000, 4)) | {"volatility_forecast": forecast}
    return summarise(made, known(metadata), "", labels if eligible is None else eligible), labels


def test_precision_and_coverage_are_told_by_the_volatility_that_was_forecast() -> None:
    found, _ = with_regimes(1_200)
    assert [one.name for one in found.regimes] == ["calm", "usual", "restless"]
    assert [one.inputs for one in found.regimes] == [400, 400, 400]
    assert [one.share for one in found.regimes] == pytest.approx([1 / 3] * 3)
    assert [one.coverage for one in found.regimes] == [0.5] * 3
    assert [one.labelled for one in found.regimes] == [200, 200, 200]
    assert [one.precision for one in found.regimes] == [1.0, 0.5, 0.5]


def test_without_labels_no_precision_is_told_and_without_a_forecast_no_regime() -> None:
    found, _ = with_regimes(600, {})
    assert [(one.labelled, one.precision) for one in found.regimes] == [(0, None)] * 3
    assert summarise(packets(market(60, 3), uniform(60)), known(learnt(market(400, 4)))).regimes == ()
    broken = learnt(market(400, 4)) | {"volatility_forecast": {"intercept": 0.0}}
    said = summarise(packets(market(60, 3), uniform(60)), known(broken))
    assert "says nothing of what it learnt from that can be compared" in said.problem


def test_regimes_are_in_both_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = with_regimes(1_200)
    write_report(tmp_path / "drift.html", found, {})
    page = (tmp_path / "drift.html").read_text()
    assert "<tr><td>restless<td>400<td>33.3%<td>0.500<td>200<td>0.500</tr>" in page
    print_report(found)
    printed = " ".join(capsys.readouterr().out.split())
    assert "restless 400 33.3% 33.3% 0.500 200 0.500" in printed


def few(name: str) -> Drift:
    return Drift(name, 1.25, None, 12, 3_456, 0.0, 0.0)


@pytest.mark.parametrize("width", [60, 80])
def test_a_report_for_people_names_every_feature_whole_and_ends_with_its_verdict(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    drifts = tuple(few(name) for name in features.NAMES)
    reports = {
        "nothing could be judged": drifts,
        "nothing drifted, of 1 that could be judged": (*drifts, replace(few("score"), limit=2.0)),
        "drifted: score": (*drifts, replace(few("score"), limit=0.5)),
    }
    for verdict, found in reports.items():
        print_report(Summary(100, 50, 0, 0, "aa" * 8, drifts=found))
        lines = capsys.readouterr().out.splitlines()
        assert set(features.NAMES) <= set(" ".join(lines).split())
        assert "…" not in "".join(lines)
        assert max(map(len, lines)) <= width
        assert lines[-1] == verdict
