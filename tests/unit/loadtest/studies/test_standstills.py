"""What is said to have stopped a core did."""

from __future__ import annotations

import os

import pytest

from loadtest.studies.standstills import Core, Standstill, main, report, stolen_seconds, together

STAT = """\
cpu  100 1 50 900 5 0 3 31 0 0
cpu0 50 0 25 450 2 0 1 11 0 0
cpu1 50 1 25 450 3 0 2 20 0 0
intr 12345
"""


def test_stolen_time_is_that_of_the_core() -> None:
    assert (stolen_seconds(STAT, 0, 100), stolen_seconds(STAT, 1, 100)) == (0.11, 0.2)
    with pytest.raises(ValueError, match="no core 2"):
        stolen_seconds(STAT, 2, 100)


def test_cores_stand_still_together_only_where_all_of_them_do() -> None:
    first = Core(0, True, 0.0, [Standstill(1.0, 0.02, 0.02), Standstill(5.0, 0.02, 0.0)])
    second = Core(1, True, 0.0, [Standstill(1.005, 0.02, 0.02), Standstill(5.015, 0.02, 0.0)])
    ((began, seconds),) = together([first, second], 0.01)
    assert (began, seconds) == pytest.approx((1.005, 0.015))
    assert [began for began, _ in together([first], 0.01)] == [1.0, 5.0]
    assert together([first, Core(1, True, 0.0, [])], 0.01) == []


def test_the_report_says_what_the_host_took() -> None:
    core = Core(0, True, 0.03, [Standstill(1.0, 0.02, 0.02), Standstill(2.0, 0.012, 0.0), Standstill(3.0, 0.004, 0.01)])
    _, row, both = report([core], 0.01)
    assert row.split() == ["0", "30", "3", "36", "20.0", "2", "1"]
    assert both.startswith("2 times all cores")
    *_, warning = report([Core(0, False, 0.0, [])], 0.01)
    assert "no real-time priority" in warning


def test_every_core_is_watched(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--seconds", "0.2"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("core")
    assert [int(row.split()[0]) for row in rows[: len(os.sched_getaffinity(0))]] == sorted(os.sched_getaffinity(0))
