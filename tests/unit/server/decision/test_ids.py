from __future__ import annotations

import datetime as dt
import os
import uuid

import pytest

from server.decision.ids import made_at, uuid7_source

MILLISECOND = 1_000_000


def test_an_id_is_a_uuid_of_version_7_that_holds_the_time() -> None:
    now_ns = 1_700_000_000_123 * MILLISECOND + 456_789
    parsed = uuid.UUID(uuid7_source(lambda: now_ns)())
    assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
    assert parsed.int >> 80 == 1_700_000_000_123


def test_ids_of_one_millisecond_rise() -> None:
    new_id = uuid7_source(lambda: MILLISECOND)
    ids = [new_id() for _ in range(10_000)]
    assert ids == sorted(set(ids))


def test_ids_rise_where_the_counter_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda size: b"\x3f" + b"\xff" * (size - 1))
    new_id = uuid7_source(lambda: MILLISECOND)
    ids = [new_id() for _ in range(3)]
    assert ids == sorted(set(ids))


def test_ids_rise_over_time() -> None:
    times = iter(range(MILLISECOND, 100 * MILLISECOND, MILLISECOND // 3))
    new_id = uuid7_source(lambda: next(times))
    ids = [new_id() for _ in range(200)]
    assert ids == sorted(ids)


def test_ids_of_two_processes_differ_within_a_millisecond() -> None:
    sources = [uuid7_source(lambda: MILLISECOND) for _ in range(2)]
    assert len({source() for source in sources for _ in range(1_000)}) == 2_000


def test_an_id_tells_when_it_was_made() -> None:
    now_ns = 1_700_000_000_123 * MILLISECOND + 456_789
    made = made_at(uuid7_source(lambda: now_ns)())
    assert made == dt.datetime(2023, 11, 14, 22, 13, 20, 123_000, dt.UTC)


@pytest.mark.parametrize(
    "other", ["", "d1", str(uuid.UUID(int=0)), "873105da-9e4c-480b-8012-879a2a481a82", "f" * 12 + "7" + "f" * 19]
)
def test_what_is_no_id_of_ours_tells_no_time(other: str) -> None:
    assert made_at(other) is None
