"""F6: an issuer's keys behind a URL: rotation, outage, and what such a server may try."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support.harness import eventually

from feature_cache.token_bucket import TokenBuckets
from server.errors import CredentialsUnknownError, PretradeError, RateLimitedError, UnauthenticatedError
from server.security.access import AccessControl
from server.security.identity import Attempt, Caller, Policy, Role
from server.security.keys import UrlKeys
from server.security.refusals import Refusals
from server.security.settings import TokenSettings
from server.security.tokens import TokenVerifier
from server.security.trial import ISSUER, TrialIssuer, jwks

_METHOD = "/pretrade.admin.v1.AdminService/GetStatus"


@dataclass
class KeyServer:
    """An issuer's HTTP server."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    asked: int = 0
    url: str = ""

    @contextmanager
    def serving(self) -> Iterator[KeyServer]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                self.send_response(outer.status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            self.url = f"http://127.0.0.1:{server.server_port}/keys"
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


class Rig:
    """Access to an admin port whose issuer is behind a URL, by a clock that moves."""

    def __init__(self, url: str) -> None:
        self.now = 1_000.0
        settings = TokenSettings(
            issuer=ISSUER, jwks=url, refresh_seconds=300, refetch_seconds=10, max_key_age_seconds=3_600
        )
        self.keys = UrlKeys(url, settings, lambda: self.now)
        self.verifier = TokenVerifier(settings, self.keys, frozenset, time.time)
        self.keys.on_change(self.verifier.forget)

        async def record(entry: bytes) -> None:
            return None

        self.refusals = Refusals(record, TokenBuckets(1e3, 1.0, lambda: self.now), "test", time.time_ns)
        self.policy = Policy({"claim:viewer": Role.VIEWER})
        self.access = AccessControl(
            plane="admin",
            credential="token",
            siblings=False,
            verifier=self.verifier,
            keys=self.keys,
            operator=None,
            material=None,
            policy=lambda: self.policy,
            calls=None,
            failures=TokenBuckets(2.0, 2.0, lambda: self.now),
            refusals=self.refusals,
            wall_clock=time.time,
        )

    async def admit(self, token: str, peer: str = "10.0.0.1") -> Caller | None:
        return await self.access.admit(Attempt(_METHOD, f"Bearer {token}", lambda: peer, lambda: None))


@pytest.fixture
def issuer() -> TrialIssuer:
    return TrialIssuer("k1")


@pytest.fixture
def server(issuer: TrialIssuer) -> Iterator[KeyServer]:
    with KeyServer(jwks((issuer,)).encode()).serving() as server:
        yield server


async def refusal(admission: Callable[[], Awaitable[object]]) -> str:
    with pytest.raises((UnauthenticatedError, CredentialsUnknownError)) as error:
        await admission()
    return error.value.reason


async def test_an_unknown_kid_has_the_keys_fetched_once_in_a_while(server: KeyServer, issuer: TrialIssuer) -> None:
    rig = Rig(server.url)
    caller = await rig.admit(issuer.token("a", ["viewer"]))
    assert caller is not None
    assert caller.name == "a"
    assert server.asked == 1
    rotated = TrialIssuer("k2")
    server.body = jwks((issuer, rotated)).encode()
    token = rotated.token("a", ["viewer"])
    assert await refusal(lambda: rig.admit(token)) == "UNKNOWN_KEY"
    assert server.asked == 1, "a moment ago it had no other"
    rig.now += 10
    await asyncio.gather(*(rig.admit(token) for _ in range(20)))
    assert server.asked == 2, "one fetch for all who wait"
    for number in range(3):
        assert await refusal(lambda: rig.admit(TrialIssuer("k3").token("a"))) == "UNKNOWN_KEY", number
    assert server.asked == 2


async def test_keys_count_through_an_outage_until_they_are_too_old(server: KeyServer, issuer: TrialIssuer) -> None:
    rig = Rig(server.url)
    await rig.admit(issuer.token("a", ["viewer"]))
    server.status = 500
    rig.now += 3_000
    assert not await rig.keys.refresh()
    assert rig.keys.problem
    assert rig.keys.failures == 1
    await rig.admit(issuer.token("b", ["viewer"]))
    known = issuer.token("d", ["viewer"])
    await rig.admit(known)
    rig.now += 700
    assert await refusal(lambda: rig.admit(issuer.token("c", ["viewer"]))) == "TOKEN_KEYS_UNKNOWN"
    assert await refusal(lambda: rig.admit(known)) == "TOKEN_KEYS_UNKNOWN", "known or not: its key may be withdrawn"
    server.status = 200
    rig.now += 10
    assert await rig.keys.refresh()
    assert rig.keys.problem == ""
    await rig.admit(issuer.token("c", ["viewer"]))
    await rig.admit(known)


async def test_an_open_stream_is_as_good_as_its_credentials(server: KeyServer, issuer: TrialIssuer) -> None:
    rig = Rig(server.url)
    ended: dict[str, PretradeError] = {}
    going, begun = asyncio.Event(), asyncio.Semaphore(0)

    async def stream(name: str) -> None:
        caller = await rig.admit(issuer.token(name, ["viewer"]))
        with rig.access.watched(caller, lambda error: ended.__setitem__(name, error)):
            begun.release()
            await going.wait()

    streams = [asyncio.create_task(stream(name)) for name in ("alice", "bob")]
    for _ in streams:
        await begun.acquire()
    await rig.access.look_again()
    assert not ended
    rig.policy = Policy({"claim:viewer": Role.VIEWER}, denied=frozenset({"sub:bob"}))
    await rig.access.look_again()
    assert {name: error.reason for name, error in ended.items()} == {"bob": "DENIED"}
    rig.policy = Policy({"claim:viewer": Role.TRADER})
    await rig.access.look_again()
    assert ended["alice"].reason == "ROLE_MISSING"
    assert rig.refusals.counts["admin", "DENIED"] == rig.refusals.counts["admin", "ROLE_MISSING"] == 1
    await rig.access.look_again()
    assert rig.refusals.counts.total() == 2, "each is ended once"
    going.set()
    await asyncio.gather(*streams)


async def test_an_open_stream_ends_when_the_keys_are_too_old(server: KeyServer, issuer: TrialIssuer) -> None:
    rig = Rig(server.url)
    caller = await rig.admit(issuer.token("alice", ["viewer"]))
    ended: list[PretradeError] = []
    with rig.access.watched(caller, ended.append):
        server.status = 500
        rig.now += 3_700
        await rig.access.look_again()
    assert [error.reason for error in ended] == ["TOKEN_KEYS_UNKNOWN"]
    assert server.asked == 1, "nothing is fetched for it"


async def test_without_the_issuer_nobody_gets_in_and_nobody_is_called_a_liar(issuer: TrialIssuer) -> None:
    rig = Rig("http://127.0.0.1:9/keys")
    assert await refusal(lambda: rig.admit(issuer.token("a", ["viewer"]))) == "TOKEN_KEYS_UNKNOWN"
    assert rig.refusals.counts["admin", "TOKEN_KEYS_UNKNOWN"] == 1


@pytest.mark.parametrize("kind", ["redirect", "huge", "no JWKS", "a page"])
async def test_an_answer_that_is_no_jwks_is_not_taken(server: KeyServer, issuer: TrialIssuer, kind: str) -> None:
    rig = Rig(server.url)
    assert await rig.keys.refresh()
    good = server.body
    rig.now += 10
    match kind:
        case "redirect":
            server.status, server.headers = 302, {"Location": server.url + "2"}
        case "huge":
            server.body = good + b" " * 300_000
        case "no JWKS":
            server.body = b'{"keys": []}'
        case "a page":
            server.body = b"<html>"
    asked = server.asked
    assert not await rig.keys.refresh()
    assert server.asked == asked + 1, "a redirect is not followed"
    await rig.admit(issuer.token("a", ["viewer"]))


async def test_the_keys_are_renewed_without_being_asked_for(server: KeyServer) -> None:
    settings = TokenSettings(issuer=ISSUER, jwks=server.url, refresh_seconds=0.05, refetch_seconds=0.05)
    keys = UrlKeys(server.url, settings, asyncio.get_running_loop().time)
    told = asyncio.Event()
    running = asyncio.create_task(keys.run())
    try:
        await asyncio.to_thread(eventually, lambda: keys.current, bool)
        keys.on_change(told.set)
        server.body = jwks((TrialIssuer("k2"),)).encode()
        await asyncio.wait_for(told.wait(), 20)
        assert set(keys.current or ()) == {"k2"}
    finally:
        running.cancel()


async def test_guessing_is_cut_short_and_known_tokens_go_on(server: KeyServer, issuer: TrialIssuer) -> None:
    rig = Rig(server.url)
    known = issuer.token("a", ["viewer"])
    await rig.admit(known)
    forged = TrialIssuer("k1").token("a", ["viewer"])
    for _ in range(4):
        assert await refusal(lambda: rig.admit(forged)) == "BAD_SIGNATURE"
    verified = rig.verifier.verified
    for _ in range(50):
        with pytest.raises(RateLimitedError):
            await rig.admit(forged)
    assert rig.verifier.verified == verified, "nobody looks"
    await rig.admit(known)
    await rig.admit(issuer.token("b", ["viewer"]), peer="10.0.0.2")
    with pytest.raises(RateLimitedError):
        await rig.admit(issuer.token("c", ["viewer"]))
    rig.now += 1
    await rig.admit(issuer.token("c", ["viewer"]))
