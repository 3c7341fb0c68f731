"""F6: who is let in, and with exactly which status everybody else is not."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import grpc
import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.harness import INSTRUMENTS, eventually
from support.secure_server import SecureServer, bearer, decide, halt, refused, secret_in, status
from support.server_group import RARELY_ON_GRPC_AIO
from websockets import ConnectionClosed, Subprotocol
from websockets.asyncio.client import connect

from local.stack.ports import free_ports
from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from server.http.events import SUBPROTOCOL
from server.security.trial import TrialIssuer, jwks

pytestmark = pytest.mark.stack
_CODES = grpc.StatusCode


@pytest.fixture(scope="module", params=RARELY_ON_GRPC_AIO)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    server = SecureServer(tmp_path_factory.mktemp(f"tokens-{request.param}"), "token")
    (http,) = free_ports(1)
    with server.running(GRPC__EDGE=request.param, HTTP__PORT=str(http)):
        yield server


def unsigned(server: SecureServer) -> str:
    """A token that says it needs no signature."""
    head, claims, _ = server.token("admin").split(".")
    header = json.loads(base64.urlsafe_b64decode(head + "=="))
    none = base64.urlsafe_b64encode(json.dumps(header | {"alg": "none"}).encode()).rstrip(b"=").decode()
    return f"{none}.{claims}."


def signed_with_the_public_key(server: SecureServer) -> str:
    """A token whose secret everybody knows: the issuer's public key taken for a password."""
    pem = server.issuer.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    _, claims, _ = server.token("admin").split(".")
    header = {"alg": "HS256", "typ": "JWT", "kid": server.issuer.kid}
    head = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=").decode()
    mac = hmac.digest(pem, f"{head}.{claims}".encode(), hashlib.sha256)
    return f"{head}.{claims}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"


def tampered(server: SecureServer) -> str:
    """Somebody else's claims under a good signature."""
    head, _, signature = server.token("viewer").split(".")
    return f"{head}.{server.token('admin').split('.')[1]}.{signature}"


BAD_TOKENS: dict[str, tuple[Callable[[SecureServer], str | None], grpc.StatusCode, str]] = {
    "no token": (lambda server: None, _CODES.UNAUTHENTICATED, "NO_TOKEN"),
    "no JWT": (lambda server: "letmein", _CODES.UNAUTHENTICATED, "MALFORMED_TOKEN"),
    "expired": (lambda server: server.token("admin", exp=time.time() - 60), _CODES.UNAUTHENTICATED, "TOKEN_EXPIRED"),
    "not yet valid": (
        lambda server: server.token("admin", nbf=time.time() + 60),
        _CODES.UNAUTHENTICATED,
        "TOKEN_NOT_YET_VALID",
    ),
    "issued tomorrow": (
        lambda server: server.token("admin", iat=time.time() + 60),
        _CODES.UNAUTHENTICATED,
        "TOKEN_NOT_YET_VALID",
    ),
    "for a year": (
        lambda server: server.token("admin", exp=time.time() + 365 * 86_400),
        _CODES.UNAUTHENTICATED,
        "TOKEN_LIVES_TOO_LONG",
    ),
    "wrong audience": (lambda server: server.token("admin", aud="payroll"), _CODES.UNAUTHENTICATED, "WRONG_AUDIENCE"),
    "wrong issuer": (lambda server: server.token("admin", iss="mallory"), _CODES.UNAUTHENTICATED, "WRONG_ISSUER"),
    "no expiry": (lambda server: server.token("admin", exp=None), _CODES.UNAUTHENTICATED, "CLAIM_MISSING"),
    "expiry no number": (lambda server: server.token("admin", exp="soon"), _CODES.UNAUTHENTICATED, "MALFORMED_TOKEN"),
    "no audience": (lambda server: server.token("admin", aud=None), _CODES.UNAUTHENTICATED, "CLAIM_MISSING"),
    "no subject": (lambda server: server.token("admin", sub=None), _CODES.UNAUTHENTICATED, "CLAIM_MISSING"),
    "alg=none": (unsigned, _CODES.UNAUTHENTICATED, "ALGORITHM_NOT_ALLOWED"),
    "HS256 with the public key": (signed_with_the_public_key, _CODES.UNAUTHENTICATED, "ALGORITHM_NOT_ALLOWED"),
    "another's claims": (tampered, _CODES.UNAUTHENTICATED, "BAD_SIGNATURE"),
    "unknown kid": (
        lambda server: TrialIssuer("nobody").token("admin-1", ["admin"]),
        _CODES.UNAUTHENTICATED,
        "UNKNOWN_KEY",
    ),
    "another key of that kid": (
        lambda server: TrialIssuer(server.issuer.kid).token("admin-1", ["admin"]),
        _CODES.UNAUTHENTICATED,
        "BAD_SIGNATURE",
    ),
    "RS256 for an EC key": (
        lambda server: TrialIssuer(server.issuer.kid, "RS256").token("admin-1", ["admin"]),
        _CODES.UNAUTHENTICATED,
        "ALGORITHM_NOT_ALLOWED",
    ),
    "right token, wrong role": (lambda server: server.token("viewer"), _CODES.PERMISSION_DENIED, "ROLE_MISSING"),
    "a trader's token": (lambda server: server.token("trader"), _CODES.PERMISSION_DENIED, "ROLE_MISSING"),
    "a role nobody gave": (lambda server: server.token("root"), _CODES.PERMISSION_DENIED, "ROLE_MISSING"),
}
"""What is shown, and what the admin plane says to it and writes down."""


