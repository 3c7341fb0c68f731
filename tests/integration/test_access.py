"""Credentials of callers, processes and people: rates, sockets between processes, the command line, no secret told."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import psutil
import pytest
from google.rpc import code_pb2, error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from support.harness import INSTRUMENTS, eventually
from support.secure_server import SECONDS, SecureServer, bearer, decide, halt, refused, status
from support.server_group import RARELY_ON_ENVOY

from local.stack.ports import free_ports
from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.client.retries import retry_delay
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from server.security.private import write_private

pytestmark = pytest.mark.stack
_CODES = grpc.StatusCode
_PASSWORD = "hunter2-is-the-password"
_SDK_KEY = "sdk-0123-of-a-flag-provider"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    """A server of two processes whose settings hold secrets."""
    server = SecureServer(tmp_path_factory.mktemp("two"), "token")
    secrets = server.path("secrets")
    secrets.mkdir()
    write_private(secrets / "PRETRADE_REDIS_URL", f"redis://:{_PASSWORD}@127.0.0.1:9/0")
    server.env.pop("PRETRADE_REDIS_URL")
    server.env["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parents[1]), server.env.get("PYTHONPATH", "")))
    provider = {
        "CONTROL__FLAG_PROVIDER": "support.flag_provider:make",
        "CONTROL__FLAG_PROVIDER_OPTIONS": json.dumps({"sdk_key": _SDK_KEY}),
    }
    with server.running(PROCESSES="2", SECRETS_DIR=str(secrets), GRPC__HEALTH_PORT=str(free_ports(1)[0]), **provider):
        yield server


def test_processes_see_each_other_and_nobody_steers_by_their_sockets(two: SecureServer) -> None:
    token = two.token("operator")

    def processes() -> list[admin_pb2.ProcessStatus]:
        with two.channel(two.admin) as channel:
            return [one for one in status(channel, token).processes if one.ready]

    found = eventually(processes, lambda found: len(found) == 2)
    for one in found:
        with grpc.insecure_channel(f"unix:{socket_of(two, one.index)}") as channel:
            assert refused(halt, channel) is _CODES.PERMISSION_DENIED
            assert refused(halt, channel, token) is _CODES.PERMISSION_DENIED, "whatever is shown there"


def socket_of(server: SecureServer, index: int) -> Path:
    """Where a process answers the others."""
    children = psutil.Process(server.process.pid).children()
    found = {str(one.laddr) for child in children for one in child.net_connections("unix") if one.laddr}
    return Path(next(path for path in found if path.endswith(f"/process-{index}.sock")))


def test_callers_learn_who_they_are_and_what_they_may_do(two: SecureServer) -> None:
    service = "/pretrade.admin.v1.AdminService/"

    def known(role: str) -> admin_pb2.GetCallerResponse:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        request = admin_pb2.GetCallerRequest()
        return stub.GetCaller(request, timeout=SECONDS, metadata=bearer(two.token(role, sub="ann")))

    with two.channel(two.admin) as channel:
        found = {role: known(role) for role in ("trader", "viewer", "operator", "admin")}
        assert refused(known, "nobody") is _CODES.PERMISSION_DENIED
    assert all((one.name, one.states_author) == ("ann", False) for one in found.values())
    assert list(found["operator"].roles) == ["operator", "viewer"]
    may = {role: {one.removeprefix(service) for one in caller.methods} for role, caller in found.items()}
    assert "GetCaller" in may["trader"]
    assert "GetStatus" not in may["trader"]
    assert {"GetStatus", "SetFlag"} & may["viewer"] == {"GetStatus"}
    assert {"SetFlag", "SetChain"} & may["operator"] == {"SetFlag"}
    assert {"SetFlag", "SetChain", "PromoteCanary"} <= may["admin"]


def test_the_sockets_between_processes_are_the_servers_own(two: SecureServer) -> None:
    path = socket_of(two, 0)
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o777 == 0o700
    children = psutil.Process(two.process.pid).children()
    listening = [one for child in children for one in child.net_connections("unix") if one.status == "LISTEN"]
    assert not [one for one in listening if not str(one.laddr).startswith("/")], "an abstract one has no permissions"


@pytest.mark.long
def test_refusals_can_be_listed(two: SecureServer) -> None:
    with two.channel(two.admin) as channel:
        assert refused(halt, channel, two.token("viewer", sub="eve\x07")) is _CODES.UNAUTHENTICATED
        assert refused(halt, channel, two.token("viewer", sub="eve")) is _CODES.PERMISSION_DENIED
    where = ("audit", "refusals", "--database-url", two.env["PRETRADE_DATABASE_URL"])

    def listed() -> list[dict[str, object]]:
        return [json.loads(line) for line in pretrade(two, *where, "--json").stdout.splitlines()]

    def is_there(rows: list[dict[str, object]]) -> bool:
        # Those of the tests before are there, too; and each process ships its own.
        return any(row["caller"] == "eve" for row in rows) and any(row["reason"] == "MALFORMED_TOKEN" for row in rows)

    found = eventually(listed, is_there)
    newest = next(row for row in found if row["caller"] == "eve")
    assert newest["reason"] == "ROLE_MISSING"
    assert (newest["plane"], newest["peer"]) == ("admin", "127.0.0.1")
    assert newest["method"] == "/pretrade.admin.v1.AdminService/SetTradingState"
    shown = pretrade(two, *where, "--since", "1h", "--limit", "5")
    assert "ROLE_MISSING" in shown.stdout


def test_a_probe_without_tls_learns_of_health_and_of_nothing_else(two: SecureServer) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{two.env['PRETRADE_GRPC__HEALTH_PORT']}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its types know no methods
        for service in ("", "liveness", "pretrade.decision.v1.DecisionService"):
            found = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=SECONDS)
            assert found.status == health_pb2.HealthCheckResponse.SERVING
        assert refused(decide, channel) is _CODES.UNIMPLEMENTED
        assert refused(status, channel) is _CODES.UNIMPLEMENTED


def test_no_secret_is_in_what_the_server_says_or_keeps(two: SecureServer) -> None:
    token = two.token("viewer")
    with two.channel(two.admin) as channel:
        shown = str(status(channel, token))
    with urlopen(f"http://127.0.0.1:{two.env['PRETRADE_METRICS__PORT']}/metrics", timeout=5.0) as response:
        metrics = response.read().decode()
    entries = eventually(two.entries, lambda found: any(entry.HasField("settings") for entry in found))
    help_page = subprocess.run(
        [sys.executable, "-m", "server", "--help"], env=two.env, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "server"],
        env=two.env | {"PRETRADE_REDIS_URL": f"http://:{_PASSWORD}@127.0.0.1", "PRETRADE_DATABASE_URL": _PASSWORD},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert wrong.returncode == 2
    key = two.path("server.key").read_text().splitlines()[1]
    said = {
        "log": two.log(),
        "status": shown,
        "metrics": metrics,
        "journal and SQL": "".join(map(str, entries)),
        "help": help_page,
        "an error": wrong.stderr + wrong.stdout,
    }
    kept = b"".join(path.read_bytes() for path in two.directory.glob("*.db*") if path.is_file())
    for secret in (_PASSWORD, _SDK_KEY, key, token, token.rpartition(".")[2]):
        for what, text in said.items():
            assert secret not in text, what
        assert secret.encode() not in kept, "on disk"


def without_settings(server: SecureServer) -> dict[str, str]:
    return {name: value for name, value in server.env.items() if not name.startswith("PRETRADE_")}


def pretrade(server: SecureServer, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the command."""
    argv = [sys.executable, "-m", "local", *arguments]
    return subprocess.run(
        argv, env=without_settings(server) | env, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.long
def test_the_command_shows_credentials(two: SecureServer) -> None:
    token_file = two.path("operator.token")
    write_private(token_file, two.token("operator", sub="carol") + "\n")
    given = ("--tls-ca", str(two.path("ca.pem")), "--token-file", str(token_file))
    shown = pretrade(two, *given, "status", "--target", two.admin, "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["processCount"] == 2
    variables = {"PRETRADE_CLIENT_CA": str(two.path("ca.pem")), "PRETRADE_CLIENT_TOKEN": two.token("viewer")}
    looked = pretrade(two, "state", "--target", two.admin, **variables)
    assert (looked.returncode, looked.stdout.strip()) == (0, "ACTIVE"), looked.stderr
    denied = pretrade(two, "flag", "shadow", "off", "--reason", "test", "--target", two.admin, **variables)
    assert denied.returncode == 1
    assert "PERMISSION_DENIED" in denied.stderr
    trader = variables | {"PRETRADE_CLIENT_TOKEN": two.token("trader")}
    asked = pretrade(two, "decide", INSTRUMENTS[0], "buy", "1", "--target", two.decision, "--json", **trader)
    assert json.loads(asked.stdout)["action"] == "ACTION_ABSTAIN", asked.stderr
    outcome = ("audit", "outcome", "nobody-decided-this", "--filled", "0", "--reporter", "ems", "--target", two.admin)
    assert "PERMISSION_DENIED" in pretrade(two, *outcome, **variables).stderr
    assert "NOT_FOUND" in pretrade(two, *outcome, **trader).stderr


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ((), "cannot be reached"),
        (("--tls-ca", "nowhere.pem"), "nowhere.pem"),
        (("--token-file", "nowhere.token"), "nowhere.token"),
    ],
)
def test_the_command_says_what_is_wrong_with_credentials(
    two: SecureServer, given: tuple[str, ...], problem: str
) -> None:
    ended = pretrade(two, *given, "state", "--target", two.admin)
    assert ended.returncode in (2, 3)
    assert problem in ended.stderr.replace("\n", " ")
    assert "Traceback" not in ended.stderr


