"""F6: what a known caller may go on doing: streams whose caller is no longer welcome, strategies, rates, reports."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status
from support.harness import INSTRUMENTS, eventually
from support.secure_server import SECONDS, SecureServer, bearer
from support.server_group import EDGES, RARELY_ON_GRPC_AIO

from pretrade.audit.v1 import audit_pb2, audit_pb2_grpc, packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from server.security.private import write_private

pytestmark = pytest.mark.stack
_CODES = grpc.StatusCode
_BOUND_SECONDS = 4.0
"""A look at the files every 0.1 s and at open streams every second, on a machine that has other work."""


@pytest.fixture(scope="module", params=RARELY_ON_GRPC_AIO)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    server = SecureServer(tmp_path_factory.mktemp(f"callers-{request.param}"), "token")
    with server.running(GRPC__EDGE=request.param):
        yield server


@pytest.fixture(autouse=True)
def general_policy(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        policy(request.getfixturevalue("server"))


def policy(server: SecureServer, **entries: Any) -> None:
    """Puts a policy file in force."""
    before = server.metric("pretrade_credentials_version", file="access policy")
    if json.loads(server.path("policy.json").read_text()) == entries:
        return
    write_private(server.path("policy.json"), json.dumps(entries))
    eventually(lambda: server.metric("pretrade_credentials_version", file="access policy"), lambda now: now > before)


def order(strategy: str = "test", ref: str = "a", **changes: Any) -> pb.Order:
    fields: dict[str, Any] = {"instrument": INSTRUMENTS[0], "side": pb.SIDE_BUY, "quantity": 1.0}
    return pb.Order(order_ref=ref, strategy=strategy, **(fields | changes))


class Stream:
    """An open `DecideStream`."""

    def __init__(self, channel: grpc.Channel, token: str | None) -> None:
        self._orders: queue.SimpleQueue[pb.DecideStreamRequest | None] = queue.SimpleQueue()
        requests = iter(self._orders.get, None)
        self.call = decision_pb2_grpc.DecisionServiceStub(channel).DecideStream(requests, metadata=bearer(token))

    def ask(self, strategy: str = "test") -> pb.OrderResult:
        self._orders.put(pb.DecideStreamRequest(order=order(strategy)))
        return next(self.call).result

    def close(self) -> None:
        self._orders.put(None)

    def refusal(self) -> tuple[grpc.StatusCode, str]:
        """How the stream ends, by itself and within the bound."""
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as ended:
            next(self.call)
        assert time.monotonic() - started < _BOUND_SECONDS
        return ended.value.code(), reason(ended.value)


@contextmanager
def stream(server: SecureServer, token: str | None, pair: Any = None) -> Iterator[Stream]:
    with server.channel(server.decision, pair=pair) as channel:
        opened = Stream(channel, token)
        try:
            yield opened
        finally:
            opened.close()


def reason(error: Any) -> str:
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(error).details[0].Unpack(info)
    return str(info.reason)


@pytest.mark.fault(
    "F6",
    "On an open stream the token expires or is revoked, or its caller loses its role or is denied",
    "The stream ends within seconds.",
)
def test_an_open_stream_is_as_good_as_its_callers_credentials(
    server: SecureServer, seen: Callable[[str], None]
) -> None:
    policy(server, roles={"claim:desk": "trader"})
    with (
        stream(server, server.token("trader", sub="going")) as going,
        stream(server, server.token("trader", sub="stolen", jti="stolen-jti")) as revoked,
        stream(server, server.token("trader", sub="denied")) as denied,
        stream(server, server.token("trader", sub="moved", roles=["desk"])) as moved,
    ):
        for each in (going, revoked, denied, moved):
            assert each.ask().HasField("decision")
        policy(server, roles={"claim:desk": "viewer"}, denied=["sub:denied"])
        server.path("revoked").write_text("stolen-jti\n")
        assert denied.refusal() == (_CODES.UNAUTHENTICATED, "DENIED")
        assert moved.refusal() == (_CODES.PERMISSION_DENIED, "ROLE_MISSING")
        assert revoked.refusal() == (_CODES.UNAUTHENTICATED, "TOKEN_REVOKED")
        with stream(server, server.token("trader", sub="short", exp=int(time.time()) - 3)) as short:  # 5 s of leeway
            assert short.ask().HasField("decision")
            assert short.refusal() == (_CODES.UNAUTHENTICATED, "TOKEN_EXPIRED")
        assert going.ask().HasField("decision"), "nobody else is disturbed"
    told = eventually(
        server.refusals, lambda found: {"denied", "moved", "stolen", "short"} <= {one.caller for one in found}
    )
    assert {one.method for one in told} == {"/pretrade.decision.v1.DecisionService/DecideStream"}
    seen("denied, demoted, revoked and expired callers: streams ended, the others went on")


@pytest.mark.long
def test_a_watcher_of_the_audit_is_looked_at_as_well(server: SecureServer) -> None:
    with server.channel(server.admin) as channel:
        stub = audit_pb2_grpc.AuditServiceStub(channel)
        token = server.token("viewer", sub="watcher")
        watching = stub.WatchDecisions(audit_pb2.WatchDecisionsRequest(), metadata=bearer(token))
        watching.initial_metadata()
        policy(server, denied=["sub:watcher"])
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as ended:
            for _ in watching:
                pass
        assert (ended.value.code(), reason(ended.value)) == (_CODES.UNAUTHENTICATED, "DENIED")
        assert time.monotonic() - started < _BOUND_SECONDS


def test_a_stream_that_nobody_reads_ends_as_well(server: SecureServer) -> None:
    """Its caller has let answers pile up until none can be sent: it must not stay for that."""
    token = server.token("trader", sub="deaf")
    # The smallest window that a caller may have, and a caller that reads nothing.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1), ("grpc.use_local_subchannel_pool", 1)]
    credentials = grpc.ssl_channel_credentials(server.authority.pem)
    with grpc.secure_channel(server.decision, credentials, options) as channel:
        orders = (pb.DecideStreamRequest(order=order(ref=f"{number}")) for number in range(3_000))
        call = decision_pb2_grpc.DecisionServiceStub(channel).DecideStream(_open_ended(orders), metadata=bearer(token))
        next(call)
        policy(server, denied=["sub:deaf"])
        eventually(lambda: [one for one in server.refusals() if one.caller == "deaf"], bool)
        call.cancel()
    with stream(server, server.token("trader", sub="next")) as other:
        assert other.ask().HasField("decision")


def _open_ended(requests: Iterator[pb.DecideStreamRequest]) -> Iterator[pb.DecideStreamRequest]:
    yield from requests
    time.sleep(_BOUND_SECONDS)  # keeps the stream open, in the caller's own thread


@pytest.mark.fault(
    "F6",
    "A caller sends orders of a strategy that belongs to another caller",
    "PERMISSION_DENIED for these orders only; the refusal is audited.",
)
def test_strategies_are_bound_to_callers(server: SecureServer, seen: Callable[[str], None]) -> None:
    policy(server, strategies={"sub:eu": ["twap-*", "close"], "claim:desk": "vwap"}, roles={"claim:desk": "trader"})
    token = server.token("trader", sub="eu", roles=["trader", "desk"])
    with server.channel(server.decision) as channel:
        stub = decision_pb2_grpc.DecisionServiceStub(channel)

        def ask(strategy: str, shown: str = token) -> pb.Decision:
            request = pb.DecideRequest(order=order(strategy))
            return stub.Decide(request, timeout=SECONDS, metadata=bearer(shown)).decision

        for strategy in ("twap-1", "twap-", "close", "vwap"):
            assert ask(strategy).order_ref == "a"
        for strategy, shown in (("momentum", token), ("twap-1", server.token("trader", sub="us"))):
            with pytest.raises(grpc.RpcError) as refused:
                ask(strategy, shown)
            assert refused.value.code() is _CODES.PERMISSION_DENIED
            info = error_details_pb2.ErrorInfo()
            assert rpc_status.from_call(refused.value).details[0].Unpack(info)  # type: ignore[arg-type]
            assert (info.reason, dict(info.metadata)) == (
                "STRATEGY_NOT_ALLOWED",
                {"field": "strategy", "strategy": strategy},
            )
        named = ["twap-1", "momentum", "vwap", "close-2"]
        batch = pb.DecideBatchRequest(orders=[order(name, name) for name in named])
        results = stub.DecideBatch(batch, timeout=SECONDS, metadata=bearer(token)).results
        assert [result.HasField("decision") for result in results] == [True, False, True, False]
        assert {(result.error.code, result.error.reason) for result in results if result.HasField("error")} == {
            (code_pb2.PERMISSION_DENIED, "STRATEGY_NOT_ALLOWED")
        }
        assert "'momentum'" in results[1].error.message
    with stream(server, token) as going:
        assert going.ask("twap-9").HasField("decision")
        assert going.ask("momentum").error.reason == "STRATEGY_NOT_ALLOWED"
        policy(server, strategies={"sub:eu": "momentum"}, roles={"claim:desk": "trader"})
        eventually(lambda: going.ask("twap-9").error.reason, lambda found: found == "STRATEGY_NOT_ALLOWED")
        assert going.ask("momentum").HasField("decision"), "the stream goes on, by the policy of now"
    told = eventually(
        lambda: [one for one in server.refusals() if one.reason == "STRATEGY_NOT_ALLOWED"], lambda found: len(found) > 4
    )
    assert {one.caller for one in told} == {"eu", "us"}
    assert {one.peer for one in told} == {"127.0.0.1"}
    seen("unary, batch and stream: another's strategy refused by name, its neighbours decided")


def test_rates_go_by_caller_and_role(server: SecureServer) -> None:
    limits = {"role:trader": {"decisions_per_second": 2}, "sub:maker": {"decisions_per_second": 1_000}}
    policy(server, rates=limits | {"role:viewer": {"admin_calls_per_second": 2}})
    with server.channel(server.decision) as channel:
        stub = decision_pb2_grpc.DecisionServiceStub(channel)

        def decided(sub: str) -> int:
            batch = pb.DecideBatchRequest(orders=[order(ref=f"{number}") for number in range(60)])
            shown = bearer(server.token("trader", sub=sub))
            results = stub.DecideBatch(batch, timeout=SECONDS, metadata=shown).results
            assert {result.error.code for result in results} <= {0, code_pb2.RESOURCE_EXHAUSTED}
            return sum(result.HasField("decision") for result in results)

        assert decided("maker") == 60
        assert 4 <= decided("taker") < 12, "2 s of 2 a second"
    with server.channel(server.admin) as channel:
        audit = audit_pb2_grpc.AuditServiceStub(channel)
        codes = []
        for _ in range(20):
            metadata = bearer(server.token("viewer", sub="dashboard"))
            try:
                audit.ListDecisions(audit_pb2.ListDecisionsRequest(page_size=1), timeout=20.0, metadata=metadata)
            except grpc.RpcError as error:
                codes.append(error.code())
        assert set(codes) == {_CODES.RESOURCE_EXHAUSTED}


def test_an_outcome_is_its_callers_report(server: SecureServer) -> None:
    token = server.token("trader", sub="ems-1")
    with server.channel(server.decision) as channel:
        request = pb.DecideRequest(order=order())
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        decided = stub.Decide(request, timeout=SECONDS, metadata=bearer(token)).decision
    with server.channel(server.admin) as channel:
        audit = audit_pb2_grpc.AuditServiceStub(channel)

        def report(shown: str, reporter: str) -> audit_pb2.RecordOutcomeResponse:
            outcome = packet_pb2.Outcome(decision_id=decided.decision_id, reporter=reporter)
            request = audit_pb2.RecordOutcomeRequest(outcome=outcome)
            return audit.RecordOutcome(request, timeout=20.0, metadata=bearer(shown))

        assert report(token, "ems-1").outcome.reporter == "ems-1"
        assert report(token, "").existed, "who is known need not say who it is"
        assert report(token, "somebody-else").existed, "its own report again, whatever it calls itself"
        forged = report(server.token("trader", sub="mallory"), "ems-1")
        assert (forged.outcome.reporter, forged.existed) == ("mallory", False)
        found = audit.GetDecision(
            audit_pb2.GetDecisionRequest(decision_id=decided.decision_id),
            timeout=20.0,
            metadata=bearer(server.token("viewer")),
        )
        assert sorted(outcome.reporter for outcome in found.outcomes) == ["ems-1", "mallory"]


@pytest.mark.long
@pytest.mark.fault(
    "F6", "On an open stream the client certificate expires or is revoked", "The stream ends within seconds."
)
@pytest.mark.parametrize("edge", EDGES)
def test_a_stream_ends_with_its_client_certificate(edge: str, tmp_path: Path, seen: Callable[[str], None]) -> None:
    server = SecureServer(tmp_path, "certificate")
    with server.running(GRPC__EDGE=edge):
        going, revoked = server.authority.certify("trader"), server.authority.certify("trader")
        with stream(server, None, going) as good, stream(server, None, revoked) as bad:
            assert good.ask().HasField("decision")
            assert bad.ask().HasField("decision")
            write_private(server.path("crl.pem"), server.authority.revoking([revoked]).decode())
            assert bad.refusal() == (_CODES.UNAUTHENTICATED, "CERTIFICATE_REVOKED")
            assert good.ask().HasField("decision")
            with suppress(grpc.RpcError):
                bad.call.cancel()
    seen(f"{edge}: a revoked certificate's stream ended, another one's went on")
