"""`pretrade models map` against a server that answers what a test gives it."""

from __future__ import annotations

from typing import Any

import pytest
from support.admin_server import AdminServer, admin_server
from typer.testing import CliRunner, Result

from pretrade.admin.v1 import admin_pb2
from pretrade.client.cli.main import app

RULES = (("BTC*", "*", "scalper"), ("*", "slow", "default"))


def run(server: AdminServer, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["models", "map", *arguments, "--target", server.address])


def listed(rules: Any) -> list[tuple[str, str, str]]:
    return [(rule.instrument, rule.strategy, rule.model) for rule in rules]


def get(_request: object) -> admin_pb2.GetModelMapResponse:
    rules = [admin_pb2.ModelMapRule(instrument=one, strategy=two, model=name) for one, two, name in RULES]
    models = [
        admin_pb2.NamedModel(name="default", champion_version="aa" * 8, feature_set="mf1/1", available=True),
        admin_pb2.NamedModel(name="scalper"),
    ]
    return admin_pb2.GetModelMapResponse(rules=rules, models=models, control_version=7)


def put(request: admin_pb2.SetModelMapRequest) -> admin_pb2.SetModelMapResponse:
    change = admin_pb2.Change(subject="model_map", version=8, diff=["+ something"], dry_run=request.dry_run)
    return admin_pb2.SetModelMapResponse(rules=request.rules, change=change)


def test_the_map_is_shown_with_its_models() -> None:
    with admin_server(GetModelMap=get) as server:
        shown = run(server)
    assert shown.output.splitlines() == [
        "BTC*:*=scalper",
        "*:slow=default",
        "*:*=default (always last)",
        f"model default: {'aa' * 8}, mf1/1, available",
        "model scalper: no champion yet, NOT AVAILABLE",
        "control state: version 7",
    ]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["ETH*:a-?=scalper", "=default"], [("ETH*", "a-?", "scalper"), ("*", "*", "default")]),
        (["--add", ":fast=scalper"], [("*", "fast", "scalper"), *RULES]),
        (["--add", "BTC*=default"], [("BTC*", "*", "default"), RULES[1]]),
        (["--remove", ":slow=default"], [RULES[0]]),
        (["--default"], []),
    ],
)
def test_rules_are_set_as_a_whole_added_in_front_or_taken_out(
    arguments: list[str], wanted: list[tuple[str, str, str]]
) -> None:
    with admin_server(GetModelMap=get, SetModelMap=put) as server:
        done = run(server, *arguments, "--yes", "--reason", "a test")
    assert done.exit_code == 0, done.output
    assert "control state: version 8" in done.output
    request = server.asked[-1][1]
    assert listed(request.rules) == wanted
    read = any(argument in ("--add", "--remove") for argument in arguments)
    assert (request.expected_control_version == 7) is read, "what was read is what is changed"


def test_a_change_is_shown_and_not_made_without_a_yes() -> None:
    with admin_server(GetModelMap=get, SetModelMap=put) as server:
        done = run(server, "=scalper")
    assert done.exit_code == 1
    assert "+ something" in done.output
    assert [request.dry_run for method, request in server.asked if method == "SetModelMap"] == [True]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["BTC*"], "is no rule"),
        (["--remove", ":gone=default"], "no rule"),
        (["=scalper", "--default"], "either the whole map"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], sentence: str) -> None:
    with admin_server(GetModelMap=get, SetModelMap=put) as server:
        done = run(server, *arguments, "--yes")
    assert done.exit_code == 2
    assert sentence in " ".join(done.output.split())
    assert "SetModelMap" not in server.methods
