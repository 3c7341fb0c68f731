"""`pretrade up` as a process: told to stop, interrupted while it starts, or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil
import pytest
from aiokafka import AIOKafkaProducer
from support.harness import eventually
from support.up_command import DEADLINE_SECONDS, assert_gone, up

from local.stack.command import MISUSED, OK
from local.stack.killing import kill_part
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.client.cli.options import UNREACHABLE
from pretrade.client.stack_file import StackFile

pytestmark = pytest.mark.stack

SERVERS: Final = ("valkey", "broker", "postgres")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_everything(tmp_path: Path, number: signal.Signals) -> None:
    with up(tmp_path, *SERVERS) as command:
        command.wait_until_up()
        children = command.children()
        assert {"valkey-server", "postgres"} <= {child.name() for child in children}
        command.process.send_signal(number)
        assert command.process.wait(DEADLINE_SECONDS) == 0
    assert_gone(children)
    assert not (tmp_path / "stack.json").exists()


@pytest.mark.long
def test_kill_9_leaves_no_process_and_the_directory_is_free_again(tmp_path: Path, model_store: Path) -> None:
    with up(tmp_path, *SERVERS, "primary", PRETRADE_LOCAL_MODEL_STORE=str(model_store)) as command:
        stack = command.wait_until_up()
        assert set(stack.processes) == {*SERVERS, "primary"}
        children = command.children()
        # The Java process has started a Python worker, PostgreSQL its own processes in sessions of their own.
        java = psutil.Process(stack.processes["primary"])
        postgres = psutil.Process(stack.processes["postgres"])
        assert java.children()
        assert any(os.getsid(child.pid) != os.getsid(postgres.pid) for child in postgres.children())
        command.process.kill()
        command.process.wait()
        # At once: what is left of the killed stack is waited for, not an error.
        with Stack(LocalSettings(dir=tmp_path), parts=SERVERS) as next_stack:
            assert_gone(children)
            assert set(next_stack.processes) == set(SERVERS)


ALONE: Final = {
    **{f"PRETRADE_LOCAL_{name}": "127.0.0.1:9" for name in ("PRIMARY", "SECONDARY", "CHALLENGER")},
    "PRETRADE_STARTUP_PATIENCE_SECONDS": "0.2",
    "PRETRADE_GRPC__DRAIN_SECONDS": "60",
}
"""Settings of a server that finds no replica, and that takes a minute to drain."""


@pytest.mark.long
def test_each_process_of_a_server_has_a_port_for_its_metrics_and_the_stack_uses_none_of_them(tmp_path: Path) -> None:
    with up(tmp_path, "valkey", "server", PRETRADE_LOCAL_PROCESSES="2", **ALONE) as command:
        endpoints = command.wait_until_up().endpoints
        metrics = urlsplit(endpoints.metrics_url or "").port
        assert metrics is not None
        addresses = (
            endpoints.decision,
            endpoints.admin,
            urlsplit(endpoints.http_url or "").netloc,
            endpoints.redis_url,
        )
        for port in range(metrics, metrics + 3):
            assert not any(str(port) in str(address) for address in addresses)

        def answering() -> set[int]:
            found = set()
            for port in (metrics, metrics + 1):
                with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5.0) as response:
                    found |= {port} if b"pretrade_decisions_total" in response.read() else set()
            return found

        eventually(answering, {metrics, metrics + 1}.__eq__)
        assert "cannot start" not in (tmp_path / "logs" / "server.log").read_text()


@pytest.mark.long
@pytest.mark.parametrize("edge", ["envoy", "grpcio"])
def test_kill_9_ends_a_server_that_would_drain_for_a_minute(tmp_path: Path, edge: str) -> None:
    with up(tmp_path, "valkey", "server", PRETRADE_GRPC__EDGE=edge, **ALONE) as command:
        command.wait_until_up()
        children = command.children()
        assert ("envoy" in {child.name() for child in children}) == (edge == "envoy")
        command.process.kill()
        command.process.wait()
        with Stack(LocalSettings(dir=tmp_path), parts={"valkey"}):
            assert_gone(children)


@pytest.mark.long
@pytest.mark.parametrize("processes", range(2, 8))
@pytest.mark.parametrize("edge", ["envoy", "grpcio"])
def test_kill_9_at_any_moment_of_the_start_leaves_no_process(tmp_path: Path, edge: str, processes: int) -> None:
    mark = {"STACK_OF_THIS_TEST": str(tmp_path)}

    def marked() -> list[psutil.Process]:
        """All that has inherited our mark, in whatever group or session and with whatever parent."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if mark.items() <= process.environ().items() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    with up(tmp_path, "valkey", "broker", "server", PRETRADE_GRPC__EDGE=edge, **ALONE, **mark) as command:
        command.wait_until(lambda: len(marked()) >= processes or StackFile.read(tmp_path))
        command.process.kill()
        command.process.wait()
        with Stack(LocalSettings(dir=tmp_path), parts=set()):  # waits for the guard of the one before
            assert marked() == []


