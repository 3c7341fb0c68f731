"""The audit of a whole server, with real PostgreSQL and real disks, when either fails or the server is killed."""

from __future__ import annotations

import datetime as dt
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import psycopg
import pytest
import sqlalchemy as sa
from support.harness import EDGE, INSTRUMENTS, Load, Market, Product, deciding, eventually, stack_admin_channel
from typer.testing import CliRunner

from local.stack.errors import PartFailedError
from local.stack.settings import LocalSettings, secret
from local.stack.stack import Stack
from pretrade.admin.v1 import admin_pb2_grpc
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from server.audit.commands import app
from server.audit.reading.verify import Unreachable, verify
from server.decision.ids import made_at
from server.journal.entries import decision_ids, entry_of
from server.journal.journal_file import JournalReader, journals_of

pytestmark = pytest.mark.stack

SETTINGS = {
    "PRETRADE_GRPC__EDGE": EDGE,
    # Nobody but the rules answers: they say TRADE, so that a missing ABSTAIN would be seen, and need no replica.
    "PRETRADE_CHAIN__STAGES": '["rules"]',
    "PRETRADE_BUDGET__CAP_SECONDS": "1.5",  # as long as a busy machine may hold up a traced server
    "PRETRADE_BUDGET__AUDIT_RESERVE_SECONDS": "0.75",
    "PRETRADE_STARTUP_PATIENCE_SECONDS": "0",
    "PRETRADE_GRPC__DRAIN_SECONDS": "0",
}

HELD_UP = {pb.REASON_CODE_FEATURES_STALE, pb.REASON_CODE_FEATURES_MISSING, pb.REASON_CODE_AUDIT_LATE}
"""Reasons that say that this machine was busy elsewhere."""


