"""How many calls the gate in Envoy may let in."""

from __future__ import annotations

import json

import pytest
from support.cases import Clock

from server.decision.admission import WAITING_BATCHES, Admission, AdmissionSettings
from server.envoy.gate import CallLimits, UnderWay, http_filter, reply

SETTINGS = AdmissionSettings(max_in_flight=200, min_in_flight=20, reserved_share=0)


def new_limit(places: int = 200, keeps_up: bool = False) -> CallLimits:
    admission = Admission(SETTINGS, Clock())
    admission._limit = float(places)
    admission.keeps_up = keeps_up
    return CallLimits(SETTINGS, admission)


def bounds(limit: CallLimits, calls: int, orders: int, patient: int = 0, batches: int = 0) -> tuple[int, int]:
    """Most and least."""
    most, least = limit.update(UnderWay(calls, orders, patient, batches)).values()
    return most, least


def test_it_lets_in_as_many_calls_as_there_are_places() -> None:
    assert bounds(new_limit(), 0, 0) == (200, 20)
    assert bounds(new_limit(80), 64, 64) == (80, 20)
    assert bounds(new_limit(10), 64, 64) == (20, 20), "no fewer than admission ever admits"


def test_a_call_weighs_as_much_as_its_orders() -> None:
    limit = new_limit()
    assert bounds(limit, 3, 192) == (200, 20), "what is under way fits"
    assert bounds(limit, 10, 640) == (3, 3)
    assert bounds(limit, 100, 6_400) == (3, 3)


def test_a_call_is_let_in_even_if_its_orders_do_not_fit() -> None:
    assert bounds(new_limit(20), 4, 256) == (1, 1)


def test_batches_are_let_in_to_wait() -> None:
    limit = new_limit(20)
    assert bounds(limit, 4, 256, batches=4) == (1 + WAITING_BATCHES, 1 + WAITING_BATCHES)
    assert bounds(limit, 8, 260, batches=4) == (1 + WAITING_BATCHES // 2, (1 + WAITING_BATCHES // 2) // 2)
    assert bounds(new_limit(), 3, 192, batches=3) == (200, 200), "never more than orders at all"


def test_it_opens_by_half_at_each_look_when_calls_weigh_less_again() -> None:
    limit = new_limit()
    bounds(limit, 100, 6_400)
    assert [bounds(limit, 3, 3)[0] for _ in range(4)] == [4, 7, 10, 15]
    for _ in range(10):
        bounds(limit, 3, 3)
    assert bounds(limit, 3, 3) == (200, 20)


@pytest.mark.parametrize(("patient", "most", "least"), [(0, 80, 20), (32, 140, 70), (64, 200, 200)])
def test_calls_without_a_deadline_are_let_in_to_wait(patient: int, most: int, least: int) -> None:
    assert bounds(new_limit(80), 64, 64, patient) == (most, least)


def test_while_orders_are_decided_in_time_the_gate_opens_whatever_their_latency() -> None:
    limit = new_limit(keeps_up=True)
    assert [bounds(limit, 64, 64)[1] for _ in range(3)] == [24, 29, 34]
    for _ in range(30):
        bounds(limit, 64, 64)
    assert bounds(limit, 64, 64) == (200, 200)
    limit._admission.keeps_up = False
    assert bounds(limit, 64, 64) == (200, 20)


def test_it_remembers_who_called_while_nobody_does() -> None:
    limit = new_limit(80)
    bounds(limit, 64, 64, 64)
    assert bounds(limit, 0, 0) == (200, 200)


@pytest.mark.parametrize(
    ("cap_seconds", "target"), [(0.02, "0.012000000s"), (0.05, "0.030000000s"), (0.2, "0.030000000s")]
)
def test_the_gate_closes_early(cap_seconds: float, target: str) -> None:
    config = http_filter(SETTINGS, cap_seconds)["typed_config"]["gradient_controller_config"]
    assert config["min_rtt_calc_params"]["fixed_value"] == target


def test_a_refusal_says_when_to_ask_again_to_every_kind_of_caller() -> None:
    by_grpc, in_json = reply()["mappers"]
    assert "application/grpc" in str(by_grpc["filter"]), "the first that fits is taken"
    headers = {each["header"]["key"]: each["header"]["value"] for each in by_grpc["headers_to_add"]}
    assert (headers["grpc-status"], headers["grpc-retry-pushback-ms"], headers["retry-after"]) == ("8", "50", "1")
    (retry_after,) = in_json["headers_to_add"]
    assert retry_after["header"] == {"key": "retry-after", "value": "1"}
    status = json.loads(in_json["body"]["inline_string"])
    assert (status["status"], status["reason"]) == (429, "TOO_MANY_IN_FLIGHT")
