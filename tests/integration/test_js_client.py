"""The JavaScript client: its own tests, and what real servers add to them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.browser import Site
from support.harness import eventually
from support.js_client import PACKAGE, node, node_tests
from support.leash import LeashedPopen
from support.pages import DOCS
from support.secure_server import SecureServer
from support.server_group import EDGES, server_group

from local.stack.ports import free_ports
from pretrade.client.credential_variables import CA, CERTIFICATE, KEY, TOKEN_FILE
from server.security.private import write_private

pytestmark = pytest.mark.usefixtures("js_client")
_CALLERS = 4
_SECONDS = 120.0


def test_its_own_tests_pass() -> None:
    node_tests(*sorted(map(str, (PACKAGE / "test").glob("*.test.js"))))


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


_TELLS = """<script type="module">
  const output = document.querySelector("output");
  const waiting = setInterval(() => {
    if (!output.textContent) return;
    clearInterval(waiting);
    fetch("/said", { method: "POST", body: JSON.stringify(output.textContent) });
  }, 50);
</script>"""
"""Has the documented page tell what it shows."""


@pytest.mark.stack
@pytest.mark.long
@pytest.mark.parametrize("edge", EDGES)
def test_a_page_of_an_allowed_site_asks_in_every_way_and_a_page_of_another_may_not(
    tmp_path: Path, browser: str, edge: str
) -> None:
    (documented,) = re.findall(r"```html\n(.*?)```", (DOCS / "client-js.md").read_text(), re.DOTALL)
    documented = documented.replace("/node_modules/pretrade/", "/")
    (import_map,) = re.findall(r"<script type=\"importmap\">.*?</script>", documented, re.DOTALL)
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    pages = {
        "/": f'<!doctype html>{import_map}<script type="module" src="/test/in_page.js"></script>',
        "/documented": documented.replace("http://127.0.0.1:7004", url) + _TELLS,
    }
    allowed, other = Site(PACKAGE, pages), Site(PACKAGE, pages)
    changes = {
        "PRETRADE_GRPC__EDGE": edge,
        "PRETRADE_HTTP__PORT": str(port),
        "PRETRADE_HTTP__CORS_ORIGINS": json.dumps([allowed.origin]),
    }
    with server_group(tmp_path, 1, **changes), allowed.serving(), other.serving():
        said = allowed.said_in(browser, f"/?server={url}", tmp_path / "allowed")
        assert said["decided"][:4] == ["one", "ABSTAIN", False, ["NO_SOURCE", "FEATURES_MISSING"]], said
        assert said["isSame"]
        assert said["refused"] == {
            "status": "INVALID_ARGUMENT",
            "reason": "UNKNOWN_INSTRUMENT",
            "field": "instrument",
            "isOurs": True,
        }
        assert said["batch"] == [["a", "ABSTAIN"], ["b", "INVALID_QUANTITY"], ["c", "ABSTAIN"]]
        assert said["shared"] == [f"{number}" for number in range(100)]
        assert said["closed"]["status"] == "CANCELLED"
        assert allowed.said_in(browser, "/documented", tmp_path / "documented") == "ABSTAIN NO_SOURCE"
        refused = other.said_in(browser, f"/?server={url}", tmp_path / "other")
        assert refused == {"status": "UNAVAILABLE", "isOurs": True}


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
