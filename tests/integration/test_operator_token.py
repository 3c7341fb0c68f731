"""Steering without credentials of one's own: the operator token, and whose a server's files are."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from support.bare_server import admin_channel
from support.harness import eventually
from support.server_group import RARELY_ON_GRPC_AIO, Callers, Group, server_group

from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.client import operator_token

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module", params=RARELY_ON_GRPC_AIO)
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    directory = tmp_path_factory.mktemp(f"operator-{request.param}")
    before = os.umask(0o022)  # as most users have it
    try:
        with server_group(directory, 2, PRETRADE_GRPC__EDGE=request.param) as group:
            yield group
    finally:
        os.umask(before)


def token_file(group: Group) -> Path:
    return operator_token.path_from(group.env)


def halt(channel: grpc.Channel, token: str | None = None) -> admin_pb2.SetTradingStateResponse:
    request = admin_pb2.SetTradingStateRequest(state=admin_pb2.TRADING_STATE_HALTED, author="ann", reason="test")
    shown = () if token is None else (("authorization", f"Bearer {token}"),)
    return admin_pb2_grpc.AdminServiceStub(channel).SetTradingState(request, timeout=5.0, metadata=shown)


@pytest.mark.parametrize(
    ("shown", "reason"),
    [(None, "NO_TOKEN"), ("x" * 43, "WRONG_OPERATOR_TOKEN"), ("", "WRONG_OPERATOR_TOKEN")],
)
def test_whoever_has_not_the_token_steers_nothing(group: Group, shown: str | None, reason: str) -> None:
    """As what runs beside the server in its pod has not."""
    with grpc.insecure_channel(f"127.0.0.1:{group.env['PRETRADE_ADMIN__PORT']}") as channel:
        with pytest.raises(grpc.RpcError) as refused:
            halt(channel, shown)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        info = error_details_pb2.ErrorInfo()
        assert rpc_status.from_call(refused.value).details[0].Unpack(info)  # type: ignore[arg-type]  # a call as well
        assert info.reason == reason
    assert group.status().trading_state == admin_pb2.TRADING_STATE_ACTIVE


def test_whoever_has_it_says_who_he_is(group: Group) -> None:
    with admin_channel(group.env) as channel:
        assert halt(channel).change.author == "ann"
        known = admin_pb2_grpc.AdminServiceStub(channel).GetCaller(admin_pb2.GetCallerRequest(), timeout=5.0)
        assert known.states_author
        assert "admin" in known.roles
        back = admin_pb2.SetTradingStateRequest(state=admin_pb2.TRADING_STATE_ACTIVE, author="bob", reason="test")
        assert admin_pb2_grpc.AdminServiceStub(channel).SetTradingState(back, timeout=5.0).change.author == "bob"


def test_failures_of_others_keep_nobody_out(group: Group) -> None:
    """A neighbour that tries for ever must not keep on-call from halting."""
    with grpc.insecure_channel(f"127.0.0.1:{group.env['PRETRADE_ADMIN__PORT']}") as channel:
        for _ in range(100):
            with pytest.raises(grpc.RpcError):
                halt(channel, "guess")
    assert group.status().ready


def test_the_command_finds_the_token_where_the_server_runs(group: Group) -> None:
    target = f"127.0.0.1:{group.env['PRETRADE_ADMIN__PORT']}"

    def ask(**env: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PRETRADE_")}
        command = [sys.executable, "-m", "local", "status", "--once", "--json", "--target", target]
        return subprocess.run(command, env=clean | env, capture_output=True, text=True, timeout=60, check=False)

    found = ask(PRETRADE_JOURNAL__PATH=group.env["PRETRADE_JOURNAL__PATH"])
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["processCount"] == 2
    elsewhere = ask()
    assert elsewhere.returncode == 1
    assert "UNAUTHENTICATED" in elsewhere.stderr
    assert "operator-token" in elsewhere.stderr, "says what to do"


@pytest.mark.long
def test_processes_that_are_replaced_know_the_same_token_and_a_new_server_another(group: Group) -> None:
    before = token_file(group).read_text()
    group.replace()
    assert token_file(group).read_text() == before
    assert eventually(group.status, lambda status: status.ready)


def test_whatever_a_server_writes_is_its_own_users_alone(group: Group) -> None:
    """Every file in its directories, after decisions, changes, refusals and shipping; whatever the umask was."""
    with Callers(group.decision, count=2) as callers:
        callers.wait_for_more(20)
    with admin_channel(group.env) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        flag = admin_pb2.SetFlagRequest(name="shadow", enabled=False, author="ann", reason="test")
        stub.SetFlag(flag, timeout=5.0)
    eventually(group.audited, bool)
    group.supervisor.send_signal(signal.SIGHUP)  # a journal changes hands
    eventually(lambda: len(list(group.directory.glob("journal.db.?"))), lambda found: found == 3)
    found = {
        path.relative_to(group.directory).as_posix(): path.stat().st_mode
        for path in group.directory.rglob("*")
        if path.name != "server.log"  # the test's own, of what the server says
    }
    names = set(found)
    assert {"audit.db", "journal.db.0", "journal.db.operator-token", "journal.db.control.json"} <= names
    assert any(name.endswith(".lock") for name in names)
    open_to_others = {name: stat.filemode(mode) for name, mode in found.items() if mode & 0o077}
    assert not open_to_others


@pytest.mark.long
def test_a_token_that_cannot_be_written_keeps_a_server_from_starting(tmp_path: Path) -> None:
    from support.bare_server import environment  # noqa: PLC0415

    (tmp_path / "journal.db.operator-token").mkdir()
    env = environment(tmp_path)
    ended = subprocess.run([sys.executable, "-m", "server"], env=env, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert b"operator-token" in ended.stderr
