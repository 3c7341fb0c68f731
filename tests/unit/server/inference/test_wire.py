"""The bytes between pretrade and its handler: right answers are read, anything else is a bad answer."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_cache import features
from server.inference import wire
from server.inference.outcome import BatchFailedError, Outcome

HEADER = struct.Struct("<4sI8sfIQ")
float32s = st.floats(width=32, allow_nan=True, allow_infinity=True)


def packed(
    scores: list[float],
    *,
    magic: bytes = b"PTS1",
    rows: int | None = None,
    version: bytes = bytes(8),
    threshold: float = 0.5,
    fingerprint: int = features.MF1.fingerprint,
    expires_at: int = 0,
) -> bytes:
    header = HEADER.pack(magic, len(scores) if rows is None else rows, version, threshold, fingerprint, expires_at)
    return header + np.array(scores, dtype="<f4").tobytes()


def of_parts(scores: list[float], weights: list[float], parts: list[list[float]]) -> bytes:
    """The answer of an ensemble."""
    described = b"".join(struct.pack("<8sd", bytes([place]) * 8, weight) for place, weight in enumerate(weights))
    said = np.array(parts, dtype="<f4").tobytes()
    return packed(scores, magic=b"PTS2") + struct.pack("<I", len(weights)) + described + said


def test_what_the_parts_of_an_ensemble_say_is_read_back() -> None:
    said = [[0.5, 0.25], [0.0, 1.0], [float("nan"), 0.5]]
    batch = wire.parse_answer("champion", 3, of_parts([0.5, 0.25, float("nan")], [0.75, -2.5], said))
    assert batch.model.parts == (("00" * 8, 0.75), ("01" * 8, -2.5))
    np.testing.assert_array_equal(batch.scores, np.array([0.5, 0.25, np.nan], dtype=np.float32))
    assert batch.of_parts is not None
    np.testing.assert_array_equal(batch.of_parts, np.array(said, dtype=np.float32))


@given(
    scores=st.lists(float32s, min_size=1, max_size=64),
    version=st.binary(min_size=8, max_size=8),
    threshold=st.floats(0, 1, width=32),
    expires_at=st.integers(0, 2**63 - 1),
)
def test_a_right_answer_is_read_back(scores: list[float], version: bytes, threshold: float, expires_at: int) -> None:
    batch = wire.parse_answer(
        "champion", len(scores), packed(scores, version=version, threshold=threshold, expires_at=expires_at)
    )
    assert batch.model == wire.ModelIdentity("champion", version.hex(), threshold, expires_at)
    assert batch.scores.dtype == np.float32
    np.testing.assert_array_equal(batch.scores, np.array(scores, dtype=np.float32))


@given(answer=st.binary(max_size=200), n_rows=st.integers(1, 40))
def test_garbage_is_a_bad_answer_and_nothing_else(answer: bytes, n_rows: int) -> None:
    with pytest.raises(BatchFailedError) as caught:
        wire.parse_answer("champion", n_rows, answer)
    assert caught.value.outcome is Outcome.BAD_ANSWER


@given(data=st.data(), scores=st.lists(float32s, min_size=1, max_size=8), parts=st.integers(0, 2))
def test_a_changed_byte_gives_a_bad_answer_or_well_formed_scores(
    data: st.DataObject, scores: list[float], parts: int
) -> None:
    answer = bytearray(of_parts(scores, [0.5] * parts, [[0.5] * parts] * len(scores)) if parts else packed(scores))
    position = data.draw(st.integers(0, len(answer) - 1))
    answer[position] ^= data.draw(st.integers(1, 255))
    try:
        batch = wire.parse_answer("champion", len(scores), bytes(answer))
    except BatchFailedError as failure:
        outcome = failure.outcome
    else:
        outcome = Outcome.SUCCESS
        assert batch.scores.shape == (len(scores),)
        assert (batch.of_parts is None) == (parts == 0)
        assert 0 <= batch.model.threshold <= 1
    assert outcome in (Outcome.SUCCESS, Outcome.BAD_ANSWER)


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (b"", "0 bytes"),
        (b"NaN", "3 bytes"),
        (b'{"code": 503}', "13 bytes"),
        (packed([0.5, 0.5])[:-1], "39 bytes"),
        (packed([0.5, 0.5]) + b"\0", "41 bytes"),
        (packed([0.5]), "36 bytes"),
        (packed([0.5, 0.5], magic=b"PTS3"), "magic"),
        (packed([0.5, 0.5], magic=b"PTS2"), "40 bytes for 2 rows of 0 parts"),
        (of_parts([0.5, 0.5], [], []), "44 bytes for 2 rows of 0 parts"),
        (of_parts([0.5, 0.5], [0.5], [[0.5], [0.5]])[:-1], "67 bytes for 2 rows of 1 parts"),
        (of_parts([0.5, 0.5], [0.5], [[0.5], [0.5]]) + b"\0", "69 bytes for 2 rows of 1 parts"),
        (of_parts([0.5, 0.5], [0.5] * 13, [[0.5] * 13] * 2), "of 13 parts"),
        (of_parts([0.5, 0.5], [0.5], [[0.5], [float("nan")]]), "a score of a part is not from 0 to 1"),
        (of_parts([0.5, 0.5], [0.5], [[1.5], [0.5]]), "a score of a part is not from 0 to 1"),
        (of_parts([0.5, 0.5], [float("inf")], [[0.5], [0.5]]), "or a weight is not finite"),
        (packed([0.5, 0.5], rows=3), "3 rows"),
        (packed([0.5, 0.5], fingerprint=features.MF1.fingerprint ^ 1), "feature set"),
        (packed([0.5, 0.5], threshold=float("nan")), "threshold nan"),
        (packed([0.5, 0.5], threshold=1.5), "threshold 1.5"),
        (packed([0.5, 0.5], threshold=-0.5), "threshold -0.5"),
        (packed([0.5, 0.5], expires_at=2**63), "expires at 9223372036854775808"),
    ],
)
def test_a_wrong_answer_says_what_is_wrong(answer: bytes, what: str) -> None:
    with pytest.raises(BatchFailedError, match=what) as caught:
        wire.parse_answer("champion", 2, answer)
    assert caught.value.outcome is Outcome.BAD_ANSWER


def test_a_request_is_the_rows_one_after_the_other() -> None:
    rows = [bytes([number]) * features.MF1.row_bytes for number in (1, 2, 3)]
    message = wire.request("champion", rows)
    assert message.model_name == "champion"
    assert dict(message.input) == {"input": b"".join(rows), "feature_set": f"{features.MF1.fingerprint:08x}".encode()}
