"""The ghz scenarios hold only what ghz documents, and orders that the contract and the server accept."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf.json_format import ParseDict

from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.convert import OrderReader

ROOT: Final = Path(__file__).parents[3]
SCENARIOS: Final = sorted((ROOT / "loadtest" / "ghz").glob("*.json"))

# The long names of ghz's command-line options are the keys of its configuration file, and `host` is one too.
# Source: https://ghz.sh/docs/options
TEXTS = """
host proto protoset call cacert cert key cname authority load-schedule concurrency-schedule duration-stop data-file
binary-file metadata-file output format name debug lb-strategy
load-step-duration load-max-duration concurrency-step-duration concurrency-max-duration timeout duration max-duration
stream-interval stream-call-duration connect-timeout keepalive
"""
SWITCHES = """
skipTLS insecure async stream-dynamic-messages enable-compression count-errors disable-template-functions
disable-template-data
"""
NUMBERS = """
rps load-start load-step load-end concurrency concurrency-start concurrency-end concurrency-step total
stream-call-count max-recv-message-size max-send-message-size skipFirst connections cpus
"""
DOCUMENTED: Final[Mapping[str, type]] = {
    **dict.fromkeys(TEXTS.split(), str),
    **dict.fromkeys(SWITCHES.split(), bool),
    **dict.fromkeys(NUMBERS.split(), int),
    **dict.fromkeys(("metadata", "reflect-metadata", "tags"), dict),
    "import-paths": list,
}
DURATIONS: Final = {"timeout", "duration", "stream-interval", "load-step-duration"}
SCHEDULES: Final[Mapping[str, set[str]]] = {
    "step": {"load-start", "load-step", "load-end", "load-step-duration"},
    "line": {"load-start", "load-step", "load-end"},
}
"""What each schedule needs. Source: https://ghz.sh/docs/load"""
TEMPLATES: Final = {"{{.RequestNumber}}": "123456", "{{newUUID}}": "0192b4a1-2b3c-4d4e-8f5a-6b7c8d9e0f1a"}


@pytest.fixture(params=SCENARIOS, ids=lambda path: path.stem)
def scenario(request: pytest.FixtureRequest) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(request.param.read_text())
    return loaded


def messages(scenario: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The request messages, with every template filled in as ghz would."""
    text = json.dumps(scenario["data"])
    for template, value in TEMPLATES.items():
        text = text.replace(template, value)
    assert "{{" not in text
    data = json.loads(text)
    yield from data if isinstance(data, list) else [data]


def test_there_is_a_scenario_for_each_way_of_calling_and_each_course_of_the_load() -> None:
    assert {path.stem for path in SCENARIOS} == {"decide", "batch", "stream", "ramp", "market-open", "soak"}


def test_each_is_in_the_documentation_with_its_command() -> None:
    documentation = (ROOT / "loadtest" / "README.md").read_text()
    for path in SCENARIOS:
        assert f"ghz --config {path.relative_to(ROOT)}" in documentation


def test_a_load_that_changes_has_what_its_schedule_needs_and_ends(scenario: dict[str, Any]) -> None:
    schedule = scenario.get("load-schedule")
    given = {key for key in scenario if key.startswith("load-")} - {"load-schedule"}
    assert given == (SCHEDULES[schedule] if schedule else set())
    assert ("rps" in scenario) != bool(schedule or "stream-call-count" in scenario)
    assert "duration" in scenario or "total" in scenario
    if schedule:
        assert (scenario["load-end"] - scenario["load-start"]) % scenario["load-step"] == 0


def test_every_key_is_documented_and_of_its_type(scenario: dict[str, Any]) -> None:
    for key, value in scenario.items():
        if key != "data":
            assert type(value) is DOCUMENTED[key], key
        if key in DURATIONS:
            assert re.fullmatch(r"\d+(ms|s|m)", value), key


def test_the_call_is_in_the_contract_and_its_file_is_there(scenario: dict[str, Any]) -> None:
    service, method = scenario["call"].rsplit(".", 1)
    assert service == pb.DESCRIPTOR.services_by_name["DecisionService"].full_name
    called = pb.DESCRIPTOR.services_by_name["DecisionService"].methods_by_name[method]
    assert isinstance(scenario["data"], list) == called.client_streaming
    assert (ROOT / scenario["proto"]).is_file()
    assert all((ROOT / path).is_dir() for path in scenario["import-paths"])


def test_the_server_accepts_the_orders(scenario: dict[str, Any]) -> None:
    reader = OrderReader(("BTCUSDT.BINANCE", "ETHUSDT.BINANCE"))
    for message in messages(scenario):
        basket = message["orders"] if "orders" in message else [message["order"]]
        for one in basket:
            assert reader.read(ParseDict(one, pb.Order())).message.order_ref
