"""The JavaScript client: its own tests, and what real servers add to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.harness import eventually
from support.js_client import PACKAGE, node
from support.leash import LeashedPopen
from support.secure_server import SecureServer
from support.server_group import EDGES, server_group

from pretrade.client.credential_variables import CA, CERTIFICATE, KEY, TOKEN_FILE
from server.security.private import write_private

pytestmark = pytest.mark.usefixtures("js_client")
_CALLERS = 4
_SECONDS = 120.0


def test_its_own_tests_pass() -> None:
    tests = sorted(map(str, (PACKAGE / "test").glob("*.test.js")))
    argv = ["node", "--test", *tests]
    done = subprocess.run(argv, cwd=PACKAGE, capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert done.returncode == 0, done.stdout
    assert f"# tests {len(tests)}\n" not in done.stdout, "a file without tests counts as one"


@pytest.mark.stack
def test_it_shows_its_token_and_its_certificate_over_tls(tmp_path: Path) -> None:
    server = SecureServer(tmp_path, "token")
    with server.running():
        ca, token, pair = server.path("ca.pem"), server.path("caller.token"), server.authority.certify("trader")
        write_private(token, server.token("trader"))
        write_private(server.path("caller.key"), pair.key.decode())
        write_private(server.path("caller.pem"), pair.certificate.decode())

        def ask(**credentials: Path) -> Any:
            named = {name: str(path) for name, path in credentials.items()}
            return node("test/ask_once.js", server.decision, environment=os.environ | named)

        assert ask(**{CA: ca, TOKEN_FILE: token}) == "ABSTAIN"
        assert ask(**{CA: ca}) == ["UNAUTHENTICATED", "NO_TOKEN"]
        certificate = {CERTIFICATE: server.path("caller.pem"), KEY: server.path("caller.key")}
        assert ask(**{CA: ca, TOKEN_FILE: token} | certificate) == "ABSTAIN"
        write_private(token, "not one")
        assert ask(**{CA: ca, TOKEN_FILE: token})[0] == "UNAUTHENTICATED"


class Asking:
    """A program that asks one decision after another, by `keep_asking.js`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == "asking"

    def end(self) -> tuple[Counter[str], list[str]]:
        """How often each order was heard to be decided, and what failed."""
        output, _ = self._process.communicate(timeout=_SECONDS)
        found = json.loads(output)
        return Counter(ref for ref, _ in found["heard"]), found["failed"]


@contextmanager
def asking(*servers: str) -> Iterator[Asking]:
    argv = ["node", "test/keep_asking.js", f"{_CALLERS}", *servers]
    with LeashedPopen(argv, cwd=PACKAGE, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Asking(process)


@pytest.mark.stack
@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("edge", EDGES)
def test_no_call_fails_in_a_rolling_restart_and_each_order_is_decided_once(tmp_path: Path, edge: str) -> None:
    with server_group(tmp_path, 2, PRETRADE_GRPC__EDGE=edge) as group, asking(group.decision) as calls:
        group.replace()
        heard, failed = calls.end()
        assert failed == []
        assert group.stop() == 0
        decided = group.audited()
        assert set(heard.values()) == {1}
        assert {ref for ref in heard if len(decided[ref]) != 1} == set()


@pytest.mark.stack
@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("edge", EDGES)
def test_no_call_fails_when_a_server_is_killed_and_another_is_named(tmp_path: Path, edge: str) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with (
        server_group(tmp_path / "first", 1, PRETRADE_GRPC__EDGE=edge) as first,
        server_group(tmp_path / "second", 1, PRETRADE_GRPC__EDGE=edge) as second,
        asking(first.decision, second.decision) as calls,
    ):
        family = [psutil.Process(first.supervisor.pid), *psutil.Process(first.supervisor.pid).children(recursive=True)]
        for process in family:
            process.send_signal(signal.SIGKILL)
        eventually(lambda: second.metric("pretrade_decisions_total"), lambda count: count > 100)
        heard, failed = calls.end()
        assert failed == []
        assert set(heard.values()) == {1}
