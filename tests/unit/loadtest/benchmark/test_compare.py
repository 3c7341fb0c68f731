"""The change between two runs of the benchmark: a busier machine is no slower product."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loadtest.benchmark.compare import changes, last_kept, run_compare


def result(server: str, per_second: float, **others: Any) -> dict[str, Any]:
    kind, transport = ("echo", "grpcio") if server == "echo" else ("pretrade", "grpcio")
    values = {"load": "unary, 64 callers", "kind": kind, "transport": transport, "p99_ms": 10.0, "cpu_us": 500.0}
    return (
        values
        | {"server": server, "decisions_per_second": per_second, "errors": 0, "offered_per_second": None}
        | others
    )


def run(*results: dict[str, Any], at: str = "2026-11-21T12:00:00+00:00", commit: str = "abc") -> dict[str, Any]:
    return {"commit": commit, "finished_at": at, "results": list(results)}


def test_what_became_of_the_machine_is_taken_out() -> None:
    then, now = (
        run(result("grpc.aio", 1_000), result("echo", 4_000)),
        run(result("grpc.aio", 600), result("echo", 2_000)),
    )
    ours, echo = changes(then, now)
    assert (ours.ratio, ours.machine) == (0.6, 0.5)
    assert ours.adjusted == pytest.approx(1.2)
    assert (echo.ratio, echo.machine, echo.adjusted) == (0.5, None, None)


def test_a_server_without_an_echo_of_its_own_is_held_to_all_echoes() -> None:
    model = result("TorchServe", 300, kind="alternative", transport="")
    then, now = run(model, result("echo", 100)), run(model, result("echo", 50))
    assert changes(then, now)[0].machine == 0.5


def test_an_open_loop_says_nothing_of_the_machine() -> None:
    offered = result("grpc.aio", 200, load="unary, 200/s", offered_per_second=200.0)
    then, now = run(offered, result("echo", 100)), run(offered, result("echo", 50))
    assert changes(then, now)[0].machine is None


def test_what_only_one_run_has_is_left_out() -> None:
    then, now = run(result("grpc.aio", 1_000)), run(result("grpc.aio", 1_000), result("Envoy", 2_000))
    assert [change.server for change in changes(then, now)] == ["grpc.aio"]


def test_the_run_before_is_the_last_kept_one_that_is_not_this_one(tmp_path: Path) -> None:
    for hour, commit in enumerate(("first", "second", "third")):
        kept = run(at=f"2026-11-21T1{hour}:00:00+00:00", commit=commit)
        (tmp_path / f"bench-{commit}.json").write_text(json.dumps(kept))
    (tmp_path / "serving-abc.json").write_text("{}")
    assert last_kept(kept, tmp_path) == tmp_path / "bench-second.json"
    assert last_kept(run(at="2026-11-21T10:00:00+00:00"), tmp_path) is None


def test_the_comparison_is_printed_with_both_commits(tmp_path: Path) -> None:
    paths = [tmp_path / "now.json", tmp_path / "then.json"]
    paths[0].write_text(json.dumps(run(result("grpc.aio", 600, errors=7), result("echo", 2_000), commit="new")))
    paths[1].write_text(json.dumps(run(result("grpc.aio", 1_000, p99_ms=None), result("echo", 4_000), commit="old")))
    console = Console(width=120, record=True, file=io.StringIO(), force_terminal=True)
    assert run_compare(paths[0], paths[1], console) == 0
    shown = console.export_text()
    assert "then old" in shown
    assert "now new" in shown
    (row,) = (line for line in shown.splitlines() if line.split()[:1] == ["grpc.aio"])
    assert row.split()[1:] == ["1,000", "600", "0.60", "0.50", "1.20", "–", "10.0", "500", "500", "0", "7"]


@pytest.mark.parametrize("content", [None, "{}", "no JSON"])
def test_without_figures_to_compare_it_says_so(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "now.json"
    if content is not None:
        path.write_text(content)
    console = Console(width=120, record=True, file=io.StringIO())
    assert run_compare(path, None, console) == 1
    assert console.export_text().strip()
