"""What a soak makes of what it saw: one leak, one lost process or one lost order fails it, and is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadtest.studies.soak import CALLERS, P50, Report, Series, Summary, document, judge, tables
from loadtest.studies.watched import DESCRIPTORS, MEMORY, PROCESSES, TASKS, THREADS, UNSHIPPED

SERVER, WRITER, METRICS = "server: server 11", "server: server.audit 12", "http://127.0.0.1:7003/metrics"
SECONDS = 1_800.0


def series(**grows: float) -> Series:
    """Half an hour of a sound server, but for what grows by so much a minute."""
    seen = Series()
    for number in range(360):
        minutes = number / 12
        seen.times.append(5.0 * number)
        seen.rows.append(
            {
                (SERVER, MEMORY): 180 + number % 3 + minutes * grows.get("memory", 0),
                (SERVER, DESCRIPTORS): 90 + minutes * grows.get("descriptors", 0) // 1,
                (SERVER, THREADS): 25 + minutes * grows.get("threads", 0) // 1,
                **{(WRITER, kind): level for kind, level in ((MEMORY, 70), (DESCRIPTORS, 16), (THREADS, 2))},
                ("server", PROCESSES): 2,
                (METRICS, TASKS): 40 + number % 7 + minutes * grows.get("tasks", 0),
                (METRICS, UNSHIPPED): 50 * (number % 4) + minutes * grows.get("unshipped", 0),
            }
        )
    return seen


def minutes(p50_grows: float = 0.0) -> list[Summary]:
    return [
        Summary(60.0 * number, 18_000, 4.0 + p50_grows * number, 20.0, 40.0, {}, {"PRIMARY": 18_000})
        for number in range(30)
    ]


def judged(seen: Series, slices: list[Summary] | None = None, errors_allowed: int = 0) -> Report:
    return judge(
        slices or minutes(),
        seen,
        rate=300.0,
        seconds=SECONDS,
        warm_up_seconds=360.0,
        errors_allowed=errors_allowed,
    )


def growing(report: Report) -> set[tuple[str, str]]:
    return {key for key, trend in report.trends.items() if not trend.flat}


def test_a_sound_server_is_flat() -> None:
    report = judged(series())
    assert report.flat
    assert len(report.trends) == 10


@pytest.mark.parametrize(
    ("grows", "what"),
    [
        ({"memory": 0.5}, (SERVER, MEMORY)),
        ({"descriptors": 0.5}, (SERVER, DESCRIPTORS)),
        ({"threads": 0.5}, (SERVER, THREADS)),
        ({"tasks": 2.0}, (METRICS, TASKS)),
        ({"unshipped": 200.0}, (METRICS, UNSHIPPED)),
    ],
)
def test_what_leaks_is_named(grows: dict[str, float], what: tuple[str, str]) -> None:
    report = judged(series(**grows))
    assert not report.flat
    assert growing(report) == {what}


def test_a_latency_that_creeps_up_is_found() -> None:
    assert growing(judged(series(), minutes(p50_grows=0.2))) == {(CALLERS, P50)}


def test_a_process_that_was_lost_is_named_and_a_successor_that_came_late_is_not_judged() -> None:
    seen = series()
    for number, row in enumerate(seen.rows):
        if number >= 300:
            seen.rows[number] = {
                ("server: server.audit 77" if who == WRITER else who, what): value for (who, what), value in row.items()
            }
    report = judged(seen)
    assert report.lost == [WRITER]
    assert not report.flat
    assert growing(report) == set()
    assert {who for who, _ in report.trends} == {SERVER, "server", METRICS, CALLERS}


def test_a_process_that_is_asked_for_now_and_then_is_no_loss() -> None:
    seen = series()
    for number in range(100, 340):
        seen.rows[number] = {**seen.rows[number], ("server: server.composition.reading_process 5", MEMORY): 60.0}
    assert judged(seen).flat


def test_a_process_that_ended_in_the_warm_up_is_no_loss() -> None:
    seen = series()
    seen.rows[:20] = [{**row, ("server: migration 9", MEMORY): 60.0} for row in seen.rows[:20]]
    assert judged(seen).flat


def test_a_scrape_that_failed_once_is_no_loss() -> None:
    seen = series()
    seen.rows[100] = {key: value for key, value in seen.rows[100].items() if key[0] != METRICS}
    assert judged(seen).flat


def test_orders_without_a_decision_count() -> None:
    slices = minutes()
    slices[4] = replace(slices[4], errors={"DEADLINE_EXCEEDED": 2})
    assert not judged(series(), slices).flat
    assert judged(series(), slices, errors_allowed=2).flat


def test_a_minute_without_any_decision_is_told_in_the_file() -> None:
    slices = minutes()
    slices[9] = Summary(540.0, 0, None, None, None, {"UNAVAILABLE": 18_000}, {})
    report = judged(series(), slices, errors_allowed=20_000)
    written = document(report, series())
    assert written["slices"][9]["p50_ms"] is None
    assert written["errors"] == 18_000
    assert [each.row_count for each in tables(report)] == [2, 4]


def test_too_short_a_run_cannot_tell() -> None:
    seen = series()
    with pytest.raises(ValueError, match="after the warm-up"):
        judge(minutes(), seen, rate=300, seconds=SECONDS, warm_up_seconds=1_790, errors_allowed=0)
