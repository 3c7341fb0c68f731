"""What the benchmark makes of its rounds: medians, ratios, the table and its remarks."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from loadtest.benchmark.bench import until_steady
from loadtest.benchmark.figures import Round, figures, percentiles_ms, remarks, table, with_ratios
from loadtest.benchmark.rounds import without_decision
from loadtest.generators import h2load
from loadtest.generators.load import ALTERNATIVE, ECHO, PRETRADE, Call, Load, Server, Usage, plan

UNARY = Load("unary", callers=64)
HALF = Load("unary", share=0.5)
STREAM = Load("stream", callers=4)


def server(name: str, kind: str = PRETRADE, transport: str = "") -> Server:
    return Server(name, kind, "127.0.0.1:1", {}, transport, usage=lambda: Usage(0.0, 3 * 2**20))


def rounds(*rates: float, errors: int = 0, scored: float | None = 1.0) -> list[Round]:
    latencies = {"p50": 1.0, "p99": 2.0}
    return [Round(2.0, int(2 * rate), errors, latencies, cpu_us=1e6 / rate, scored=scored) for rate in rates]


def test_figures_are_medians_over_the_rounds() -> None:
    found = figures(UNARY, server("Envoy"), rounds(100, 300, 200, errors=2))
    assert (found.decisions_per_second, found.cpu_us, found.p50_ms, found.p999_ms) == (200, 5_000, 1.0, None)
    assert (found.decisions, found.errors, found.memory_mebibytes) == (1_200, 6, 3.0)
    assert found.error_share == pytest.approx(6 / 1_206)


@pytest.mark.parametrize(("calls", "known"), [(0, []), (99, ["p50"]), (100, ["p50", "p99"])])
def test_a_percentile_is_only_told_by_enough_calls(calls: int, known: list[str]) -> None:
    assert list(percentiles_ms([0.001] * calls)) == known


def test_ratios_are_to_the_echo_behind_the_same_transport_and_to_the_alternatives() -> None:
    servers = [
        server("grpc.aio", transport="grpcio"),
        server("Envoy", transport="envoy"),
        server("echo grpc.aio", ECHO, "grpcio"),
        server("echo Envoy", ECHO, "envoy"),
        server("TorchServe", ALTERNATIVE),
        server("FastAPI", ALTERNATIVE),
    ]
    rates = dict(zip((each.name for each in servers), (100, 300, 400, 1_000, 200, 50), strict=True))
    found = [figures(UNARY, each, rounds(rates[each.name])) for each in servers]
    found.append(figures(HALF, servers[0], rounds(50), offered=50))
    ratios = {
        (each.load, each.server): (each.to_echo, each.to_torchserve, each.to_fastapi)
        for each in with_ratios(found, servers, "TorchServe", "FastAPI", {})
    }
    assert ratios == {
        (UNARY.name, "grpc.aio"): (0.25, 0.5, 2.0),
        (UNARY.name, "Envoy"): (0.3, 1.5, 6.0),
        (UNARY.name, "echo grpc.aio"): (None, 2.0, 8.0),
        (UNARY.name, "echo Envoy"): (None, 5.0, 20.0),
        (UNARY.name, "TorchServe"): (None, None, 4.0),
        (UNARY.name, "FastAPI"): (None, 0.25, None),
        (HALF.name, "grpc.aio"): (None, None, None),  # there the rate is given
    }


def test_a_ratio_is_the_median_of_those_of_the_rounds() -> None:
    servers = [server("Envoy", transport="envoy"), server("echo Envoy", ECHO, "envoy")]
    found = [figures(UNARY, servers[0], rounds(100, 50, 90)), figures(UNARY, servers[1], rounds(200, 50, 300))]
    assert with_ratios(found, servers, "TorchServe", "FastAPI", {})[0].to_echo == 0.5, "not 90 / 200"


def test_a_server_is_held_against_that_of_an_older_commit() -> None:
    servers = [server("Envoy", transport="envoy"), server("Envoy before", transport="envoy")]
    found = [figures(UNARY, servers[0], rounds(300, 200)), figures(UNARY, servers[1], rounds(100, 100))]
    today, before = with_ratios(found, servers, "TorchServe", "FastAPI", {"Envoy": "Envoy before"})
    assert (today.to_before, before.to_before) == (2.5, None)


def test_a_stream_is_held_against_the_single_calls_of_fastapi() -> None:
    servers = [server("Envoy", transport="envoy"), server("FastAPI", ALTERNATIVE)]
    found = [figures(STREAM, servers[0], rounds(300)), figures(UNARY, servers[1], rounds(100))]
    assert with_ratios(found, servers, "TorchServe", "FastAPI", {})[0].to_fastapi == 3.0


def test_the_table_fits_into_80_columns_with_all_its_figures() -> None:
    servers = [
        server("Envoy embedded os", transport="envoy"),
        server("echo Envoy", ECHO, "envoy"),
        server("TorchServe", ALTERNATIVE),
        server("FastAPI", ALTERNATIVE),
    ]
    found = with_ratios(
        [figures(UNARY, each, rounds(98_765, errors=24_690)) for each in servers], servers, "TorchServe", "FastAPI", {}
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table([replace(each, to_kept=1.5) for each in found], "title"))
    lines = console.export_text().splitlines()
    assert any(line.split() == ["unary,", "64", "callers"] for line in lines)
    (row,) = (line for line in lines if line.split()[:3] == ["Envoy", "embedded", "os"])
    assert row.split()[3:] == ["98,765", "1.0", "2.0", "25k", "10", "1.00", "1.00", "1.00", "1.50"]


def test_what_cannot_be_seen_of_a_deployment_is_left_out_of_the_table() -> None:
    alone = Server("host:1", PRETRADE, "host:1", {})
    found = [figures(UNARY, alone, [Round(1.0, 10, 0, {"p50": 1.0})])]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(found, "title"))
    shown = console.export_text()
    assert "errors" in shown
    assert not any(heading in shown for heading in ("CPU", "/echo", "/TS", "/FA", "/kept"))


def test_remarks_name_errors_degraded_answers_and_rates_that_were_not_reached() -> None:
    sound = figures(UNARY, server("Envoy"), rounds(100))
    assert remarks([sound]) == []
    failing = figures(UNARY, server("Envoy"), rounds(100, errors=200))
    assert "50.00% of the orders got no decision; latencies are of refusals, too" in remarks([failing])[0]
    degraded = figures(UNARY, server("Envoy"), rounds(100, scored=0.5))
    assert "only 50.0% of the decisions are by a replica's score" in remarks([degraded])[0]
    behind = figures(HALF, server("Envoy"), rounds(50), offered=100)
    assert "100/s were to be sent" in remarks([behind])[0]
    heard = figures(UNARY, server("Envoy"), [Round(1.0, 10, 1, {}, statuses={"UNAVAILABLE": 1})])
    assert "(UNAVAILABLE 1)" in remarks([heard])[0]


def test_a_server_is_steady_after_two_windows_that_differ_by_less_than_a_tenth() -> None:
    rates = iter([100.0, 150.0, 200.0, 215.0])
    warm_up = until_steady(lambda seconds: rounds(next(rates))[0], "Envoy")
    assert (warm_up.steady, list(warm_up.per_second)) == (True, [100, 150, 200, 215])
    restless = iter([100.0, 200.0] * 50)
    warm_up = until_steady(lambda seconds: rounds(next(restless))[0], "Envoy")
    assert not warm_up.steady
    assert len(warm_up.per_second) == 10


def test_a_server_that_gives_no_answer_at_first_is_called_again() -> None:
    answers = iter([None, None, 200.0, 210.0])

    def window(seconds: float) -> Round:
        rate = next(answers, None)
        if rate is None:
            raise RuntimeError("no answer")
        return rounds(rate)[0]

    assert until_steady(window, "FastAPI").steady
    with pytest.raises(RuntimeError, match="no answer"):
        until_steady(window, "FastAPI")


def test_errors_that_h2load_takes_for_successes_are_found_by_the_servers_count() -> None:
    call, run = Call("/", b"", orders=1), h2load.Run(1.0, answers=100, latencies=[0.001])
    before = Usage(0.0, 0, decisions=1_000, refused=5, scored=0)
    assert without_decision(call, run, before, Usage(0.0, 0, decisions=1_102, refused=5)) == 0  # some were cut off
    assert without_decision(call, run, before, Usage(0.0, 0, decisions=1_060, refused=45)) == 40
    # Envoy refuses calls that the server never hears of.
    assert without_decision(call, run, before, Usage(0.0, 0, decisions=1_060, refused=5)) == 40


def test_errors_of_a_server_without_a_count_are_found_by_the_bytes_that_are_missing() -> None:
    call = Call("/", b"", orders=64, answer_bytes=50)
    idle = Usage(0.0, 0)
    assert without_decision(call, h2load.Run(1.0, 100, [0.001], data_bytes=5_000), idle, idle) == 0
    assert without_decision(call, h2load.Run(1.0, 100, [0.001], data_bytes=4_500), idle, idle) == 10 * 64


H2LOAD = """
requests: 208 total, 212 started, 208 done, 205 succeeded, 3 failed, 0 errored, 0 timeout
status codes: 205 2xx, 0 3xx, 0 4xx, 3 5xx
traffic: 891.69KB (913093) total, 786B (786) headers (space savings 95.42%), 763.88KB (782217) data
"""


def test_what_h2load_prints_is_read() -> None:
    run = h2load.parse(H2LOAD, 1.0, np.array([0.001, 0.003]))
    assert (run.answers, run.failed, run.data_bytes, run.p50_ms) == (205, 3, 782_217, 2.0)
    with pytest.raises(RuntimeError, match="no answer"):
        h2load.parse(H2LOAD.replace("205 succeeded", "0 succeeded"), 1.0, np.array([0.001]))


def test_every_load_of_a_plan_has_a_name_of_its_own() -> None:
    for quick in (False, True):
        wanted = plan(quick=quick, rounds=None, seconds=None, deadline_seconds=0.2)
        names = [load.name for load in (*wanted.closed, *wanted.opened)]
        assert len(set(names)) == len(names)
    assert "unary, 1 caller" in names
    assert "stream, 1 × 64" in names
    assert "batch, at 50%" in names
    assert Load("batch", callers=4, orders=256).name == "batch, 4 × 256"