@pytest.mark.fault(
    "F6",
    "21 kinds of bad credentials",
    "Refused with exactly UNAUTHENTICATED or PERMISSION_DENIED. The refusal is audited and shows no secret.",
)
def test_the_admin_plane_refuses_bad_credentials(server: SecureServer, seen: Callable[[str], None]) -> None:
    shown: list[str] = []
    before = len(server.refusals())
    with server.channel(server.admin) as channel:
        for what, (make, code, reason) in BAD_TOKENS.items():
            token = make(server)
            shown += [token] if token and len(token) > 40 else []
            counted = server.metric("pretrade_access_refused_total", plane="admin", reason=reason)
            with pytest.raises(grpc.RpcError) as error:
                halt(channel, token)
            assert error.value.code() is code, (what, error.value)
            after = server.metric("pretrade_access_refused_total", plane="admin", reason=reason)
            assert after == counted + 1, what
        assert status(channel, server.token("viewer")).trading_state == admin_pb2.TRADING_STATE_ACTIVE
    entries = eventually(server.refusals, lambda found: len(found) >= before + len(BAD_TOKENS))[before:]
    assert [entry.reason for entry in entries] == [reason for _, _, reason in BAD_TOKENS.values()]
    assert {entry.method for entry in entries} == {"/pretrade.admin.v1.AdminService/SetTradingState"}
    assert [entry.caller for entry in entries[-3:]] == ["viewer-1", "trader-1", "root-1"]
    assert not any(entry.caller for entry in entries[:-3])
    kept = server.log() + "".join(map(str, server.entries()))
    assert secret_in(kept, shown) == []
    seen(f"{len(BAD_TOKENS)} kinds refused, each with its status, each in the audit")


@pytest.mark.fault("F6", "Valid tokens of every role", "Each caller may do what its role allows, and nothing more.")
def test_each_role_may_do_what_it_may(server: SecureServer, seen: Callable[[str], None]) -> None:
    tokens = {role: server.token(role) for role in ("trader", "viewer", "operator", "admin")}
    with server.channel(server.admin) as admin, server.channel(server.decision) as decision:
        calls: dict[str, tuple[Callable[[str], object], set[str]]] = {
            "decide": (partial(decide, decision), {"trader", "admin"}),
            "status": (partial(status, admin), {"viewer", "operator", "admin"}),
            "halt": (partial(halt, admin), {"operator", "admin"}),
        }
        for what, (call, allowed) in calls.items():
            for role, token in tokens.items():
                if role in allowed:
                    call(token)
                else:
                    assert refused(call, token) is _CODES.PERMISSION_DENIED, (what, role)
        assert refused(decide, decision, None) is _CODES.UNAUTHENTICATED
    seen("trader, viewer, operator, admin: 12 of 12 as the table says")


def test_a_change_has_its_author_from_the_token(server: SecureServer) -> None:
    with server.channel(server.admin) as channel:
        halt(channel, server.token("operator", sub="alice"), author="bob")

    def authors() -> list[str]:
        return [entry.control_change.author for entry in server.entries() if entry.HasField("control_change")]

    eventually(authors, lambda found: "alice" in found)
    assert "bob" not in authors()