def test_an_interrupt_during_the_start_stops_what_was_started(tmp_path: Path) -> None:
    with up(tmp_path, *SERVERS) as command:
        command.wait_until((tmp_path / "logs" / "postgres.log").exists)
        children = command.children()
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(DEADLINE_SECONDS) == 130, command.output
    assert_gone(children)
    assert "Traceback" not in command.output


@pytest.mark.long
def test_a_second_signal_leaves_the_rest_to_the_guard(tmp_path: Path) -> None:
    patient = {"PRETRADE_LOCAL_STOP_TIMEOUT_SECONDS": "600", "PRETRADE_LOCAL_GUARD_GRACE_SECONDS": "1"}
    with up(tmp_path, "postgres", **patient) as command:
        stack = command.wait_until_up()
        children = command.children()
        # A backend that is stopped keeps PostgreSQL from ending, and is in a session that our SIGCONT does not reach.
        backend = psutil.Process(stack.processes["postgres"]).children()[0]
        backend.suspend()
        command.process.send_signal(signal.SIGTERM)
        command.wait_until(lambda: not (tmp_path / "stack.json").exists())
        assert command.process.poll() is None
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(DEADLINE_SECONDS) == 130
        backend.resume()
    assert_gone(children)


def test_a_part_that_was_killed_is_started_again(tmp_path: Path) -> None:
    with up(tmp_path, "valkey") as command:
        first = command.wait_until_up().processes["valkey"]
        assert kill_part({"dir": tmp_path}, "broker", 0.0) == MISUSED
        assert kill_part({"dir": tmp_path}, "valkey", 0.0) == OK
        command.wait_until(lambda: (stack := StackFile.read(tmp_path)) and stack.processes["valkey"] != first)
        assert "valkey was ended by SIGKILL; starting it again" in command.output
    assert kill_part({"dir": tmp_path}, "valkey", 0.0) == UNREACHABLE


def test_a_part_that_keeps_ending_ends_the_command(tmp_path: Path) -> None:
    with up(tmp_path, "valkey", "broker") as command:
        first = command.wait_until_up().processes["valkey"]
        os.kill(first, signal.SIGKILL)
        command.wait_until(lambda: (stack := StackFile.read(tmp_path)) and stack.processes["valkey"] != first)
        children = command.children()
        second = command.wait_until_up().processes["valkey"]
        os.kill(second, signal.SIGKILL)
        assert command.process.wait(DEADLINE_SECONDS) == 1
    assert_gone(children)
    assert "valkey was ended by SIGKILL, again" in command.output


async def test_a_broker_that_fills_its_memory_is_started_with_an_empty_log(tmp_path: Path) -> None:
    with up(tmp_path, "broker", PRETRADE_LOCAL_BROKER_MEMORY_MEBIBYTES="32") as command:
        first = command.wait_until_up()
        producer = AIOKafkaProducer(bootstrap_servers=first.endpoints.kafka_bootstrap_servers)
        await producer.start()
        for _ in range(64):
            await producer.send("filler", bytes(500_000))
        await producer.stop()
        command.wait_until(lambda: (now := StackFile.read(tmp_path)) and now.processes != first.processes)
        assert "broker has filled its memory; starting it with an empty log" in command.output


def test_a_part_that_fails_is_named_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "postgres" / "cluster").mkdir(parents=True)  # a cluster that is none
    with up(tmp_path, *SERVERS) as command:
        assert command.process.wait(DEADLINE_SECONDS) == 1
    assert "postgres ended with exit code 2 before it was ready" in command.output
    assert "could not access the server configuration file" in command.output
    assert f"its log is {tmp_path / 'logs' / 'postgres.log'}" in command.output


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "local", "up", "--dir", str(tmp_path / "file"), "--part", "valkey"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    assert done.returncode == 1
    assert f"cannot work in {tmp_path / 'file'}: File exists; name a directory" in done.stdout.replace("\n", "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("--part", "redis"), {}, "no such part: redis"),
        (("--part", "worker"), {}, "worker needs valkey"),
        (("--speed", "fast"), {}, "PRETRADE_LOCAL_SPEED"),
        ((), {"PRETRADE_LOCAL_REDIS": "redis://elsewhere"}, "unknown setting PRETRADE_LOCAL_REDIS"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    tmp_path: Path, arguments: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "local", "up", "--dir", str(tmp_path), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stdout
    assert list(tmp_path.iterdir()) == []
