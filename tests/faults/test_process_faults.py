"""Server processes that are replaced, killed or told to stop at any moment."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import grpc
import psutil
import pytest
from support.bare_server import admin_channel, environment, is_ready
from support.every_way import EveryWay
from support.harness import INSTRUMENTS, MID, Product, eventually
from support.server_group import (
    EDGES,
    RARELY_ON_GRPC_AIO,
    Callers,
    Group,
    beside,
    order,
    reply_statuses,
    server_group,
)
from support.up_command import assert_gone

from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.audit.v1 import packet_pb2
from pretrade.client import Client
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from server.journal.entries import decision_ids, entry_of, singly
from server.journal.journal_file import JournalReader

pytestmark = pytest.mark.stack
Seen = Callable[[str], None]


def replaced_under_load(product: Product, directory: Path, edge: str, times: int, seen: Seen) -> None:
    """Replaces all processes again and again under load: no call may fail, every reply must be audited, once."""
    with server_group(directory, 2, PRETRADE_GRPC__EDGE=edge, **beside(product)) as group:
        with (
            Callers(group.decision) as callers,
            Callers(group.decision, sharing=True, name="shared") as shared,
        ):
            callers.wait_for_more(200)
            shared.wait_for_more(200)
            for _ in range(times):
                group.replace()
            callers.wait_for_more(200)
            shared.wait_for_more(200)
        assert group.stop() == 0
        decisions, errors = [*callers.decisions, *shared.decisions], [*callers.errors, *shared.errors]
        seen(f"{len(decisions)} orders, {len(errors)} without decision, {times} replacements of 2 processes")
        assert errors == [], Counter(errors)
        assert pb.SOURCE_PRIMARY in {decision.source for decision in decisions}
        audited = group.audited()
        assert audited == {decision.order_ref: [decision.decision_id] for decision in decisions}
        group.verify()
        seen(f"{len(audited)} audit rows, one for each reply; chains sound")


@pytest.mark.long
@pytest.mark.fault(
    "F3",
    "Servers are replaced one by one under load",
    "No call fails, with the client library. The audit has one row for each reply.",
)
@pytest.mark.parametrize("edge", EDGES)
def test_a_rolling_restart_under_load_loses_no_call(product: Product, tmp_path: Path, edge: str, seen: Seen) -> None:
    replaced_under_load(product, tmp_path, edge, 1, seen)


@pytest.mark.long
@pytest.mark.timeout(600)  # twenty processes load
@pytest.mark.fault(
    "F3",
    "Ten rolling restarts under load",
    "No call fails, with the client library. The audit has one row for each reply.",
)
@pytest.mark.parametrize("edge", EDGES)
def test_ten_rolling_restarts_under_load_lose_no_call(product: Product, tmp_path: Path, edge: str, seen: Seen) -> None:
    replaced_under_load(product, tmp_path, edge, 10, seen)


@pytest.mark.long
@pytest.mark.fault(
    "F3",
    "SIGTERM while a caller holds a stream open",
    "The server ends within drain and grace time, ships its rows and exits with 0.",
)
@pytest.mark.parametrize("edge", EDGES)
def test_draining_ends_in_time_whoever_holds_on(tmp_path: Path, edge: str, seen: Seen) -> None:
    drain, grace = 0.2, 1.0
    changes = {
        "PRETRADE_GRPC__EDGE": edge,
        "PRETRADE_GRPC__GRACE_SECONDS": str(grace),
        "PRETRADE_GRPC__DRAIN_SECONDS": str(drain),
    }
    with server_group(tmp_path, 2, **changes) as group, grpc.insecure_channel(group.decision) as channel:
        answers = decision_pb2_grpc.DecisionServiceStub(channel).DecideStream(never_ending())
        answered = next(answers).result
        started = time.monotonic()
        assert group.stop() == 0
        seconds = time.monotonic() - started
        with pytest.raises(grpc.RpcError) as ended:
            list(answers)
        assert ended.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        seen(f"ended after {seconds:.2f} s of {drain + grace} s and what ending processes takes")
        assert seconds < drain + grace + 3.0
        assert group.audited() == {"one": [answered.decision.decision_id]}


def never_ending() -> Iterator[pb.DecideStreamRequest]:
    """One order, then silence on an open stream."""
    order = pb.Order(order_ref="one", instrument=INSTRUMENTS[0], side=pb.SIDE_BUY, quantity=1.0, strategy="test")
    yield pb.DecideStreamRequest(order=order)
    time.sleep(30)


@pytest.mark.long
@pytest.mark.fault("F3", "A second SIGTERM", "All processes end at once.")
@pytest.mark.parametrize(("processes", "edge"), [(None, "grpcio"), (2, "grpcio"), (1, "envoy")])
def test_a_second_sigterm_ends_at_once(tmp_path: Path, processes: int | None, edge: str, seen: Seen) -> None:
    env = environment(tmp_path, PRETRADE_GRPC__DRAIN_SECONDS="60", PRETRADE_GRPC__EDGE=edge)
    argv = [sys.executable, "-m", "server", *(("--processes", str(processes)) if processes else ())]
    with subprocess.Popen(argv, env=env, stderr=subprocess.PIPE) as server:
        try:
            eventually(lambda: is_ready(int(env["PRETRADE_GRPC__PORT"])), bool)
            family = psutil.Process(server.pid).children(recursive=True)
            server.terminate()
            assert server.stderr is not None
            eventually(server.stderr.readline, lambda line: b'"draining"' in line)
            started = time.monotonic()
            server.terminate()
            assert server.wait(10) == 128 + signal.SIGTERM
            seen(f"ended {time.monotonic() - started:.2f} s into a drain of 60 s")
            assert_gone(family)
        finally:
            server.kill()


@pytest.mark.long
@pytest.mark.fault(
    "F3", "SIGTERM during the start", "The server ends at once and leaves no process behind. The next start works."
)
@pytest.mark.parametrize("edge", EDGES)
def test_sigterm_during_start_is_clean(tmp_path: Path, edge: str, seen: Seen) -> None:
    env = environment(tmp_path, PRETRADE_GRPC__EDGE=edge)
    argv = [sys.executable, "-m", "server", "--processes", "2"]
    endings = []
    for after_seconds in (None, 0.0, 0.7):
        with subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, start_new_session=True) as server:
            assert server.stderr is not None
            if after_seconds is not None:
                eventually(server.stderr.readline, lambda line: b"supervising" in line)
            with pytest.raises(subprocess.TimeoutExpired):
                server.wait(after_seconds or 0.0)
            server.terminate()
            endings.append(server.wait(20))
        eventually(lambda: session_members(server.pid), lambda left: not left)
    seen(f"exit codes {endings}")
    # Before the interpreter has got as far as our handlers the signal simply ends it.
    assert endings == [-signal.SIGTERM, 0, 0]
    with server_group(tmp_path, 2) as group:
        assert group.stop() == 0


@pytest.mark.long
@pytest.mark.fault(
    "D5",
    "24 connections to two processes use one idempotency key, and again after both were replaced",
    "One decision and one row, returned 48 times.",
)
@pytest.mark.parametrize("edge", EDGES)
def test_a_key_is_decided_once_whichever_process_is_asked(tmp_path: Path, edge: str, seen: Seen) -> None:
    order = pb.Order(
        order_ref="same", instrument=INSTRUMENTS[0], side=pb.SIDE_BUY, quantity=1.0, strategy="t", idempotency_key="k"
    )
    changes = {"PRETRADE_GRPC__EDGE": edge, "PRETRADE_IDEMPOTENCY__WINDOW_SECONDS": "600"}
    with server_group(tmp_path, 2, **changes) as group:

        def ask(_: int) -> bytes:
            # A process that is just ending resets calls that cross its GOAWAY, which the client repeats.
            with Client.connect(group.decision, deadline_seconds=10.0) as client:
                return client.decide(order).message.SerializeToString(deterministic=True)

        with ThreadPoolExecutor(24) as pool:
            told = set(pool.map(ask, range(24)))
            group.replace()
            told |= set(pool.map(ask, range(24)))
        (decision,) = told
        assert group.stop() == 0
        assert {*journaled(tmp_path), *shipped(tmp_path)} - {""} == {pb.Decision.FromString(decision).decision_id}
        seen("1 decision, 1 audit row, told 48 times")


@pytest.mark.long
@pytest.mark.fault(
    "D5",
    "Trading is halted between a call and its repeats",
    "The repeats get NO_TRADE on every process. The change is noted in the audit, in the same row.",
)
@pytest.mark.parametrize("edge", EDGES)
def test_a_halt_holds_for_repeats_whichever_process_is_asked(
    product: Product, tmp_path: Path, edge: str, seen: Seen
) -> None:
    order = pb.Order(
        order_ref="same",
        instrument=INSTRUMENTS[0],
        side=pb.SIDE_BUY,
        quantity=0.01,
        limit_price=MID,
        strategy="t",
        idempotency_key="k",
    )
    changes = {"GRPC__EDGE": edge, "IDEMPOTENCY__WINDOW_SECONDS": "600", "CHAIN__STAGES": '["rules"]'}
    # What is tested is what is answered: on a busy machine 25 ms may pass before anything is durable.
    changes |= {"BUDGET__CAP_SECONDS": "2", "BUDGET__AUDIT_RESERVE_SECONDS": "0.5"}
    settings = beside(product) | {f"PRETRADE_{name}": value for name, value in changes.items()}
    with server_group(tmp_path, 2, **settings) as group:

        def ask(_: int = 0) -> pb.Decision:
            with Client.connect(group.decision, deadline_seconds=10.0) as client:
                return client.decide(order).message

        eventually(lambda: group.status().features, lambda found: all(one.usable for one in found))
        first = ask()
        assert first.action == pb.ACTION_TRADE
        assert ask() == first
        with group.admin() as admin:
            halted = admin_pb2.TRADING_STATE_HALTED
            request = admin_pb2.SetTradingStateRequest(state=halted, author="test", reason="fault")
            admin.SetTradingState(request, timeout=5.0)
        version = group.status().control_version
        eventually(lambda: {one.control_version for one in group.status().processes}, lambda found: found == {version})
        with ThreadPoolExecutor(16) as pool:
            heard = {decision.SerializeToString(deterministic=True) for decision in pool.map(ask, range(16))}
        (repeat,) = (pb.Decision.FromString(decision) for decision in heard)
        assert (repeat.decision_id, repeat.action) == (first.decision_id, pb.ACTION_NO_TRADE)
        assert repeat.reasons == [*first.reasons, pb.REASON_CODE_TRADING_HALTED]
        assert group.stop() == 0
        assert {*journaled(tmp_path), *shipped(tmp_path)} - {""} == {first.decision_id}
        written = [entry for path in tmp_path.glob("journal.db.[012]") for entry in journal_entries(path)]
        with closing(sqlite3.connect(tmp_path / "audit.db")) as database:
            kept = [row[0] for row in database.execute("SELECT entry FROM journal_entries")]
        written += [entry_of(entry) for entry in kept]
        notes = [entry.reply_unconfirmed for entry in written if entry.HasField("reply_unconfirmed")]
        found = {(note.cause, note.heard_action) for note in notes}
        assert found - {("repeated", pb.ACTION_UNSPECIFIED)} == {("withdrawn", pb.ACTION_NO_TRADE)}
        seen("16 of 16 heard NO_TRADE, 1 row, noted")


@pytest.mark.long
@pytest.mark.fault(
    "F3",
    "A service manager sends SIGTERM to every process at once",
    "The server drains, ships its audit rows and exits with 0.",
)
@pytest.mark.parametrize("edge", EDGES)
def test_processes_that_are_told_to_end_themselves_drain(tmp_path: Path, edge: str, seen: Seen) -> None:
    with server_group(tmp_path, 2, PRETRADE_GRPC__EDGE=edge) as group:
        with Callers(group.decision, deadline_seconds=2.0) as callers:
            callers.wait_for_more(100)
            for pid in (*group.pids(), group.supervisor.pid):
                os.kill(pid, signal.SIGTERM)
            assert group.supervisor.wait(60) == 0
        answered = {decision.decision_id for decision in callers.decisions}
        assert group.log().count('"draining"') == 2
        # What could not be shipped in the time that draining may take is in a journal still.
        assert answered <= {*journaled(tmp_path), *shipped(tmp_path)}
        seen(f"{len(answered)} answers, each in the audit")


def journaled(directory: Path) -> Iterator[str]:
    """The decisions in the journals of two processes and the one that replaces them."""
    for path in directory.glob("journal.db.[012]"):
        for entry in journal_entries(path):
            yield entry.decision.decision.decision_id


def journal_entries(path: Path) -> Iterator[packet_pb2.JournalEntry]:
    """What is in a journal that nobody writes."""
    with closing(JournalReader(path)) as journal:
        for row in journal.rows_after(0, 100_000):
            yield from singly(entry_of(row.entry))


def shipped(directory: Path) -> Iterator[str]:
    """The decisions in SQL."""
    with closing(sqlite3.connect(directory / "audit.db")) as database, suppress(sqlite3.OperationalError):  # no tables
        yield from (row[0] for row in database.execute("SELECT decision_id FROM decisions"))


def session_members(session: int) -> list[int]:
    members = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
        except (ProcessLookupError, psutil.Error):
            continue
    return members


@pytest.mark.fault(
    "F3",
    "One of two server processes is killed with SIGKILL under load",
    "No call fails, with the client library: the other process answers. Every order is in the audit once. The process "
    "is restarted and takes its journal over.",
)
@pytest.mark.parametrize("edge", RARELY_ON_GRPC_AIO)
def test_a_killed_process_costs_no_call_and_is_started_again_with_its_journal(
    tmp_path: Path, edge: str, seen: Seen
) -> None:
    with server_group(tmp_path, 2, PRETRADE_GRPC__EDGE=edge) as group:
        before = group.processes()
        with (
            Callers(group.decision) as callers,
            Callers(group.decision, sharing=True, name="shared") as shared,
        ):
            callers.wait_for_more(100)
            shared.wait_for_more(100)
            os.kill(group.pids()[0], signal.SIGKILL)
            started = time.monotonic()
            after = eventually(group.processes, lambda found: len(found) == 2 and found != before)
            seconds = time.monotonic() - started
            callers.wait_for_more(100)
            shared.wait_for_more(100)
        assert set(after) == set(before)
        assert len(set(after.values()) & set(before.values())) == 1
        assert sorted(one.restarts for one in group.status().processes) == [0, 1]
        decisions, errors = [*callers.decisions, *shared.decisions], [*callers.errors, *shared.errors]
        seen(f"{len(errors)} of {len(decisions)} orders without decision; two processes again in {seconds:.1f} s")
        assert errors == [], Counter(errors)
        assert group.stop() == 0
        assert group.audited() == {decision.order_ref: [decision.decision_id] for decision in decisions}
        group.verify()


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.fault(
    "F3",
    "Callers ask in every way that Python has, while both processes are replaced and one is killed with SIGKILL",
    "No call fails, with the client library. Every order is in the audit once.",
)
@pytest.mark.parametrize("edge", EDGES)
def test_no_way_of_asking_loses_a_call_with_a_process(tmp_path: Path, edge: str, seen: Seen) -> None:
    # This is about who answers, not how fast: what starts takes the cores from what serves.
    changes = {"PRETRADE_GRPC__EDGE": edge, "PRETRADE_BUDGET__CAP_SECONDS": "5"}
    with server_group(tmp_path, 2, **changes) as group:
        with EveryWay(group.decision) as callers:
            callers.wait_for_more(20)
            group.replace()
            callers.wait_for_more(20)
            before = group.processes()
            os.kill(group.pids()[-1], signal.SIGKILL)  # the newest: the others may be on their way out
            eventually(group.processes, lambda found: len(found) == 2 and found != before, 120.0)
            callers.wait_for_more(20)
        assert group.stop() == 0
        seen(f"{len(callers.heard)} orders in seven ways, {len(callers.errors)} without decision")
        assert callers.errors == [], Counter(callers.errors)
        assert group.audited() == {one.order_ref: [one.decision_id] for one in callers.heard}


DIES_ONCE = """
import os, signal
from pathlib import Path
from server.decision.shared_keys import SharedKeys
publish = SharedKeys.decided
def die_once(self, *arguments):
    try:
        Path(os.environ["DIED"]).touch(exist_ok=False)
    except FileExistsError:
        return publish(self, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)
