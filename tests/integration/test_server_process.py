"""`python -m server` as a process: with nothing around it, with wrong settings, and when told to stop."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from support.bare_server import admin_channel, decide, environment, is_ready
from support.harness import eventually

from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = pytest.mark.stack


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server with nothing around it, and its decision port."""
    env = environment(tmp_path, PRETRADE_SHIPPING__DRAIN_SECONDS="60")  # the shipping process may just be starting
    port = int(env["PRETRADE_GRPC__PORT"])
    with subprocess.Popen([sys.executable, "-m", "server"], env=env, stderr=subprocess.PIPE) as process:
        try:
            eventually(lambda: is_ready(port), bool)
            yield process, port
        finally:
            process.kill()


def run(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A server that is expected to refuse to start."""
    return subprocess.run(
        [sys.executable, "-m", "server"], env=env, capture_output=True, text=True, timeout=60, check=False
    )


def test_with_nothing_around_it_every_order_gets_an_audited_abstain(
    alone: tuple[subprocess.Popen[bytes], int], tmp_path: Path
) -> None:
    process, port = alone
    decision = decide(port)
    assert (decision.action, decision.source) == (pb.ACTION_ABSTAIN, pb.SOURCE_NONE)
    assert pb.REASON_CODE_FEATURES_MISSING in decision.reasons
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 0
    with closing(sqlite3.connect(tmp_path / "audit.db")) as database:
        ids = [row[0] for row in database.execute("SELECT decision_id FROM decisions")]
    assert ids == [decision.decision_id]


@pytest.mark.long
def test_its_log_is_json_with_one_line_for_a_degraded_decision(alone: tuple[subprocess.Popen[bytes], int]) -> None:
    process, port = alone
    decision = decide(port)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=30)
    lines = [json.loads(line) for line in log.splitlines()]
    assert "started" in {line["event"] for line in lines}
    assert [line["event"] for line in lines if line.get("decision_id") == decision.decision_id] == ["decision"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"PRETRADE_BUDGET__CAP_SECONDS": "-1"}, "PRETRADE_BUDGET__CAP_SECONDS"),
        ({"PRETRADE_BUDGET__CAP_SECOND": "1"}, "PRETRADE_BUDGET__CAP_SECOND"),
        ({"PRETRADE_BUGDET__CAP_SECONDS": "1"}, "PRETRADE_BUGDET__CAP_SECONDS"),
        ({"PRETRADE_ADMIN__HOST": "0.0.0.0"}, "loopback"),
        ({"PRETRADE_BUDGET__CAP_SECONDS": "0.001"}, "reserves"),
        ({"PRETRADE_BUDGET__REPLY_RESERVE_SECONDS": "0.5"}, "reply_reserve_seconds"),
        ({"PRETRADE_REDIS_URL": "garbage"}, "PRETRADE_REDIS_URL"),
        ({"PRETRADE_DATABASE_URL": "mysql://x"}, "PRETRADE_DATABASE_URL"),
        ({"PRETRADE_REPLICAS__PRIMARY": "noport"}, "PRETRADE_REPLICAS__PRIMARY"),
        ({"PRETRADE_INSTRUMENTS": "[]"}, "PRETRADE_INSTRUMENTS"),
        ({"PRETRADE_INSTRUMENTS": '["garbage"]'}, "PRETRADE_INSTRUMENTS"),
    ],
)
def test_wrong_settings_refuse_to_start_and_name_the_variable(
    tmp_path: Path, changes: dict[str, str], complaint: str
) -> None:
    refused = run(environment(tmp_path, **changes))
    assert refused.returncode == 2
    assert complaint in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_port_in_use_is_said_plainly(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = run(environment(tmp_path, PRETRADE_GRPC__PORT=str(port)))
    assert refused.returncode == 1
    assert f"127.0.0.1:{port}" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_second_server_on_the_same_journal_is_refused(
    alone: tuple[subprocess.Popen[bytes], int], tmp_path: Path
) -> None:
    refused = run(environment(tmp_path))
    assert refused.returncode == 1
    assert "journal" in refused.stderr


def test_a_halted_server_comes_back_halted_even_from_kill_9(tmp_path: Path) -> None:
    env = environment(tmp_path)
    for expected in (admin_pb2.TRADING_STATE_ACTIVE, admin_pb2.TRADING_STATE_HALTED):
        with subprocess.Popen([sys.executable, "-m", "server"], env=env, stderr=subprocess.DEVNULL) as process:
            try:
                eventually(lambda: is_ready(int(env["PRETRADE_GRPC__PORT"])), bool)
                with admin_channel(env) as channel:
                    admin = admin_pb2_grpc.AdminServiceStub(channel)
                    found = admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=5.0, wait_for_ready=True)
                    assert found.trading_state == expected
                    halt = admin_pb2.SetTradingStateRequest(
                        state=admin_pb2.TRADING_STATE_HALTED, author="test", reason="test"
                    )
                    admin.SetTradingState(halt, timeout=5.0)
            finally:
                process.kill()


def test_a_control_state_that_cannot_be_read_halts_trading(tmp_path: Path) -> None:
    env = environment(tmp_path)
    (tmp_path / "journal.db.control.json").write_text("{")
    with subprocess.Popen([sys.executable, "-m", "server"], env=env, stderr=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: is_ready(int(env["PRETRADE_GRPC__PORT"])), bool)
            assert pb.REASON_CODE_TRADING_HALTED in decide(int(env["PRETRADE_GRPC__PORT"])).reasons
        finally:
            process.kill()


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux makes huge pages of small ones")
def test_no_process_of_a_server_waits_for_huge_pages(tmp_path: Path) -> None:
    env = environment(tmp_path, PRETRADE_GRPC__EDGE="envoy")
    with subprocess.Popen([sys.executable, "-m", "server"], env=env, stderr=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: is_ready(int(env["PRETRADE_GRPC__PORT"])), bool)
            every = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            status = {one.name(): Path(f"/proc/{one.pid}/status").read_text() for one in every}
        finally:
            process.kill()
    assert "envoy" in status
    assert [name for name, text in status.items() if "THP_enabled:\t0\n" not in text] == []
