"""The JavaScript client: its own tests, and what real servers add to them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.browser import Site
from support.harness import eventually
from support.js_client import PACKAGE, node, node_tests
from support.leash import LeashedPopen
from support.pages import DOCS
from support.secure_server import SecureServer
from support.server_group import EDGES, Group, server_group
from support.tcp_proxy import BLACK_HOLE, TcpProxy

from local.stack.ports import free_ports
from pretrade.client.credential_variables import CA, CERTIFICATE, KEY, TOKEN_FILE
from server.security.private import write_private

pytestmark = pytest.mark.usefixtures("js_client")
_CALLERS = 8
"""By gRPC, and as many by HTTP."""
_SECONDS = 120.0


@pytest.mark.long
def test_its_own_tests_pass() -> None:
    node_tests(*sorted(map(str, (PACKAGE / "test").glob("*.test.js"))))


@pytest.mark.long
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
        assert said["failedOver"] == "elsewhere"
        assert said["closed"]["status"] == "CANCELLED"
        assert allowed.said_in(browser, "/documented", tmp_path / "documented") == "ABSTAIN NO_SOURCE"
        refused = other.said_in(browser, f"/?server={url}", tmp_path / "other")
        assert refused == {"status": "UNAVAILABLE", "isOurs": True}


class Heard(NamedTuple):
    """A decision, as a caller heard it."""

    order_ref: str
    decision_id: str
    server: str


class Asking:
    """Programs that ask one decision after another, by `keep_asking.js`."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self._processes = processes
        for process in processes:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline()) == "asking"

    def end(self) -> tuple[list[Heard], list[str]]:
        """The decisions that were heard, and what failed."""
        heard: list[Heard] = []
        failed: list[str] = []
        for process in self._processes:
            output, _ = process.communicate(timeout=_SECONDS)
            found = json.loads(output)
            heard += [Heard(*one) for one in found["heard"]]
            failed += found["failed"]
        assert len({one.order_ref for one in heard}) == len(heard), "each order is heard of once"
        return heard, failed


@contextmanager
def asking(*servers: tuple[str, str]) -> Iterator[Asking]:
    """Callers by gRPC and by HTTP, of servers of which the first is asked while it is up.

    Args:
        servers: Address and URL of each.
    """
    with ExitStack() as running:
        argvs = (["node", "test/keep_asking.js", f"{_CALLERS}", *named] for named in zip(*servers, strict=True))
        started = [LeashedPopen(argv, cwd=PACKAGE, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for argv in argvs]
        yield Asking([running.enter_context(process) for process in started])


@contextmanager
def group_of(directory: Path, processes: int, edge: str) -> Iterator[Group]:
    """Servers that answer gRPC and JSON."""
    directory.mkdir(exist_ok=True)
    (http,) = free_ports(1)
    changes = {"PRETRADE_GRPC__EDGE": edge, "PRETRADE_HTTP__PORT": str(http)}
    # This is about who answers, not how fast: what starts takes the cores from what serves.
    changes |= {"PRETRADE_BUDGET__CAP_SECONDS": "5"}
    with server_group(directory, processes, **changes) as group:
        yield group


def http_of(group: Group) -> str:
    return f"127.0.0.1:{group.env['PRETRADE_HTTP__PORT']}"


def named(group: Group) -> tuple[str, str]:
    """Address and URL."""
    return group.decision, f"http://{http_of(group)}"


def heard_and_audited(calls: Asking, group: Group) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The ids of the decisions that were heard and that are in the audit; no call has failed."""
    heard, failed = calls.end()
    assert failed == []
    assert group.stop() == 0
    return {one.order_ref: one.decision_id for one in heard}, group.audited()


@pytest.mark.stack
@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("edge", EDGES)
def test_no_call_fails_in_a_rolling_restart_and_each_order_is_decided_once(tmp_path: Path, edge: str) -> None:
    with group_of(tmp_path / "group", 2, edge) as group, asking(named(group)) as calls:
        group.replace()
        heard, audited = heard_and_audited(calls, group)
        assert {ref: audited[ref] for ref, decision in heard.items() if audited[ref] != [decision]} == {}


@pytest.mark.stack
@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("edge", EDGES)
def test_no_call_fails_when_a_process_is_killed_and_each_order_is_decided_once(tmp_path: Path, edge: str) -> None:
    with group_of(tmp_path / "group", 2, edge) as group, asking(named(group)) as calls:
        before = group.processes()
        os.kill(group.pids()[0], signal.SIGKILL)
        eventually(group.processes, lambda found: len(found) == 2 and found != before, _SECONDS)
        heard, audited = heard_and_audited(calls, group)
        assert {ref: audited[ref] for ref, decision in heard.items() if audited[ref] != [decision]} == {}


@pytest.mark.stack
@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("loss", ["killed", "cut off"])
@pytest.mark.parametrize("edge", EDGES)
def test_no_call_fails_when_a_region_is_lost_and_another_is_named(tmp_path: Path, edge: str, loss: str) -> None:
    with ExitStack() as running:
        a, b = (running.enter_context(group_of(tmp_path / name, 1, edge)) for name in "ab")
        proxies = [running.enter_context(TcpProxy(target)) for target in (a.decision, http_of(a))]
        names = proxies[0].address, f"http://{proxies[1].address}"
        calls = running.enter_context(asking(names, named(b)))
        if loss == "killed":
            a.kill()
        else:
            for proxy in proxies:
                proxy.apply(BLACK_HOLE)
        eventually(lambda: b.metric("pretrade_decisions_total"), lambda count: count > 100, _SECONDS)
        for proxy in proxies:
            proxy.heal()
        heard, failed = calls.end()
        assert failed == []
        assert b.stop() == 0
        assert loss == "killed" or a.stop() == 0
        if loss == "killed":  # what it has not shipped is in its journal still
            a = running.enter_context(group_of(tmp_path / "a", 1, edge))
            assert a.stop() == 0
        audits = dict.fromkeys(names, a.audited()) | dict.fromkeys(named(b), b.audited())
        assert [one for one in heard if audits[one.server].get(one.order_ref) != [one.decision_id]] == []
        assert {one.server for one in heard} == {*names, *named(b)}
