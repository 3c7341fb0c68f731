"""What `pretrade canary` and `pretrade models` ask before they do it, and how they list models."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from typing import Any, NoReturn

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from support.admin_server import AdminServer, RefusedError, admin_server
from typer.testing import CliRunner

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.client.cli.main import app
from pretrade.client.cli.model_versions import _print_models

VERSION, CHAMPION = "bb" * 8, "aa" * 8


def started(request: pb.StartCanaryRequest) -> pb.StartCanaryResponse:
    canary = pb.Canary(
        model_version=VERSION,
        champion_version=CHAMPION,
        state=pb.CANARY_STATE_RUNNING,
        weight=0.05,
        steps=[0.05, 0.5, 1.0],
    )
    change = pb.Change(subject="canary", diff=[f"canary: none → {VERSION} at 5% of the flows"], version=7)
    return pb.StartCanaryResponse(canary=canary, change=change)


def asked_on_a_terminal(server: AdminServer, answer: str, *words: str) -> tuple[int, str]:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "local", *words, "--target", server.address]
    try:
        process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, text=True)
        os.write(ours, f"{answer}\n".encode())
        said, _ = process.communicate(timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)
    return process.returncode, said


def test_the_question_names_the_version_its_share_and_its_steps_and_an_alias_is_resolved_once() -> None:
    with admin_server(StartCanary=started) as server:
        code, said = asked_on_a_terminal(server, "y", "canary", "start", "candidate")
        first, second = (request for _, request in server.asked)
    assert code == 0
    assert f"{VERSION} then decides 5% of the order flows in place of champion {CHAMPION}" in said
    assert "5%, 50%, 100%" in said
    assert (first.model_version, first.dry_run) == ("candidate", True)
    assert (second.model_version, second.dry_run, second.expected_control_version) == (VERSION, False, 7)


def test_who_says_no_changes_nothing() -> None:
    with admin_server(StartCanary=started) as server:
        code, said = asked_on_a_terminal(server, "n", "canary", "start", "candidate")
        assert [request.dry_run for _, request in server.asked] == [True]
    assert code == 1
    assert said.endswith("not confirmed, nothing changed\n")


def test_a_version_that_there_is_not_is_refused_before_anything_is_asked() -> None:
    def unknown(_request: Any) -> NoReturn:
        raise RefusedError(grpc.StatusCode.NOT_FOUND, "no version or alias deadbeef")

    with admin_server(SetModelAlias=unknown) as server:
        found = CliRunner().invoke(app, ["models", "alias", "champion", "deadbeef", "--target", server.address])
    assert (found.exit_code, found.output) == (1, "NOT_FOUND: no version or alias deadbeef\n")


@pytest.mark.parametrize(
    ("words", "orders"),
    [
        (["models", "alias", "champion", VERSION], "every order"),
        (["models", "alias", "champion", VERSION, "--model", "scalper"], "every order of the model scalper"),
        (["canary", "promote", "--model", "scalper"], "every order of the model scalper"),
        (["canary", "rollback", "--model", "scalper"], "every order of the model scalper"),
    ],
)
def test_the_question_names_the_model_whose_orders_a_champion_decides(words: list[str], orders: str) -> None:
    answers = {
        "SetModelAlias": lambda _request: pb.SetModelAliasResponse(model=pb.ModelVersion(model_version=VERSION)),
        "PromoteCanary": lambda _request: pb.PromoteCanaryResponse(canary=pb.Canary(model_version=VERSION)),
        "RollBack": lambda _request: pb.RollBackResponse(model_version=VERSION, previous_version=CHAMPION),
    }
    with admin_server(**answers) as server:
        found = CliRunner().invoke(app, [*words, "--target", server.address])
    assert f"{VERSION} then decides {orders}, " in found.output


def model(version: str, *aliases: str, **more: Any) -> pb.ModelVersion:
    said: dict[str, Any] = {"kind": "xgboost", "standing": "does not beat the rules"}
    return pb.ModelVersion(
        model_version=version, name="champion", aliases=aliases, created_at=Timestamp(seconds=1), **(said | more)
    )


def test_a_version_that_expires_says_until_when_it_may_decide(capsys: pytest.CaptureFixture[str]) -> None:
    _print_models([model("aa" * 8), model("bb" * 8, expires_at=Timestamp(seconds=1_725_753_900))])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "may decide" in line] == ["    may decide on markets until 2024-09-08 00:05 UTC"]
    assert lines[3].endswith("does not beat the rules"), "of the version that it is said of"


def test_only_the_version_that_decides_is_called_champion(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    loaded = ["primary", "secondary", "challenger"]
    _print_models(
        [
            model("aa" * 8, "candidate", standing="no card says how good it is"),
            model("bb" * 8, "champion", loaded_on=loaded, card="models/cards/bb/card.md"),
            model("cc" * 8, problem="unreadable: [no] zip"),
            model("dd" * 8, standing="does not beat always trading and logistic regression"),
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == f"{'aa' * 8}  candidate   xgboost  not loaded"
    assert lines[1].endswith("no card says how good it is")
    assert lines[2] == f"{'bb' * 8}  champion    xgboost  on primary, secondary, challenger"
    assert lines[3].endswith("does not beat the rules")
    assert lines[4].split()[:2] == ["cc" * 8, "–"]
    assert lines[5].endswith("unreadable: [no] zip")
    assert lines[7].endswith("  does not beat always trading and logistic regression")
    assert lines[8] == "champion bbbbbbbb: does not beat the rules; card: models/cards/bb/card.md"
    assert "champion" not in lines[0] + lines[1] + lines[4] + lines[5]
