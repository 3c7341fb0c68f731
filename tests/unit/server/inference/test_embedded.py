"""The embedded scorer gives the scores of the archive's own handler, to the last bit, or none at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from feature_cache import features
from server.inference import embedded
from server.inference.embedded import EmbeddedScorer
from server.inference.embedded_margins import CannotScoreError
from server.models.archive import Archive, read_archive
from server.models.registry import record_of
from torchserve.brought.adding import Adding
from torchserve.brought.combining import Part, combine
from torchserve.handler import calibrated, margin_of

Rows = NDArray[np.float32]
TOLERANCE = 1e-6
FEATURES = st.one_of(
    st.floats(-4, 4, width=32), st.floats(allow_infinity=False, allow_nan=True, width=32, allow_subnormal=False)
)


class Handler:
    """What the archive's handler computes, without the process that it is made for."""

    def __init__(self, archive: Archive) -> None:
        metadata = json.loads(archive.files["metadata.json"])
        self._slope, self._intercept = metadata["calibration"]["slope"], metadata["calibration"]["intercept"]
        self._margin = margin_of(metadata, archive.files["weights.bin"])

    def scores(self, rows: Rows) -> Rows:
        return calibrated(self._margin(rows), self._slope, self._intercept)


@pytest.fixture(scope="module")
def archive(model_store: Path) -> Archive:
    return read_archive(model_store / "champion.mar")


@pytest.fixture(scope="module")
def network(model_store: Path) -> Archive:
    return read_archive(model_store / "challenger.mar")


@pytest.fixture(scope="module")
def in_torch(network: Archive) -> Handler:
    return Handler(network)


@pytest.fixture(scope="module")
def in_onnx(network: Archive) -> EmbeddedScorer:
    return scorer_of(network)


@pytest.fixture(scope="module")
def handler(archive: Archive) -> Handler:
    return Handler(archive)


@pytest.fixture(scope="module")
def scorer(archive: Archive) -> EmbeddedScorer:
    return scorer_of(archive)


def scorer_of(archive: Archive, weights: bytes | None = None, **changes: Any) -> EmbeddedScorer:
    metadata = json.loads(archive.files["metadata.json"]) | changes
    given = archive.files["weights.bin"] if weights is None else weights
    return EmbeddedScorer("champion", archive.version, json.dumps(metadata).encode(), given)


def packed(rows: Rows) -> bytes:
    return rows.astype("<f4").tobytes()


def test_it_says_of_itself_what_the_archive_says(archive: Archive, scorer: EmbeddedScorer) -> None:
    record = record_of(archive, 0.0)
    assert (scorer.name, scorer.version, scorer.expires_at) == ("champion", archive.version, record.expires_at)
    assert scorer.threshold == np.float32(record.threshold), "compared as the float32 that a replica sends"


def test_the_reference_scores_come_out(archive: Archive, scorer: EmbeddedScorer) -> None:
    record = record_of(archive, 0.0)
    scores = scorer.scores(packed(record.canned_rows))
    assert np.max(np.abs(scores - record.canned_scores)) <= TOLERANCE
    assert [scorer.scores(packed(row))[0] for row in record.canned_rows] == scores.tolist()


@pytest.mark.parametrize("count", [1, 2, 64, 255, 256, 257, 1_000])
def test_any_number_of_rows_is_scored_as_each_alone(scorer: EmbeddedScorer, handler: Handler, count: int) -> None:
    rows = np.random.default_rng(count).normal(size=(count, features.N_FEATURES)).astype(np.float32)
    rows[np.random.default_rng(1).random(rows.shape) < 0.1] = np.nan
    scores = scorer.scores(packed(rows))
    assert scores.dtype == np.float32
    assert np.array_equal(scores, handler.scores(rows))
    assert [scorer.scores(packed(row))[0] for row in rows[:70]] == scores[:70].tolist()