@contextmanager
def serving(directory: Path, redis_url: str, database_url: str | None = None, **changes: str) -> Iterator[Product]:
    """A server in `directory`, with a PostgreSQL of its own when no database is given."""
    settings = LocalSettings(
        dir=directory,
        redis_url=secret(redis_url),
        database_url=secret(database_url),
        instruments=INSTRUMENTS,
        market=False,
    )
    market = Market(redis_url)
    writer = threading.Thread(target=market.run)
    writer.start()
    before = dict(os.environ)
    os.environ |= SETTINGS | changes
    # A killed server is back at once; a channel that waits longer and longer for it would only measure itself.
    options = (("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100))
    try:
        with ExitStack() as cleanup:
            parts = {"server"} | ({"postgres"} if database_url is None else set())
            stack = cleanup.enter_context(Stack(settings, parts=parts))
            endpoints = stack.endpoints
            decisions = cleanup.enter_context(grpc.insecure_channel(str(endpoints.decision), options))
            admin = cleanup.enter_context(stack_admin_channel(endpoints, options))
            product = Product(
                stack,
                market,
                decision_pb2_grpc.DecisionServiceStub(decisions),
                admin_pb2_grpc.AdminServiceStub(admin),
            )
            product.decide_until(pb.SOURCE_RULES)
            yield product
    finally:
        os.environ.clear()
        os.environ |= before
        market.stopped.set()
        writer.join()


@pytest.fixture
def own_database(tmp_path: Path, redis_url: str) -> Iterator[Product]:
    """A server with a PostgreSQL that the test may break."""
    with serving(tmp_path / "stack", redis_url) as product:
        yield product


@dataclass
class Paced(Load):
    """Each caller sends a decision every `period_seconds`, so that what is measured is the server and not its limit."""

    period_seconds: float = 0.02

    def _call(self, number: int) -> None:
        due = time.monotonic() + number * self.period_seconds / self.count
        while not self._stopped.wait(max(0.0, due - time.monotonic())):
            started = time.monotonic()
            due = max(due + self.period_seconds, started)
            try:
                self.decisions.append(self.product.decide(order_ref=f"paced-{number}"))
            except grpc.RpcError as error:
                self.errors.append(error)
            self.seconds.append(time.monotonic() - started)


def drain(product: Product) -> None:
    eventually(lambda: product.status().audit.unshipped, lambda unshipped: unshipped == 0)


def assert_audited_once(product: Product, replies: list[pb.Decision]) -> int:
    """Every reply is in the database once, as it was given, and every chain verifies; returns the rows of evidence."""
    url, journal = product.stack.endpoints.database_url, product.stack.endpoints.journal
    assert url is not None
    assert journal is not None
    drain(product)
    verified = list(verify(url, Path(journal)))
    assert not any(isinstance(one, Unreachable) for one in verified)
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        rows = connection.execute(
            sa.text(
                "SELECT decision_id, action, reply_status, heard_action FROM decisions "
                "ORDER BY journal_position, journal_row"
            )
        ).all()
        entries = connection.scalars(sa.text("SELECT entry FROM journal_entries ORDER BY position")).all()
    engine.dispose()
    evidence = Counter(decision_id for entry in map(entry_of, entries) for decision_id in decision_ids(entry))
    assert set(evidence.values()) <= {1}
    assert [row.decision_id for row in rows] == list(evidence)  # drained in order, none doubled
    audited = {row.decision_id: row for row in rows}
    for reply in replies:
        if pb.REASON_CODE_AUDIT_UNAVAILABLE in reply.reasons:
            assert reply.action == pb.ACTION_ABSTAIN
            continue  # that none is there to be found is what the reply says
        row = audited[reply.decision_id]
        if pb.REASON_CODE_AUDIT_LATE in reply.reasons:
            heard = (row.reply_status, f"ACTION_{row.heard_action}")
            assert heard == ("reply_unconfirmed:audit_late", pb.Action.Name(reply.action))
        else:
            assert f"ACTION_{row.action}" == pb.Action.Name(reply.action)
    return len(rows)


def journal_of(product: Product) -> Path:
    """Its only one."""
    (path,) = journals_of(Path(str(product.stack.endpoints.journal)))
    return path


def postgres_of(product: Product) -> str:
    """Its URL for psycopg."""
    url = sa.make_url(str(product.stack.endpoints.database_url)).set(drivername="postgresql")
    return url.render_as_string(hide_password=False)


def stop_dead(product: Product) -> None:
    """Kills PostgreSQL and every process it has started: a backend that is busy outlives its postmaster for long."""
    for process in product.stack["postgres"].tree():
        process.kill()
    product.stack["postgres"].kill()


@contextmanager
def killed(product: Product) -> Iterator[None]:
    stop_dead(product)
    yield
    product.stack.restart("postgres")


@contextmanager
def frozen(product: Product) -> Iterator[None]:
    processes: list[psutil.Process] = []
    # Each leads a group of its own. Again until nothing new is found: the postmaster may have started one meanwhile.
    while found := [process for process in product.stack["postgres"].tree() if process not in processes]:
        for process in found:
            process.suspend()
        processes += found
    yield
    for process in processes:
        process.resume()


@contextmanager
def out_of_connections(product: Product) -> Iterator[None]:
    url = postgres_of(product)
    with ExitStack() as held:

        def take() -> psycopg.Connection[tuple[object, ...]]:
            return held.enter_context(psycopg.connect(url, autocommit=True, application_name="taker"))

        taken = [take()]
        others = b"FROM pg_stat_activity WHERE backend_type = 'client backend' AND application_name <> 'taker'"
        (most,) = taken[0].execute("SHOW max_connections").fetchone() or ("",)

        def all_taken() -> int:
            """Ends the shipper's connection and takes every one that is to be had.

            Until all are ours: one that the shipper is about to have is not listed yet, and not to be had either.
            """
            taken[0].execute(b"SELECT pg_terminate_backend(pid) " + others)
            with suppress(psycopg.OperationalError):
                while True:
                    taken.append(take())
            return len(taken)

        eventually(all_taken, lambda count: count == int(str(most)))
        yield


@contextmanager
def slow_to_commit(product: Product) -> Iterator[None]:
    """Every commit waits for a standby that does not exist."""
    with psycopg.connect(postgres_of(product), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        connection.execute("SELECT pg_reload_conf()")
        yield
        connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
        connection.execute("SELECT pg_reload_conf()")


@pytest.mark.long
@pytest.mark.fault(
    "D1",
    "PostgreSQL is killed, frozen or out of connections, or its commits hang",
    "No decision changes. The journal keeps the rows and ships them in order later.",
)
def test_a_database_in_trouble_costs_no_decision_and_gets_every_row_once(
    own_database: Product, seen: Callable[[str], None]
) -> None:
    with Load(own_database, count=4) as load:
        for trouble in (killed, frozen, out_of_connections, slow_to_commit):
            drain_behind(own_database)
            with trouble(own_database):
                eventually(lambda: own_database.status().audit.unshipped, lambda unshipped: unshipped > 300)
                assert own_database.status().ready
            behind = own_database.status().audit.unshipped
            seen(f"{trouble.__name__.replace('_', ' ')}: {behind} rows behind")
        load.wait_for_more(100)
    assert not load.errors
    assert {decision.action for decision in load.decisions} == {pb.ACTION_TRADE}
    rows = assert_audited_once(own_database, load.decisions)
    seen(f"{rows} rows, none lost or doubled")


def drain_behind(product: Product) -> None:
    """Waits until shipping keeps up with the load."""
    eventually(lambda: product.status().audit.unshipped, lambda unshipped: unshipped < 200)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.fault(
    "D1",
    "PostgreSQL is down for five minutes under load",
    "The p99 latency stays the same. No row is lost, and all are shipped in order later.",
)
def test_five_minutes_without_the_database_slow_no_decision_down(
    own_database: Product, seen: Callable[[str], None]
) -> None:
    callers = 4
    with Paced(own_database, count=callers) as load:

        def slice_of(seconds: float) -> list[float]:
            """Seconds of the decisions sent in the next so many seconds, sorted."""
            began = len(load.seconds)
            threading.Event().wait(seconds)
            return sorted(load.seconds[began:])

        slice_of(10)
        with_database = slice_of(60)
        first = len(load.decisions)
        stop_dead(own_database)
        without = slice_of(300)
        last = len(load.decisions)
        behind = own_database.status().audit.unshipped
        own_database.stack.restart("postgres")
        back = time.monotonic()
        eventually(lambda: own_database.status().audit.unshipped, lambda unshipped: unshipped < 200)
        drained_in = time.monotonic() - back
        with_database += slice_of(60)
    with_database.sort()
    (usual, usual_p50), (down, down_p50) = (
        (one[int(0.99 * len(one))] * 1e3, one[len(one) // 2] * 1e3) for one in (with_database, without)
    )
    seen(f"p50 {usual_p50:.1f} ms with, {down_p50:.1f} without; p99 {usual:.1f} ms with, {down:.1f} without")
    seen(f"{behind} rows behind, drained in {drained_in:.1f} s")
    assert not load.errors
    # In eight minutes a busy machine holds up a commit or the market's writer now and then; the database has no part.
    refused = [one for one in load.decisions if one.action != pb.ACTION_TRADE]
    assert all(HELD_UP & set(one.reasons) for one in refused), Counter(str(one.reasons) for one in refused)
    refused_without = sum(one.action != pb.ACTION_TRADE for one in load.decisions[first:last])
    seen(f"not TRADE: {len(refused) - refused_without} with, {refused_without} without, of {len(load.decisions)}")
    assert refused_without < 0.001 * (last - first)
    # A row holds the decisions of one turn of the event loop: one of each caller at most.
    assert callers * behind > 0.9 * len(without)
    assert down < max(1.5 * usual, usual + 5.0)
    assert_audited_once(own_database, load.decisions)


def kill_again_and_again(product: Product, times: int, seed: int, seen: Callable[[str], None]) -> None:
    instants = random.Random(seed)
    with Paced(product, count=8, period_seconds=0.01) as load:

        def wait_for_replies(replies: int) -> None:
            wanted = len(load.decisions) + replies
            eventually(lambda: len(load.decisions), lambda received: received >= wanted)

        for _ in range(times):
            wait_for_replies(instants.randrange(1, 400))
            product.stack["server"].kill()
            product.stack.restart("server")
        wait_for_replies(200)
    # Only what the restart explains: a call that got no reply makes no promise.
    assert {error.code() for error in load.errors} <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    rows = assert_audited_once(product, load.decisions)
    seen(f"seed {seed}: {len(load.decisions)} decisions received, {rows} audited, each once; chains verify")


@pytest.mark.fault(
    "D2",
    "The server is killed with SIGKILL twice under load",
    "Every decision that a caller received is in the audit exactly once.",
)
def test_a_server_killed_twice_has_audited_every_decision_that_a_client_received(
    own_database: Product, seed: int, seen: Callable[[str], None]
) -> None:
    kill_again_and_again(own_database, 2, seed, seen)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.fault(
    "D2",
    "The server is killed with SIGKILL fifty times under load",
    "Every decision that a caller received is in the audit exactly once.",
)
def test_a_server_killed_fifty_times_has_audited_every_decision_that_a_client_received(
    own_database: Product, seed: int, seen: Callable[[str], None]
) -> None:
    kill_again_and_again(own_database, 50, seed, seen)


@contextmanager
def injecting(product: Product, calls: str, error: str) -> Iterator[None]:
    """The server's calls on its journal fail."""
    journal = journal_of(product)
    files = [argument for suffix in ("", "-wal") for argument in ("-P", f"{journal}{suffix}")]
    inject = ["-e", f"trace={calls}", "-e", f"inject={calls}:error={error}"]
    with subprocess.Popen(
        [
            "strace",
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-p",
            str(deciding(product.stack["server"].pid).pid),
            *files,
            *inject,
        ]
    ) as strace:
        try:
            yield
        finally:
            strace.send_signal(signal.SIGINT)


@contextmanager
def full(product: Product) -> Iterator[None]:
    """The disk of the journal is full."""
    directory = Path(str(product.stack.endpoints.journal)).parent
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(65536)):
            pass
    assert shutil.disk_usage(directory).free == 0
    yield
    ballast.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory whose `server` is a file system of 320 MiB, which holds the journals of a server in Envoy, two."""
    disk = tmp_path / "stack" / "server"
    disk.mkdir(parents=True)
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=320m", "tmpfs", disk], check=False).returncode:
        pytest.skip("the kernel forbids mounting a tmpfs")
    yield disk.parent
    subprocess.run(["umount", "--lazy", disk], check=True)


def assert_abstains_until_healed(
    product: Product, trouble: AbstractContextManager[None], seen: Callable[[str], None]
) -> None:
    """While there is trouble nothing trades, the server is not ready and stays so; then it is, by itself."""
    outages = product.metric("pretrade_journal_outages_total")
    with Load(product, count=4) as load:
        load.wait_for_more(100)
        with trouble:
            eventually(product.status, lambda status: not status.audit.writable and not status.ready)
            seen_unwritable = dt.datetime.now(dt.UTC)
            load.wait_for_more(500)
            # Those asked for after that: an earlier one that is durable may reach its caller later.
            refused = [one for one in load.decisions if (at := made_at(one.decision_id)) and at > seen_unwritable]
            assert {decision.action for decision in refused} == {pb.ACTION_ABSTAIN}
            assert all(pb.REASON_CODE_AUDIT_UNAVAILABLE in decision.reasons for decision in refused)
            assert not product.status().ready
            assert product.metric("pretrade_journal_outages_total") == outages + 1  # sticky: one outage, not many
            why = product.status().audit.last_error
        healed = time.monotonic()
        eventually(product.decide, lambda decision: decision.action == pb.ACTION_TRADE)
        seconds = time.monotonic() - healed
        eventually(product.status, lambda status: status.ready and status.audit.writable)
        load.wait_for_more(100)
    # What injects errors holds the whole server up when it comes and when it goes.
    codes = Counter(error.code() for error in load.errors)
    assert set(codes) <= {grpc.StatusCode.DEADLINE_EXCEEDED}
    assert codes.total() <= 2 * load.count
    assert_audited_once(product, load.decisions)
    seen(f"{why.split('.')[0][:60]}: {len(refused)} refused, TRADE again after {seconds:.1f} s")


@pytest.mark.fault(
    "D3",
    "The disk of the audit journal is full",
    "ABSTAIN, and health is NOT_SERVING. The server recovers when the disk has space.",
)
def test_a_full_disk_abstains_until_there_is_space(
    small_disk: Path, redis_url: str, database_url: str, seen: Callable[[str], None]
) -> None:
    with serving(small_disk, redis_url, database_url) as product:
        assert_abstains_until_healed(product, full(product), seen)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace to inject the error")
@pytest.mark.parametrize(
    ("calls", "error"),
    [
        pytest.param(
            "fdatasync",
            "EIO",
            marks=pytest.mark.fault(
                "D3",
                "Syncing the journal fails (`fdatasync`: EIO)",
                "ABSTAIN, and health is NOT_SERVING until a whole rewrite of the log succeeds.",
            ),
        ),
        pytest.param(
            "pwrite64",
            "EROFS",
            marks=pytest.mark.fault(
                "D3",
                "The journal's file system becomes read-only (EROFS)",
                "ABSTAIN, and health is NOT_SERVING. The server recovers when it can write.",
            ),
        ),
    ],
)
def test_a_disk_that_fails_abstains_until_it_works(
    tmp_path: Path, redis_url: str, database_url: str, seen: Callable[[str], None], calls: str, error: str
) -> None:
    with serving(tmp_path / "stack", redis_url, database_url) as product:
        assert_abstains_until_healed(product, injecting(product, calls, error), seen)


@pytest.mark.long
@pytest.mark.fault(
    "D3",
    "PostgreSQL is frozen until the journal reaches its size limit",
    "ABSTAIN, and health is NOT_SERVING. The server recovers when the database takes rows again.",
)
def test_a_journal_that_nobody_empties_abstains_rather_than_lose_a_row(
    tmp_path: Path, redis_url: str, seen: Callable[[str], None]
) -> None:
    with serving(tmp_path / "stack", redis_url, PRETRADE_JOURNAL__MAX_MEBIBYTES="1") as product:
        assert_abstains_until_healed(product, frozen(product), seen)


@pytest.mark.long
@pytest.mark.fault(
    "D6", "A bit of the newest journal rows flips on disk", "The server refuses to start and names the changed row."
)
def test_a_server_refuses_to_start_on_a_journal_that_was_changed(
    tmp_path: Path, redis_url: str, database_url: str, seen: Callable[[str], None]
) -> None:
    with serving(tmp_path / "stack", redis_url, database_url) as product:
        replies = [product.decide() for _ in range(50)]
        drain(product)
        server, path = product.stack["server"], journal_of(product)
        server.stop()
        with closing(JournalReader(path)) as journal:
            (row,) = (row for row in journal.rows_after(0, -1) if replies[20].decision_id.encode() in row.entry)
        content = bytearray(path.read_bytes())
        at = content.index(replies[20].decision_id.encode())
        content[at] ^= 1
        path.write_bytes(content)
        with pytest.raises(PartFailedError) as caught:
            server.start()
        assert f"position {row.position}: changed" in caught.value.log_tail
        result = CliRunner().invoke(app, ["verify", "--journal", str(path), "--database-url", database_url])
        assert result.exit_code == 1
        assert f"position {row.position}: changed" in result.stderr
        seen(f"refused and reported: {result.stderr.strip().rpartition('audit: ')[2]}")
        content[at] ^= 1
        path.write_bytes(content)
        server.start()
        assert_audited_once(product, replies)