@pytest.mark.fault(
    "F6",
    "The issuer's keys are replaced; a token and a caller are revoked",
    "It takes effect within a second. Other callers notice nothing.",
)
def test_keys_and_revocations_are_taken_over(server: SecureServer, seen: Callable[[str], None]) -> None:
    old, gone = server.token("viewer"), server.token("viewer", jti="stolen")
    banned = server.token("viewer", sub="mallory")
    with server.channel(server.admin) as channel:
        for token in (old, gone, banned):
            status(channel, token)
        server.path("revoked").write_text("# stolen laptop\nstolen\n")
        server.path("policy.json").write_text('{"denied": ["sub:mallory"]}')

        def code(token: str) -> grpc.StatusCode:
            try:
                status(channel, token)
            except grpc.RpcError as error:
                found: grpc.StatusCode = error.code()
                return found
            return _CODES.OK

        started = time.monotonic()
        eventually(lambda: {code(gone), code(banned)}, lambda codes: codes == {_CODES.UNAUTHENTICATED})
        assert code(old) is _CODES.OK
        seen(f"revoked after {time.monotonic() - started:.2f} s")
        newer = TrialIssuer("trial-2", "RS256")
        server.path("jwks.json").write_text(jwks((newer,)))
        eventually(lambda: code(newer.token("viewer-1", ["viewer"])), lambda found: found is _CODES.OK)
        assert code(old) is _CODES.UNAUTHENTICATED, "its key is no longer the issuer's"
        server.path("jwks.json").write_text(jwks((server.issuer, newer)))
        eventually(lambda: code(old), lambda found: found is _CODES.OK)


def test_json_callers_show_the_same_credentials(server: SecureServer) -> None:
    trusting = ssl.create_default_context(cadata=server.authority.pem.decode())
    on_envoy = server.env["PRETRADE_GRPC__EDGE"] == "envoy"
    port = server.env["PRETRADE_GRPC__PORT" if on_envoy else "PRETRADE_HTTP__PORT"]
    order = {"order_ref": "j", "instrument": INSTRUMENTS[0], "side": "SIDE_BUY", "quantity": 1, "strategy": "t"}
    viewer, trader = (dict(bearer(server.token(role))) for role in ("viewer", "trader"))
    with httpx.Client(verify=trusting, base_url=f"https://127.0.0.1:{port}") as web:
        assert web.post("/v1/decide", json={"order": order}).status_code == 401
        assert web.post("/v1/decide", json={"order": order}, headers=viewer).status_code == 403
        assert web.post("/v1/decide", json={"order": order}, headers=trader).json()["decision"]["order_ref"] == "j"


def test_who_may_see_the_server_over_http_is_decided_by_the_same_roles(server: SecureServer) -> None:
    trusting = ssl.create_default_context(cadata=server.authority.pem.decode())
    viewer, trader = (dict(bearer(server.token(role))) for role in ("viewer", "trader"))
    with httpx.Client(verify=trusting, base_url=f"https://127.0.0.1:{server.env['PRETRADE_HTTP__PORT']}") as web:
        status = "/pretrade.admin.v1.AdminService/GetStatus"
        assert web.post(status, json={}).status_code == 401
        assert web.post(status, json={}, headers=trader).json()["reason"] == "ROLE_MISSING"
        assert web.post(status, json={}, headers=viewer).json()["instance_id"]
        halt = {"state": "halted", "reason": "test"}
        refused = web.post("/pretrade.admin.v1.AdminService/SetTradingState", json=halt, headers=viewer)
        assert refused.status_code == 403
        assert web.get("/health").json() == {"status": "SERVING"}


