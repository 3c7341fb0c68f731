"""What the demo says at its end."""

from __future__ import annotations

import re

import pytest

from local.demo.demo import Summary


def summary(orders: int, decisions: int, audit_rows: int) -> Summary:
    return Summary(
        decisions=decisions,
        orders=orders,
        answered_in_deadline=1.0,
        p50_ms=5.0,
        p99_ms=20.0,
        p999_ms=30.0,
        by_source={},
        by_action={},
        errors={},
        audit_rows=audit_rows,
        feature_age_p99_ms=10.0,
        events_consumed=1,
    )


def test_a_sound_run_has_no_problems() -> None:
    sound = summary(1_200, 1_200, 1_200)
    assert sound.sound
    assert list(sound.problems(150)) == []


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ((1_200, 1_000, 1_000), "200 of 1,200 orders got no decision in 200 ms: .*150 orders a second .*RATE=20"),
        ((1_200, 1_200, 1_100), "100 of 1,200 decisions are not in the audit database"),
        ((0, 0, 0), "no order was sent"),
    ],
)
def test_what_is_not_sound_is_said_with_what_to_do(counts: tuple[int, int, int], problem: str) -> None:
    unsound = summary(*counts)
    assert not unsound.sound
    (said,) = unsound.problems(150)
    assert re.search(problem, said)