def test_the_command_sends_no_token_in_the_open(two: SecureServer) -> None:
    ended = pretrade(two, "state", "--target", "192.0.2.1:7002", PRETRADE_CLIENT_TOKEN="secret")
    assert ended.returncode == 2
    assert "without TLS" in ended.stderr


def test_trial_credentials_are_all_that_a_trial_needs(two: SecureServer, tmp_path: Path) -> None:
    made = pretrade(two, "trial-credentials", str(tmp_path / "trial"))
    assert made.returncode == 0, made.stderr
    assert "trials only" in made.stdout
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "trial").iterdir())
    script = f'set -a; . {tmp_path / "trial" / "trial.env"}; exec "{sys.executable}" -c "{_CHECK}"'
    checked = subprocess.run(["bash", "-c", script], env=without_settings(two), timeout=60, check=False)
    assert checked.returncode == 0


_CHECK = """
import server.settings, server.security.security as s
import time
found = server.settings.load()
assert found.access.admin == 'token'
security = s.Security(found.tls, found.tokens, found.access, None, None, 'x', time.monotonic)
assert security.material and security.verifier
"""


@pytest.fixture(scope="module", params=RARELY_ON_ENVOY)
def limited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    server = SecureServer(tmp_path_factory.mktemp(f"limited-{request.param}"), "token")
    with server.running(GRPC__EDGE=request.param, ACCESS__DECISIONS_PER_SECOND="2", ACCESS__ADMIN_CALLS_PER_SECOND="2"):
        yield server


