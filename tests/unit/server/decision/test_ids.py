from __future__ import annotations

import datetime as dt
import uuid

import pytest

from server.decision.ids import Ids, made_at

MILLISECOND = 1_000_000


def test_an_id_is_a_uuid_of_version_7_that_holds_the_time() -> None:
    now_ns = 1_700_000_000_123 * MILLISECOND + 456_789
    parsed = uuid.UUID(Ids(lambda: now_ns)())
    assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
    assert parsed.int >> 80 == 1_700_000_000_123


def test_ids_of_one_millisecond_rise() -> None:
    new_id = Ids(lambda: MILLISECOND)
    ids = [new_id() for _ in range(10_000)]
    assert ids == sorted(set(ids))


def test_ids_rise_where_the_counter_carries() -> None:
    new_id = Ids(lambda: MILLISECOND, lambda size: b"\x3f" + b"\xff" * (size - 1))
    ids = [new_id() for _ in range(3)]
    assert ids == sorted(set(ids))


@pytest.mark.parametrize("several", [0, 1, 64, 65_536, 200_000])
def test_several_ids_are_those_that_would_have_been_made_one_by_one(several: int) -> None:
    ids, one_by_one = (Ids(lambda: MILLISECOND, lambda _: b"\x3f\xff\xff\xd0") for _ in range(2))
    assert ids.several(several) == [one_by_one() for _ in range(several)]
    assert ids() == one_by_one()


def test_ids_rise_over_time() -> None:
    times = iter(range(MILLISECOND, 100 * MILLISECOND, MILLISECOND // 3))
    new_id = Ids(lambda: next(times))
    ids = [new_id() for _ in range(200)]
    assert ids == sorted(ids)


def test_ids_of_two_processes_differ_within_a_millisecond() -> None:
    sources = [Ids(lambda: MILLISECOND) for _ in range(2)]
    assert len({source() for source in sources for _ in range(1_000)}) == 2_000


def test_an_id_tells_when_it_was_made() -> None:
    now_ns = 1_700_000_000_123 * MILLISECOND + 456_789
    made = made_at(Ids(lambda: now_ns)())
    assert made == dt.datetime(2023, 11, 14, 22, 13, 20, 123_000, dt.UTC)


@pytest.mark.parametrize(
    "other", ["", "d1", str(uuid.UUID(int=0)), "873105da-9e4c-480b-8012-879a2a481a82", "f" * 12 + "7" + "f" * 19]
)
def test_what_is_no_id_of_ours_tells_no_time(other: str) -> None:
    assert made_at(other) is None
