"""`pretrade breaker | flag | state | replica | chain | changes` against a real server."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import grpc
import pytest
from support.decision_server import DecisionServer
from support.harness import eventually
from support.tcp_proxy import TcpProxy
from typer.testing import CliRunner, Result

from local.stack.stack import Stack
from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.client.cli.main import app
from server.errors import ChangeInDoubtError

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def shared_server(servers: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DecisionServer]:
    with DecisionServer(tmp_path_factory.mktemp("steered"), str(servers.endpoints.redis_url)) as server:
        yield server


@pytest.fixture
def server(shared_server: DecisionServer) -> Iterator[DecisionServer]:
    yield shared_server
    for words in (
        ("state", "active"),
        ("chain", "--default"),
        ("flag", "shadow", "on"),
        ("replica", "resume", "primary"),
    ):
        assert run(shared_server, *words, *(("--yes",) if words[0] in ("state", "chain") else ())).exit_code == 0


def environment(server: DecisionServer) -> dict[str, str]:
    """Has the command find the server's operator token, as in the server's own container."""
    return {"COLUMNS": "200", "PRETRADE_JOURNAL__PATH": str(server.journal_path)}


def run(server: DecisionServer, *words: str) -> Result:
    return CliRunner().invoke(app, [*words, "--target", server.admin_address], env=environment(server))


def version(server: DecisionServer) -> int:
    return server.status().control_version


def test_what_hurts_is_asked_for_and_what_protects_is_not(server: DecisionServer) -> None:
    halted = run(server, "state", "halted", "--reason", "incident", "--author", "ann")
    assert (halted.exit_code, halted.stdout.splitlines()[0]) == (0, "trading_state: ACTIVE → HALTED")
    assert server.status().trading_state == admin_pb2.TRADING_STATE_HALTED
    before = version(server)
    for words in (
        ("state", "active"),
        ("breaker", "primary", "closed"),
        ("breaker", "primary", "open"),
        ("replica", "drain", "secondary"),
        ("chain", "rules"),
    ):
        refused = run(server, *words)
        assert (refused.exit_code, "--yes" in refused.output) == (1, True), words
    assert version(server) == before
    assert run(server, "replica", "drain", "challenger").exit_code == 0
    assert run(server, "state", "active", "--yes").exit_code == 0
    assert server.status().trading_state == admin_pb2.TRADING_STATE_ACTIVE


@pytest.mark.parametrize(("answer", "code", "state"), [("y", 0, "ACTIVE"), ("n", 1, "HALTED")])
def test_on_a_terminal_it_asks_and_does_as_it_is_told(
    server: DecisionServer, answer: str, code: int, state: str
) -> None:
    run(server, "state", "halted")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "local", "state", "active", "--target", server.admin_address]
    try:
        env = os.environ | environment(server)
        asked = subprocess.Popen(command, env=env, stdin=theirs, stdout=subprocess.PIPE, text=True)
        os.write(ours, f"{answer}\n".encode())
        said, _ = asked.communicate(timeout=120)
    finally:
        os.close(ours)
        os.close(theirs)
    assert asked.returncode == code
    assert "trading_state: HALTED → ACTIVE\nlifts HALTED by " in said
    assert "\nOrders may trade again." in said
    assert run(server, "state").stdout.split()[0] == state


def test_one_of_two_halts_is_lifted_by_its_id_and_the_other_one_stays(server: DecisionServer) -> None:
    ann, ben = [
        json.loads(run(server, "state", "halted", "--author", who, "--reason", why, "--json").stdout)["change"][
            "changeId"
        ]
        for who, why in (("ann", "exchange incident"), ("ben", "model looks wrong"))
    ]
    (line,) = [line for line in run(server, "state").stdout.splitlines() if "ann" in line]
    assert ("exchange incident" in line, ann in line) == (True, True)
    lifted = run(server, "state", "active", "--lift", ann, "--yes")
    assert lifted.exit_code == 0
    assert "stays HALTED by ben: model looks wrong" in lifted.stdout
    shown = run(server, "state").stdout
    assert (shown.split()[0], "ann" in shown, "ben" in shown) == ("HALTED", False, True)
    unknown = run(server, "state", "active", "--lift", "no-such-id", "--yes")
    assert (unknown.exit_code, "no-such-id" in unknown.output) == (1, True)
    assert run(server, "state", "active", "--lift", ben, "--yes").exit_code == 0
    assert run(server, "state").stdout.strip() == "ACTIVE"


class NobodyKnows(admin_pb2_grpc.AdminServiceServicer):
    """A server that was not told by Redis what became of a change."""

    def GetControl(self, request: admin_pb2.GetControlRequest, context: Any) -> admin_pb2.GetControlResponse:
        return admin_pb2.GetControlResponse(trading_state=admin_pb2.TRADING_STATE_HALTED)

    def SetTradingState(self, request: admin_pb2.SetTradingStateRequest, context: Any) -> NoReturn:
        context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(ChangeInDoubtError("id-7", "Redis does not answer")))
        raise AssertionError


def test_a_change_of_which_nobody_knows_whether_it_was_made_has_an_exit_code_of_its_own() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    admin_pb2_grpc.add_AdminServiceServicer_to_server(NobodyKnows(), server)  # type: ignore[abstract]
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        doubtful = CliRunner().invoke(app, ["state", "active", "--yes", "--target", address])
    finally:
        server.stop(None)
    assert (doubtful.exit_code, doubtful.output.count("not known whether the change was made")) == (7, 1)
    assert "id-7" in doubtful.output


class Hangs(admin_pb2_grpc.AdminServiceServicer):
    """A server that takes a call and does not answer it in time."""

    def GetControl(self, request: admin_pb2.GetControlRequest, context: grpc.ServicerContext) -> NoReturn:
        context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
        raise AssertionError

    def SetFlag(self, request: admin_pb2.SetFlagRequest, context: grpc.ServicerContext) -> NoReturn:
        self.GetControl(admin_pb2.GetControlRequest(), context)


def test_a_server_that_does_not_answer_in_time_leaves_a_doubt_of_changes_alone() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    admin_pb2_grpc.add_AdminServiceServicer_to_server(Hangs(), server)  # type: ignore[abstract]
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        read = CliRunner().invoke(app, ["state", "--target", address])
        dry = CliRunner().invoke(app, ["flag", "shadow", "off", "--dry-run", "--target", address])
        change = CliRunner().invoke(app, ["flag", "shadow", "off", "--target", address])
    finally:
        server.stop(None)
    assert (read.exit_code, read.output) == (3, f"{address} did not answer in time\n")
    assert (dry.exit_code, dry.output) == (3, f"{address} did not answer in time\n")
    assert (change.exit_code, change.output.count("not known whether the change was made")) == (7, 1)


def test_a_connection_that_breaks_midway_leaves_it_unknown_whether_the_change_was_made() -> None:
    made: list[admin_pb2.SetFlagRequest] = []

    class Breaks(admin_pb2_grpc.AdminServiceServicer):
        """Does what it is asked to, and cannot say so any more."""

        def SetFlag(
            self, request: admin_pb2.SetFlagRequest, context: grpc.ServicerContext
        ) -> admin_pb2.SetFlagResponse:
            made.append(request)
            proxy.reset_all()
            return admin_pb2.SetFlagResponse()

    server = grpc.server(ThreadPoolExecutor(1))
    admin_pb2_grpc.add_AdminServiceServicer_to_server(Breaks(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with TcpProxy(f"127.0.0.1:{port}") as proxy:
            found = CliRunner().invoke(app, ["flag", "shadow", "off", "--target", proxy.address])
    finally:
        server.stop(None)
    assert len(made) == 1
    assert (found.exit_code, "not known whether the change was made" in found.output) == (7, True), found.output


def test_a_dry_run_says_what_would_change_and_an_old_version_is_refused(server: DecisionServer) -> None:
    before = version(server)
    tried = run(server, "flag", "shadow", "off", "--for", "10m", "--dry-run")
    assert (tried.exit_code, tried.stdout.splitlines()[0]) == (
        0,
        "flag/shadow: on → off for 600 s, then on  (dry run)",
    )
    assert version(server) == before
    old = run(server, "flag", "shadow", "off", "--expect", str(before + 7))
    assert (old.exit_code, "ABORTED" in old.output) == (4, True)
    assert run(server, "flag", "shadow", "off", "--expect", str(before)).exit_code == 0
    assert not server.status().flags[0].enabled


def test_what_is_set_for_a_time_reverts_by_itself(server: DecisionServer) -> None:
    assert run(server, "flag", "shadow", "off", "--for", "1s").exit_code == 0
    eventually(lambda: server.status().flags[0].enabled, bool)
    eventually(lambda: run(server, "changes", "flag/shadow").stdout, lambda shown: "expiry" in shown)


def test_a_drained_replica_and_another_chain_are_shown_and_obeyed(server: DecisionServer) -> None:
    drained = run(server, "replica", "drain", "primary", "--yes", "--json")
    assert json.loads(drained.stdout)["replica"]["drained"] is True
    assert "DRAINED" in run(server, "replica", "list").stdout
    assert run(server, "chain").stdout.strip() == "model → embedded → cached_score → rules → abstain"
    assert run(server, "chain", "rules", "model", "--yes").exit_code == 0
    assert run(server, "chain").stdout.strip() == "rules → model → abstain"
    assert run(server, "chain", "rules", "rules", "--yes").exit_code == 1
    assert run(server, "chain", "sorcery", "--yes").exit_code == 2


def test_the_history_says_who_why_and_what_and_survives_a_restart(server: DecisionServer, tmp_path: Path) -> None:
    run(server, "state", "reducing", "--author", "ben", "--reason", "thin [market]")
    run(server, "state", "halted", "--author", "ann", "--reason", "it got worse")
    server.stop()
    server.start()
    shown = json.loads(run(server, "changes", "trading_state", "--json", "--limit", "2").stdout)
    assert [(one["author"], one["reason"], one["diff"]) for one in shown["changes"]] == [
        ("ann", "it got worse", ["trading_state: REDUCING → HALTED"]),
        ("ben", "thin [market]", ["trading_state: ACTIVE → REDUCING"]),
    ]
    token = shown["nextPageToken"]
    page = server.admin.ListChanges(admin_pb2.ListChangesRequest(page_size=1, page_token=token), timeout=10)
    assert page.changes[0].changed_at.ToNanoseconds() > 0
    assert run(server, "changes", "no_such_thing").exit_code == 2
    server.drain_audit()
    assert json.loads(run(server, "changes", "trading_state", "--json", "--limit", "2").stdout) == shown


def test_a_server_that_is_not_there_has_an_exit_code_of_its_own() -> None:
    for words in (("state",), ("flag",), ("replica", "list"), ("changes",)):
        assert CliRunner().invoke(app, [*words, "--target", "127.0.0.1:9"]).exit_code == 3
    assert CliRunner().invoke(app, ["flag", "shadow", "off", "--for", "soon"]).exit_code == 2


def test_the_help_documents_the_exit_codes_and_completion_can_be_installed() -> None:
    for words in (["state"], ["breaker"], ["replica", "drain"], ["changes"]):
        assert "Exit codes" in CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"}).stdout
    assert "--install-completion" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