def order(number: int) -> pb.Order:
    return pb.Order(order_ref=f"{number}", instrument=INSTRUMENTS[0], side=pb.SIDE_BUY, quantity=1.0, strategy="test")


def test_a_caller_who_asks_too_often_is_told_when_to_come_back(limited: SecureServer) -> None:
    greedy, modest = limited.token("trader", sub="greedy"), limited.token("trader", sub="modest")
    codes: Counter[grpc.StatusCode] = Counter()
    delays = set[float | None]()
    started = time.monotonic()
    with limited.channel(limited.decision) as channel:
        for _ in range(40):
            try:
                decide(channel, greedy)
                codes[_CODES.OK] += 1
            except grpc.RpcError as error:
                codes[error.code()] += 1
                if error.code() is _CODES.RESOURCE_EXHAUSTED:
                    details = rpc_status.from_call(error).details  # type: ignore[arg-type]  # it is a call as well
                    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
                    assert details[0].Unpack(info)
                    assert details[1].Unpack(retry)
                    assert (info.reason, retry.retry_delay.ToMilliseconds()) == ("RATE_LIMITED", 500)
                    delays.add(retry_delay(error))
        elapsed = time.monotonic() - started
        assert set(codes) == {_CODES.OK, _CODES.RESOURCE_EXHAUSTED}
        assert delays == {0.5}
        assert 4 <= codes[_CODES.OK] <= 4 + 2 * elapsed + 1
        decide(channel, modest)
        assert limited._serves(), "health is for everybody, at any rate"
    assert limited.metric("pretrade_access_refused_total", reason="RATE_LIMITED") >= codes[_CODES.RESOURCE_EXHAUSTED]


def test_orders_count_and_not_calls(limited: SecureServer) -> None:
    token = limited.token("trader", sub="batches")
    with limited.channel(limited.decision) as channel:
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        batch = pb.DecideBatchRequest(orders=[order(number) for number in range(40)])
        results = stub.DecideBatch(batch, timeout=SECONDS, metadata=bearer(token)).results
        assert 4 <= sum(result.HasField("decision") for result in results) < 40
        assert {result.error.code for result in results} == {0, code_pb2.RESOURCE_EXHAUSTED}
        streamed = stub.DecideStream(
            (pb.DecideStreamRequest(order=order(number)) for number in range(40)),
            timeout=SECONDS,
            metadata=bearer(limited.token("trader", sub="streams")),
        )
        answered = [answer.result for answer in streamed]
        assert len(answered) == 40
        assert 4 <= sum(result.HasField("decision") for result in answered) < 40


def test_the_admin_plane_has_rates_of_its_own(limited: SecureServer) -> None:
    token = limited.token("viewer", sub="dashboard")
    with limited.channel(limited.admin) as channel:
        codes: Counter[grpc.StatusCode] = Counter()
        for _ in range(40):
            try:
                status(channel, token)
                codes[_CODES.OK] += 1
            except grpc.RpcError as error:
                codes[error.code()] += 1
        assert set(codes) == {_CODES.OK, _CODES.RESOURCE_EXHAUSTED}
        halt(channel, limited.token("operator", sub="on-call"))