SharedKeys.decided = die_once
"""
"""For the interpreter of each process: the first of them that has made a decision durable dies before it says so."""


@pytest.mark.long
@pytest.mark.fault(
    "F3",
    "A process is killed with SIGKILL when a decision with a key is durable, before any other process knows of it",
    "The retry gets that decision from another process, which reads the dead one's journal. One row.",
)
def test_what_a_killed_process_had_made_durable_is_not_decided_again(tmp_path: Path, seen: Seen) -> None:
    dies = tmp_path / "dies"
    dies.mkdir()
    (dies / "sitecustomize.py").write_text(DIES_ONCE)
    with server_group(tmp_path, 2, PYTHONPATH=str(dies), DIED=str(tmp_path / "died")) as group:
        before = group.processes()
        with Client.connect(group.decision, deadline_seconds=10.0) as client:
            started = time.monotonic()
            decision = client.decide(order("one")).message
            seen(f"answered {time.monotonic() - started:.2f} s after the call, whose process died")
            assert (tmp_path / "died").exists()
            eventually(group.processes, lambda found: len(found) == 2 and found != before)
            assert client.decide(order("two")).order_ref == "two"
        assert group.stop() == 0
        audited = group.audited()
        assert audited.pop("one") == [decision.decision_id]
        assert len(audited.pop("two")) == 1
        assert reply_statuses(group)["one"] == "replied"
        group.verify()


@pytest.mark.long
@pytest.mark.fault(
    "F3",
    "Processes are killed with SIGKILL while all are being replaced, five times",
    "In the end the right number of new processes runs.",
)
def test_processes_killed_while_all_are_replaced_are_replaced_all_the_same(
    tmp_path: Path, seed: int, seen: Seen
) -> None:
    chance = random.Random(seed)
    with server_group(tmp_path, 2) as group:
        for _ in range(5):
            before = set(group.processes().values())
            victim = chance.choice(group.pids())
            group.supervisor.send_signal(signal.SIGHUP)
            time.sleep(chance.uniform(0.0, 1.5))  # a moment of the replacement: beginning, start, drain
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            group.wait_until_replaced(before)
            eventually(group.pids, lambda pids: len(pids) == 2)
        assert group.supervisor.poll() is None
        assert group.stop() == 0
        group.verify()
    seen(f"seed {seed}: two new processes each time, chains sound")


@pytest.mark.long
@pytest.mark.fault(
    "F3", "A server process hangs during its start", "It is killed after about a minute and started again."
)
def test_a_process_that_hangs_in_its_start_is_started_again(tmp_path: Path, seen: Seen) -> None:
    with server_group(tmp_path, 2, PRETRADE_STARTUP_PATIENCE_SECONDS="1") as group:
        victim, other = group.pids()
        os.kill(victim, signal.SIGKILL)
        pids = eventually(group.pids, lambda found: len(found) == 2 and victim not in found)
        (hanging,) = set(pids) - {other}
        os.kill(hanging, signal.SIGSTOP)
        began = time.monotonic()
        eventually(group.processes, lambda found: len(found) == 2, 120.0)
        took = time.monotonic() - began
        assert group.stop() == 0
        group.verify()
    seen(f"two processes again after {took:.0f} s")


@pytest.mark.long
@pytest.mark.fault("F3", "The supervisor is killed with SIGKILL", "Its processes drain and end.")
@pytest.mark.parametrize("edge", EDGES)
def test_processes_whose_supervisor_died_drain_and_end(tmp_path: Path, edge: str) -> None:
    with server_group(tmp_path, 2, PRETRADE_GRPC__EDGE=edge) as group:
        family = psutil.Process(group.supervisor.pid).children(recursive=True)
        group.supervisor.kill()
        group.supervisor.wait()
        assert_gone(family)


@pytest.mark.long
@pytest.mark.fault("F3", "A replacement process cannot start", "The old processes keep serving.")
@pytest.mark.parametrize("edge", EDGES)
def test_a_replacement_that_cannot_start_leaves_the_old_processes(tmp_path: Path, edge: str) -> None:
    with server_group(tmp_path, 2, PRETRADE_GRPC__EDGE=edge) as group:
        before = group.processes()
        (tmp_path / "journal.db.2").write_bytes(b"not a journal")
        group.supervisor.send_signal(signal.SIGHUP)
        eventually(group.log, lambda text: "the old ones stay" in text)
        assert group.processes() == before


@pytest.mark.long
@pytest.mark.fault("F3", "The database is down while processes are replaced", "Their journals are shipped later.")
def test_what_a_replaced_process_could_not_ship_is_shipped_for_it(tmp_path: Path, seen: Seen) -> None:
    (tmp_path / "audit.db").mkdir()  # no database can be opened there
    with server_group(tmp_path, 1, PRETRADE_SHIPPING__DRAIN_SECONDS="0.1") as group:
        with Callers(group.decision, count=2) as callers:
            callers.wait_for_more(50)
        group.replace()
        eventually(group.processes, lambda found: set(found) == {1})
        with closing(JournalReader(tmp_path / "journal.db.0")) as journal:
            left = sum(len(decision_ids(entry_of(row.entry))) for row in journal.rows_after(0, -1))
        assert left >= len(callers.decisions) >= 50
        (tmp_path / "audit.db").rmdir()
        audited = eventually(lambda: in_sql(group), lambda found: found >= len(callers.decisions))
        seen(f"{left} decisions left in a free place's journal, {audited} decisions in SQL afterwards")


def in_sql(group: Group) -> int:
    path = group.directory / "audit.db"
    try:
        return sum(map(len, group.audited().values())) if path.exists() else 0
    except sqlite3.OperationalError:  # no tables yet
        return 0


@pytest.mark.long
def test_one_admin_address_reaches_every_process(tmp_path: Path) -> None:
    with server_group(tmp_path, 2) as group:
        with admin_channel(group.env) as channel:
            admin = admin_pb2_grpc.AdminServiceStub(channel)
            halt = admin_pb2.SetTradingStateRequest(state=admin_pb2.TRADING_STATE_HALTED, author="t", reason="t")
            admin.SetTradingState(halt, timeout=5.0)
            force = admin_pb2.SetBreakerRequest(
                replica="primary", mode=admin_pb2.BREAKER_MODE_FORCED_OPEN, author="t", reason="t"
            )
            version = admin.SetBreaker(force, timeout=5.0).change.version
            eventually(group.status, lambda status: all(one.control_version == version for one in status.processes))
            stale = admin_pb2.SetTradingStateRequest(
                state=admin_pb2.TRADING_STATE_ACTIVE, author="t", reason="t", expected_control_version=version - 1
            )
            with pytest.raises(grpc.RpcError) as refused:
                admin.SetTradingState(stale, timeout=5.0)
            assert refused.value.code() is grpc.StatusCode.ABORTED
        status = group.status()
        assert (len(status.processes), status.process_count) == (2, 2)
        assert [one.answered for one in status.processes].count(True) == 1
        with Callers(group.decision) as callers:
            callers.wait_for_more(50)
        assert all(pb.REASON_CODE_TRADING_HALTED in decision.reasons for decision in callers.decisions)
        assert group.stop() == 0
    with server_group(tmp_path, 2) as group:
        status = group.status()
        assert status.trading_state == admin_pb2.TRADING_STATE_HALTED
        assert status.replicas[0].breaker_mode == admin_pb2.BREAKER_MODE_FORCED_OPEN


@pytest.mark.long
def test_ports_and_journals_of_another_server_are_refused(tmp_path: Path) -> None:
    with server_group(tmp_path, 1) as group:
        elsewhere = tmp_path / "other"
        elsewhere.mkdir()
        port = group.env["PRETRADE_GRPC__PORT"]
        for processes in ([], ["--processes", "2"]):
            env = environment(elsewhere, PRETRADE_GRPC__PORT=port)
            refused = subprocess.run(
                [sys.executable, "-m", "server", *processes], env=env, capture_output=True, timeout=60, check=False
            )
            assert refused.returncode == 1
            assert port.encode() in refused.stderr
        refused = subprocess.run(
            [sys.executable, "-m", "server", "--processes", "2"],
            env=environment(tmp_path),
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert refused.returncode == 1
        assert b"another supervisor" in refused.stderr
