"""What crosses between a worker and the process of a set comes out as it went in, however it is cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_cache.worker.set_messages import (
    Answer,
    Batch,
    Entry,
    Failed,
    MessageError,
    Messages,
    Progress,
    Ready,
    Vector,
    answer_of,
    batch_of,
    packed,
    packed_batch,
)

NUMBERS = st.integers(0, 2**32 - 1)
ENTRIES = st.lists(st.builds(Entry, NUMBERS, st.booleans(), st.binary(max_size=40)), max_size=5)


def bodies(data: bytes) -> list[bytes]:
    return Messages().take(data)


@given(ENTRIES, st.lists(NUMBERS, max_size=5))
def test_a_batch_is_read_as_it_was_written(entries: list[Entry], wanted: list[int]) -> None:
    (body,) = bodies(packed_batch(Batch(entries, wanted)))
    read = batch_of(body)
    assert (list(read.entries), list(read.wanted)) == (entries, wanted)


@pytest.mark.parametrize(
    "answer", [Ready(0xFFFFFFFF), Progress(7, 3, 1.25), Failed("impossible", "flow is 2, not from -1 to 1 €")]
)
def test_an_answer_is_read_as_it_was_written(answer: Answer) -> None:
    (body,) = bodies(packed(answer))
    assert answer_of(body, 2) == answer


def test_values_keep_their_bits() -> None:
    rows = [np.array(row, dtype=np.float32) for row in ([1.5, math.nan], [-0.0, 3.4e38])]
    (body,) = bodies(packed(Progress(7, 3, 1.25, tuple(Vector(3, place, row) for place, row in enumerate(rows)))))
    read = answer_of(body, 2)
    assert isinstance(read, Progress)
    assert [(one.batch, one.engine, one.values.tobytes()) for one in read.vectors] == [
        (3, place, row.tobytes()) for place, row in enumerate(rows)
    ]


@given(st.lists(st.integers(1, 30)))
def test_messages_are_whole_however_they_are_cut(cuts: list[int]) -> None:
    answers: list[Answer] = [Ready(1), Failed("raised", "KeyError('a')"), Progress(1, 2, 3.0), Ready(2)]
    data, messages = b"".join(map(packed, answers)), Messages()
    read = []
    for cut in (*cuts, len(data)):
        read += messages.take(data[:cut])
        data = data[cut:]
    assert [answer_of(one, 1) for one in read] == answers


@pytest.mark.parametrize("body", [b"", b"\x00", b"\x02short", b"\x09" * 40, packed(Progress(1, 1, 0.0))[4:] + b"x"])
def test_what_is_no_answer_is_refused(body: bytes) -> None:
    with pytest.raises(MessageError):
        answer_of(body, 3)


def test_a_length_that_nobody_sends_is_refused_before_anything_is_kept() -> None:
    with pytest.raises(MessageError, match="4294967295"):
        Messages().take(b"\xff\xff\xff\xff")