@given(
    rows=arrays.arrays(
        np.float32, st.tuples(st.integers(1, 3), st.just(features.N_FEATURES)), elements=FEATURES, fill=st.nothing()
    )
)
def test_whatever_the_rows_hold_the_scores_are_the_handlers(
    scorer: EmbeddedScorer, handler: Handler, rows: Rows
) -> None:
    theirs = handler.scores(rows)
    ours = scorer.scores(packed(rows))
    assert np.max(np.abs(ours - theirs)) <= TOLERANCE
    assert np.array_equal(ours, theirs), "the same function of the same library"


def test_models_in_one_process_do_not_mix(archive: Archive, scorer: EmbeddedScorer) -> None:
    other = scorer_of(archive, calibration={"slope": 0.5, "intercept": 1.0})
    row = packed(np.zeros((1, features.N_FEATURES), dtype=np.float32))
    before = scorer.scores(row)[0]
    assert other.scores(row)[0] != before
    assert scorer.scores(row)[0] == before


@pytest.mark.parametrize("rows", [b"", b"\0" * 3, b"\0" * 99, b"\0" * 101])
def test_what_is_not_whole_rows_is_refused(scorer: EmbeddedScorer, rows: bytes) -> None:
    with pytest.raises(CannotScoreError, match="are not rows of"):
        scorer.scores(rows)


@pytest.mark.long
@given(
    rows=arrays.arrays(
        np.float32, st.tuples(st.integers(1, 3), st.just(features.N_FEATURES)), elements=FEATURES, fill=st.nothing()
    )
)
def test_a_network_that_torch_serves_scores_here_as_there(
    in_onnx: EmbeddedScorer, in_torch: Handler, rows: Rows
) -> None:
    assert np.max(np.abs(in_onnx.scores(packed(rows)) - in_torch.scores(rows))) <= TOLERANCE


def test_a_network_gives_its_reference_scores_whole_and_in_an_ensemble(network: Archive, archive: Archive) -> None:
    record, scorer = record_of(network, 0.0), scorer_of(network)
    scores = scorer.scores(packed(record.canned_rows))
    assert np.max(np.abs(scores - record.canned_scores)) <= TOLERANCE
    parts = [
        Part(one.version, json.loads(one.files["metadata.json"]), one.files["weights.bin"], 1.0)
        for one in (archive, network)
    ]
    together = combine("mean", parts, None, Adding(features.MF1, threshold=0.5))
    ensemble = EmbeddedScorer("champion", "ee" * 8, json.dumps(together.metadata).encode(), together.weights)
    of_parts = ensemble.scores_and_parts(packed(record.canned_rows))[1]
    assert of_parts is not None
    assert np.array_equal(of_parts[:, 1], scores)


def test_what_cannot_be_scored_here_is_refused(network: Archive, archive: Archive) -> None:
    with pytest.raises(CannotScoreError, match="not scored in the server's process"):
        scorer_of(network, onnx=None)
    with pytest.raises(CannotScoreError, match="is not known here: mf1"):
        scorer_of(archive, feature_set_fingerprint=features.MF1.fingerprint ^ 1)
    with pytest.raises(CannotScoreError, match="incomplete"):
        scorer_of(archive, calibration={})
    with pytest.raises(CannotScoreError, match="no time"):
        scorer_of(archive, expires_at=2**63)
    with pytest.raises(CannotScoreError, match="incomplete"):
        EmbeddedScorer("champion", archive.version, b"no JSON", archive.files["weights.bin"])
    with pytest.raises(CannotScoreError, match="XGBoost: "):
        scorer_of(archive, weights=b"no trees")


def test_without_xgboost_there_is_no_scorer(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    assert embedded.problem_of_library() == ""
    monkeypatch.setattr(embedded, "_library_path", lambda: None)
    assert embedded.problem_of_library() == "", "ONNX Runtime is there"
    monkeypatch.setattr(embedded, "has_onnx", lambda: False)
    assert "is not installed" in embedded.problem_of_library()
    with pytest.raises(CannotScoreError, match="is not installed"):
        scorer_of(archive)
