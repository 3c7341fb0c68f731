"""The stack on machines that are not like ours: their folders, users, locales, networks and cores."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
from up_command import DEADLINE_SECONDS, up

from local.settings import LocalSettings
from local.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

PARTS: Final = ("valkey", "broker", "postgres", "server")
NOWHERE: Final = {
    **{f"PRETRADE_LOCAL_{name}": "127.0.0.1:9" for name in ("PRIMARY", "SECONDARY", "CHALLENGER")},
    "PRETRADE_STARTUP_PATIENCE_SECONDS": "0.2",
}
"""A server that finds no replica still decides."""
PROXIES: Final = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
"""A proxy that reaches nothing of ours."""
ONE_CORE: Final = "import os, sys; os.sched_setaffinity(0, {0}); os.execvp(sys.argv[1], sys.argv[1:])"
WITHOUT_IPV6: Final = """
import fcntl, os, pathlib, socket, struct, sys
pathlib.Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS: up
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""To be run in a network namespace of its own, where the loopback interface is down."""


@dataclass(frozen=True)
class Machine:
    """One way in which a machine differs."""

    folder: str = "stack"
    environment: Mapping[str, str] = field(default_factory=dict)
    prefix: Sequence[str] = ()
    root: bool = False
    """Whether only root can make it."""


MACHINES: Final = {
    "a folder with spaces and letters of other languages": Machine("Käse & Brot (1)+ 'Börse' 株"),
    "a long path": Machine("/".join(letter * 50 for letter in "abcd")),
    "a home that cannot be written to": Machine(
        environment={"HOME": "/proc", "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": ""}
    ),
    "the locale C": Machine("Börse", {"LC_ALL": "C", "LANG": "C"}),
    "a locale that is not installed": Machine(environment={"LC_ALL": "xx_YY.UTF-8", "LANG": "xx_YY.UTF-8"}),
    "a time zone that is not UTC": Machine(environment={"TZ": "Asia/Kathmandu"}),
    "a proxy": Machine(environment=PROXIES),
    "files open to all": Machine(prefix=("sh", "-c", 'umask 000; exec "$@"', "sh")),
    "files closed to others": Machine(prefix=("sh", "-c", 'umask 077; exec "$@"', "sh")),
    "one core": Machine(
        prefix=(
            sys.executable,
            "-c",
            ONE_CORE,
        )
    ),
    "no IPv6": Machine(prefix=("unshare", "--net", sys.executable, "-c", WITHOUT_IPV6), root=True),
}
ALL_AT_ONCE: Final = Machine(
    f"{MACHINES['the locale C'].folder} und mehr/{MACHINES['a long path'].folder}",
    {**PROXIES, "HOME": "/proc", "TZ": "Asia/Kathmandu", "LC_ALL": "C", "LANG": "C"},
    [*MACHINES["one core"].prefix, *MACHINES["files closed to others"].prefix],
)


def run(machine: Machine, directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command of `pretrade`, on that machine."""
    argv = [*machine.prefix, sys.executable, "-m", "local", *command]
    env = {**os.environ, "PRETRADE_LOCAL_DIR": str(directory), **machine.environment}
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=250, check=False)


@contextmanager
def taken(*ports: int) -> Iterator[None]:
    """Somebody else listens on these ports."""
    with ExitStack() as held:
        for port in ports:
            with suppress(OSError):  # somebody does already
                held.enter_context(socket.create_server(("127.0.0.1", port)))
        yield


@pytest.mark.parametrize("name", MACHINES)
def test_the_stack_starts_decides_and_stops(tmp_path: Path, name: str) -> None:
    machine = MACHINES[name]
    if machine.root and os.geteuid() != 0:
        pytest.skip("only root may make a network without IPv6")
    if machine.root and subprocess.run([*machine.prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("the kernel forbids a network of our own here")
    directory = tmp_path / machine.folder
    directory.mkdir(parents=True)
    environment = {**NOWHERE, **machine.environment}
    with up(directory, *PARTS, prefix=machine.prefix, **environment) as command:
        stack = command.wait_until_up()
        if not machine.root:  # else it has a network of its own
            asked = run(machine, directory, "decide", stack.endpoints.instruments[0], "buy", "0.05", "--json")
            assert asked.returncode == 0, asked.stderr
            assert json.loads(asked.stdout)["action"] == "ACTION_ABSTAIN"
            listed = run(machine, directory, "audit", "list", "--since", "1m", "--json")
            assert listed.returncode == 0, listed.stderr
            assert json.loads(listed.stdout.splitlines()[0])["decision_id"] == json.loads(asked.stdout)["decisionId"]
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(DEADLINE_SECONDS) == 0, command.output
    assert "Traceback" not in command.output
    mode = stat.S_IMODE((directory / "server").stat().st_mode)
    if name == "files closed to others":
        assert mode & 0o077 == 0


def test_what_the_stack_keeps_is_for_its_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    directory = tmp_path / "stack"
    before = os.umask(0)
    try:
        with Stack(LocalSettings(dir=directory), parts={"valkey"}):
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    finally:
        os.umask(before)


def test_two_stacks_run_side_by_side_with_their_usual_ports_taken(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with taken(7001, 7002, 7003), up(folders[0], *PARTS, **NOWHERE) as one, up(folders[1], *PARTS, **NOWHERE) as two:
        ports = set()
        for command, folder in ((one, folders[0]), (two, folders[1])):
            stack = command.wait_until_up()
            ports |= {stack.endpoints.decision, stack.endpoints.admin, stack.endpoints.metrics_url}
            asked = run(Machine(), folder, "decide", stack.endpoints.instruments[0], "buy", "0.05")
            assert asked.returncode == 0, asked.stderr
        assert len(ports) == 6
        assert not any(str(port).endswith((":7001", ":7002", ":7003")) for port in ports)


def test_a_port_that_was_asked_for_and_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        with up(tmp_path, "valkey", "server", PRETRADE_LOCAL_DECISION_PORT=str(port), **NOWHERE) as command:
            assert command.process.wait(DEADLINE_SECONDS) == 1
        assert str(port) in command.output
        assert "Traceback" not in command.output


@pytest.mark.parametrize("name", ["a folder with spaces and letters of other languages", "a long path", "the locale C"])
def test_a_replica_starts_where_its_files_are(tmp_path: Path, model_store: Path, name: str) -> None:
    machine = MACHINES[name]
    directory = tmp_path / machine.folder
    store = directory / "models of mine"
    store.parent.mkdir(parents=True)
    store.symlink_to(model_store)
    with up(directory, "primary", PRETRADE_LOCAL_MODEL_STORE=str(store), **machine.environment) as command:
        command.wait_until_up()


@pytest.mark.long
@pytest.mark.parametrize("edge", ["grpcio", "envoy"])
def test_the_whole_demo_runs_on_a_machine_that_differs_in_everything(tmp_path: Path, edge: str) -> None:
    summary = tmp_path / "summary.json"
    directory = tmp_path / ALL_AT_ONCE.folder
    machine = Machine(environment={**ALL_AT_ONCE.environment, "PRETRADE_GRPC__EDGE": edge}, prefix=ALL_AT_ONCE.prefix)
    with taken(7001, 7002, 7003):
        done = run(machine, directory, "demo", "--duration", "8", "--json", str(summary))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(summary.read_text())
    assert found["decisions"] == found["orders"] == found["audit_rows"] > 500
    assert "Warning" not in done.stdout + done.stderr
