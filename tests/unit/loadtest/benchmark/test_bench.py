"""What the benchmark makes of a server that is slow to answer."""

from __future__ import annotations

from typing import Any

import pytest

from loadtest.benchmark import bench
from loadtest.benchmark.figures import Round
from loadtest.generators.load import ECHO, Call, Load, Plan, Server

CALL = Call("/s/Do", b"", 1)
SERVER = Server("echo", ECHO, "127.0.0.1:1", {("unary", 1): CALL})
ROUND = Round(1.0, 10, 0, {}, None, None, None)


@pytest.mark.parametrize(("fails", "failures"), [(0.25, 0), (0.8, 2)])
def test_a_round_counts_though_the_moment_before_it_brought_no_answer(
    monkeypatch: pytest.MonkeyPatch, fails: float, failures: int
) -> None:
    def closed_loop(*_: Any, seconds: float, **__: Any) -> Round:
        if seconds == fails:
            raise RuntimeError("no answer")
        return ROUND

    monkeypatch.setattr(bench, "closed_loop", closed_loop)
    plan = Plan([Load("unary", callers=4)], [], rounds=2, seconds=0.8)
    found = bench.measure(plan, [SERVER], [], lambda _: None)
    assert len(found.failures) == failures
    assert [len(each.rates) for each in found.results] == ([] if failures else [2])
