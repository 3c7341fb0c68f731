"""What `pretrade canary` and `pretrade models` ask before they do it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from typing import Any, NoReturn

import grpc
from support.admin_server import AdminServer, RefusedError, admin_server
from typer.testing import CliRunner

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.client.cli.main import app

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