@pytest.mark.long
@pytest.mark.parametrize("what", ["decisions", "signals"])
async def test_what_is_watched_over_http_ends_with_the_credentials(server: SecureServer, what: str) -> None:
    trusting = ssl.create_default_context(cadata=server.authority.pem.decode())
    at = f"127.0.0.1:{server.env['PRETRADE_HTTP__PORT']}/v1/{what}/events"
    stolen = server.token("viewer", jti=f"stolen-{what}")
    trader = dict(bearer(server.token("trader")))
    offered = [Subprotocol(SUBPROTOCOL), Subprotocol(f"bearer.{stolen}")]
    async with httpx.AsyncClient(verify=trusting, timeout=60.0) as web:
        assert (await web.get(f"https://{at}")).status_code == 401
        assert (await web.get(f"https://{at}", headers=trader)).json()["reason"] == "ROLE_MISSING"
        # In one thread: the blocking client of WebSockets reads and writes a TLS connection in two, and loses answers.
        async with (
            web.stream("GET", f"https://{at}", headers=dict(bearer(stolen))) as answer,
            connect(f"wss://{at}", ssl=trusting, subprotocols=offered) as socket,
            asyncio.timeout(60.0),
        ):
            assert answer.status_code == 200
            with server.path("revoked").open("a") as revoked:
                revoked.write(f"stolen-{what}\n")
            *_, last = [line async for line in answer.aiter_lines() if line]
            assert json.loads(last.removeprefix("data: "))["reason"] == "TOKEN_REVOKED"
            messages = []
            with suppress(ConnectionClosed):
                while True:
                    messages.append(await socket.recv())
            assert json.loads(messages[-1])["error"]["reason"] == "TOKEN_REVOKED"
            assert (socket.close_code, socket.close_reason) == (1008, "TOKEN_REVOKED")
    eventually(lambda: server.metric(f"pretrade_{_WATCHERS[what]}_watchers"), lambda watchers: watchers == 0)


_WATCHERS = {"decisions": "decision", "signals": "feature"}


def test_nobody_tries_from_another_address_than_its_own(server: SecureServer) -> None:
    """Attempts are limited by address: who could choose his own would have no limit, and could use up another's."""
    since = time.time_ns()
    order = pb.Order(order_ref="a", instrument=INSTRUMENTS[0], side=pb.SIDE_BUY, quantity=1.0, strategy="test")
    claimed = (("x-forwarded-for", "198.51.100.7"), ("x-pretrade-peer", "198.51.100.7"), *bearer("no token"))
    with server.channel(server.decision) as channel:
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        asked = partial(stub.Decide, pb.DecideRequest(order=order), timeout=5.0, metadata=claimed)
        assert refused(asked) is _CODES.UNAUTHENTICATED
    entries = eventually(lambda: [one for one in server.refusals() if one.refused_at_ns >= since], bool)
    assert {one.peer for one in entries} == {"127.0.0.1"}


def test_health_is_for_everybody(server: SecureServer) -> None:
    assert server._serves()  # without a token


def test_reflection_is_for_callers(server: SecureServer) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc  # noqa: PLC0415

    with server.channel(server.decision) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        assert refused(lambda: list(stub.ServerReflectionInfo(iter((request,))))) is _CODES.UNAUTHENTICATED
        answer = list(stub.ServerReflectionInfo(iter((request,)), metadata=bearer(server.token("trader"))))
        assert answer[0].list_services_response.service


def test_the_audit_service_asks_for_the_same_credentials(server: SecureServer) -> None:
    from pretrade.audit.v1 import audit_pb2, audit_pb2_grpc  # noqa: PLC0415

    with server.channel(server.admin) as channel:
        stub = audit_pb2_grpc.AuditServiceStub(channel)
        request = audit_pb2.ListDecisionsRequest()
        assert refused(lambda: stub.ListDecisions(request, timeout=5.0)) is _CODES.UNAUTHENTICATED
        watch = audit_pb2.WatchDecisionsRequest()
        assert refused(lambda: list(stub.WatchDecisions(watch, timeout=5.0))) is _CODES.UNAUTHENTICATED
        stub.ListDecisions(request, timeout=20.0, metadata=bearer(server.token("viewer")))


def test_an_unknown_token_costs_one_signature_and_a_known_one_none(server: SecureServer) -> None:
    token = server.token("trader")
    with server.channel(server.decision) as channel:
        before = server.metric("pretrade_tokens_verified_total")
        for _ in range(20):
            decide(channel, token)
        assert server.metric("pretrade_tokens_verified_total") == before + 1


def test_grpcurl_style_headers_are_understood(server: SecureServer) -> None:
    with server.channel(server.admin) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        for prefix in ("bearer", "BEARER", "Bearer  "):
            metadata = (("authorization", f"{prefix} {server.token('viewer')}"),)
            stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=5.0, metadata=metadata)
        basic = (("authorization", "Basic dXNlcjpwYXNz"),)
        assert (
            refused(lambda: stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=5.0, metadata=basic))
            is _CODES.UNAUTHENTICATED
        )
