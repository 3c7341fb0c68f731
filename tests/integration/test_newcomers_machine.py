"""The stack on machines that are not like ours: their folders, users, locales, networks and cores."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
from support.figures import Figure
from support.up_command import DEADLINE_SECONDS, up

from local.stack.settings import LocalSettings
from local.stack.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

PARTS: Final = ("valkey", "broker", "postgres", "server")
NOWHERE: Final = {
    **{f"PRETRADE_LOCAL_{name}": "127.0.0.1:9" for name in ("PRIMARY", "SECONDARY", "CHALLENGER")},
    "PRETRADE_STARTUP_PATIENCE_SECONDS": "0.2",
}
"""A server that finds no replica still decides."""
PROXIES: Final = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
"""A proxy that reaches nothing of ours."""
ONE_CORE: Final = (
    sys.executable,
    "-c",
    "import os, sys; os.sched_setaffinity(0, {0}); os.execvp(sys.argv[1], sys.argv[1:])",
)
ISOLATED: Final = f"""
import fcntl, os, pathlib, socket, struct, subprocess, sys
pathlib.Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS: up
for options in ("--make-rprivate /", "--bind {{0}} {{0}}", "--options remount,bind,ro /"):
    subprocess.run(["mount", *options.replace("{{0}}", {tempfile.gettempdir()!r}).split()], check=True)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""To be run in namespaces of its own for networks, where the loopback interface is down, and for mounts."""


@dataclass(frozen=True)
class Machine:
    """One way in which a machine differs."""

    folder: str = "stack"
    environment: Mapping[str, str] = field(default_factory=dict)
    prefix: Sequence[str] = ()
    namespaces: Sequence[str] = ()
    """Kinds of those that the stack has of its own, as `unshare` and `nsenter` name them; only root can make them."""


STRANGE_FOLDER: Final = "Käse & Brot (1)+ 'Börse' 株"
LONG_PATH: Final = "/".join(letter * 50 for letter in "abcd")
MACHINES: Final = {
    "a folder with spaces and letters of other languages": Machine(STRANGE_FOLDER),
    "a long path": Machine(LONG_PATH),
    "a home that cannot be written to": Machine(
        environment={"HOME": "/proc", "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": ""}
    ),
    "the locale C": Machine("Börse", {"LC_ALL": "C", "LANG": "C"}),
    "a locale that is not installed": Machine(environment={"LC_ALL": "xx_YY.UTF-8", "LANG": "xx_YY.UTF-8"}),
    "a time zone that is not UTC": Machine(environment={"TZ": "Asia/Kathmandu"}),
    "a proxy": Machine(environment=PROXIES),
    "files open to all": Machine(prefix=("sh", "-c", 'umask 000; exec "$@"', "sh")),
    "files closed to others": Machine(prefix=("sh", "-c", 'umask 077; exec "$@"', "sh")),
    "one core": Machine(prefix=ONE_CORE),
}
ALL_AT_ONCE: Final = Machine(
    f"{STRANGE_FOLDER}/{LONG_PATH}",
    {**PROXIES, "HOME": "/proc", "TZ": "Asia/Kathmandu", "LC_ALL": "C", "LANG": "C", "PRETRADE_GRPC__EDGE": "auto"},
    [*ONE_CORE, *MACHINES["files closed to others"].prefix],
)
ISOLATED_MACHINE: Final = Machine(
    prefix=("unshare", "--net", "--mount", sys.executable, "-c", ISOLATED), namespaces=("net", "mount")
)
EVERY_MACHINE: Final = [
    pytest.param(ALL_AT_ONCE, id="all of it"),
    pytest.param(ISOLATED_MACHINE, id="no IPv6, and only the folder for temporary files can be written to"),
    # What differs in everything fails wherever one of these does, which tell then what difference it is.
    *(pytest.param(machine, id=name) for name, machine in MACHINES.items()),
]


def run(
    machine: Machine, directory: Path, *command: str, prefix: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """A command of `pretrade`, on that machine."""
    argv = [*(prefix or machine.prefix), sys.executable, "-m", "local", *command]
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


@pytest.mark.long
@pytest.mark.parametrize("machine", EVERY_MACHINE)
def test_the_stack_starts_decides_and_stops(tmp_path: Path, machine: Machine) -> None:
    own = [f"--{kind}" for kind in machine.namespaces]
    if own and subprocess.run(["unshare", *own, "true"], capture_output=True, check=False).returncode:
        pytest.skip("only root may make namespaces" if os.geteuid() else "the kernel forbids namespaces here")
    directory = tmp_path / machine.folder
    directory.mkdir(parents=True)
    with up(directory, *PARTS, prefix=machine.prefix, **NOWHERE, **machine.environment) as command:
        stack = command.wait_until_up()
        beside = ["nsenter", f"--target={command.process.pid}", *own] if own else []
        asked = run(
            machine, directory, "decide", stack.endpoints.instruments[0], "buy", "0.05", "--json", prefix=beside
        )
        assert asked.returncode == 0, asked.stderr
        assert json.loads(asked.stdout)["action"] == "ACTION_ABSTAIN"
        listed = run(machine, directory, "audit", "list", "--since", "1m", "--json", prefix=beside)
        assert listed.returncode == 0, listed.stderr
        assert json.loads(asked.stdout)["decision_id"] in listed.stdout
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(DEADLINE_SECONDS) == 0, command.output
    assert "Traceback" not in command.output


@pytest.mark.long
def test_what_the_stack_keeps_is_for_its_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    directory = tmp_path / "stack"
    before = os.umask(0)
    try:
        with Stack(LocalSettings(dir=directory), parts={"valkey"}):
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    finally:
        os.umask(before)


@pytest.mark.long
def test_two_stacks_run_side_by_side_with_their_usual_ports_taken(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    parts = ("valkey", "server")
    for folder in folders:
        folder.mkdir()
    usual = (7001, 7002, 7003, 7004)
    with (
        taken(*usual),
        up(folders[0], *parts, **NOWHERE) as one,
        up(folders[1], *parts, **NOWHERE) as two,
    ):
        ports = set()
        for command, folder in ((one, folders[0]), (two, folders[1])):
            stack = command.wait_until_up()
            ports |= {stack.endpoints.decision, stack.endpoints.admin, stack.endpoints.metrics_url}
            ports.add(stack.endpoints.http_url)
            asked = run(Machine(), folder, "decide", stack.endpoints.instruments[0], "buy", "0.05")
            assert asked.returncode == 0, asked.stderr
        assert len(ports) == 8
        assert not any(str(address).endswith(f":{port}") for address in ports for port in usual)


def test_a_port_that_was_asked_for_and_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        with up(tmp_path, "valkey", "server", PRETRADE_LOCAL_DECISION_PORT=str(port), **NOWHERE) as command:
            assert command.process.wait(DEADLINE_SECONDS) == 1
        (said,) = [line for line in command.output.splitlines() if "external" not in line]
        assert said.startswith(f"PRETRADE_LOCAL_DECISION_PORT: something else listens on 127.0.0.1:{port}; ")


def test_a_replica_starts_where_its_files_are(tmp_path: Path, model_store: Path) -> None:
    directory = tmp_path / ALL_AT_ONCE.folder
    directory.mkdir(parents=True)
    store = directory / "models of mine"
    store.symlink_to(model_store)
    environment = {**ALL_AT_ONCE.environment, "PRETRADE_LOCAL_MODEL_STORE": str(store)}
    with up(directory, "primary", **environment) as command:
        command.wait_until_up()


@pytest.mark.long
@pytest.mark.parametrize("edge", ["grpcio", "envoy"])
def test_the_whole_demo_runs_on_a_machine_that_differs_in_everything(tmp_path: Path, edge: str, figure: Figure) -> None:
    summary = tmp_path / "summary.json"
    directory = tmp_path / ALL_AT_ONCE.folder
    machine = Machine(environment={**ALL_AT_ONCE.environment, "PRETRADE_GRPC__EDGE": edge}, prefix=ALL_AT_ONCE.prefix)
    with taken(7001, 7002, 7003):
        done = run(machine, directory, "demo", "--duration", "8", "--rate", "20", "--json", str(summary))
    assert summary.exists(), done.stdout + done.stderr
    found = json.loads(summary.read_text())
    assert found["decisions"] == found["audit_rows"] > 50
    figure(found["decisions"] == found["orders"], "one core decides every order of the demo in 200 ms at 20 a second")
    assert "Warning" not in done.stdout + done.stderr
