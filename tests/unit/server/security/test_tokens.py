"""What makes a token good, by a clock that moves."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import CredentialsUnknownError, UnauthenticatedError
from server.security.keys import FileKeys, KeySet, parse
from server.security.settings import TokenSettings
from server.security.tokens import TokenVerifier, revocations
from server.security.trial import AUDIENCE, ISSUER, TrialIssuer, jwks

NOW = 1_800_000_000.0


class Keys:
    """Keys that a test replaces."""

    def __init__(self, issuers: list[TrialIssuer]) -> None:
        self.current: KeySet | None = parse(jwks(issuers).encode())
        self.problem = ""
        self.failures = 0

    def on_change(self, listener: Callable[[], None]) -> None: ...

    async def refresh(self) -> bool:
        return False

    async def run(self) -> None:
        return None


class Rig:
    def __init__(self, issuer: TrialIssuer, **changes: Any) -> None:
        self.now = NOW
        self.issuer = issuer
        self.keys = Keys([issuer])
        self.revoked: frozenset[str] = frozenset()
        settings = TokenSettings(issuer=ISSUER, jwks="/unused", leeway_seconds=5.0, **changes)
        self.verifier = TokenVerifier(settings, self.keys, lambda: self.revoked, lambda: self.now)

    def token(self, **changes: Any) -> str:
        claims: dict[str, Any] = {"roles": ["viewer"], "iat": NOW, "exp": NOW + 600}
        return self.issuer.token("alice", **(claims | changes))

    def reason(self, token: str) -> str:
        with pytest.raises(UnauthenticatedError) as error:
            self.verifier.verify(token)
        assert token not in str(error.value)
        return error.value.reason


@pytest.fixture(scope="module", params=["ES256", "RS256"])
def issuer(request: pytest.FixtureRequest) -> TrialIssuer:
    return TrialIssuer("k1", request.param)


@pytest.fixture
def rig(issuer: TrialIssuer) -> Rig:
    return Rig(issuer)


def test_a_good_token_names_its_caller(rig: Rig) -> None:
    token = rig.verifier.verify(rig.token(roles=["viewer", "x", 7]))
    assert (token.name, token.principals) == ("alice", ("sub:alice", "claim:viewer", "claim:x"))


def test_another_claim_may_name_the_caller_whose_principal_stays_its_subject(issuer: TrialIssuer) -> None:
    rig = Rig(issuer, name_claim="preferred_username")
    token = rig.verifier.verify(rig.token(sub="0b6ab6c0", preferred_username="alice"))
    assert (token.name, token.principals[0]) == ("alice", "sub:0b6ab6c0")
    for wrong in ({}, {"preferred_username": ""}, {"preferred_username": 7}, {"preferred_username": "x" * 201}):
        assert rig.reason(rig.token(**wrong)) == "MALFORMED_TOKEN"


def test_the_issuers_clock_may_differ_by_the_leeway_and_no_more(rig: Rig) -> None:
    for within in (-4.9, 0.0, 604.9):
        rig.now = NOW + within
        rig.verifier.verify(rig.token())
    rig.now = NOW - 5.1
    assert rig.reason(rig.token()) == "TOKEN_NOT_YET_VALID"
    rig.now = NOW + 605.0
    assert rig.reason(rig.token()) == "TOKEN_EXPIRED"


@pytest.mark.parametrize("jump", [3_600.0, -3_600.0])
def test_a_wall_clock_that_jumps_judges_tokens_by_its_own_time(rig: Rig, jump: float) -> None:
    """F1: tokens are the one thing here that goes by the wall clock."""
    token = rig.token()
    rig.verifier.verify(token)
    rig.now += jump
    if jump > 0:
        assert rig.verifier.known(token) is None
        assert rig.reason(token) == "TOKEN_EXPIRED"
    else:
        assert rig.verifier.known(token) is not None, "it was good, and is no older"
    rig.now = NOW
    rig.verifier.verify(token)


def test_a_known_token_is_not_verified_again_until_it_expires(rig: Rig) -> None:
    token = rig.token()
    assert rig.verifier.known(token) is None
    rig.verifier.verify(token)
    rig.now += 604.9
    assert rig.verifier.known(token) is not None
    assert rig.verifier.known(token[:-1] + ("A" if token[-1] != "A" else "B")) is None
    rig.now += 0.2
    assert rig.verifier.known(token) is None
    assert rig.verifier.verified == 1


def test_known_tokens_are_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.security.tokens._MAX_REMEMBERED", 3)
    tokens = [rig.token(jti=f"{number}") for number in range(4)]
    for token in tokens:
        rig.verifier.verify(token)
    assert [rig.verifier.known(token) is not None for token in tokens] == [False, True, True, True]


def test_new_keys_have_every_token_verified_anew(rig: Rig) -> None:
    token = rig.token()
    rig.verifier.verify(token)
    rig.keys.current = parse(jwks((TrialIssuer("k2", "ES256"),)).encode())
    rig.verifier.forget()
    assert rig.verifier.known(token) is None
    assert rig.reason(token) == "UNKNOWN_KEY"


def test_without_keys_nobody_knows(rig: Rig) -> None:
    rig.keys.current = None
    with pytest.raises(CredentialsUnknownError):
        rig.verifier.verify(rig.token())


def test_a_revoked_token_is_refused(rig: Rig) -> None:
    rig.revoked = revocations(b"# stolen\n\n  j1  \nj2\n")
    assert rig.revoked == {"j1", "j2"}
    assert rig.reason(rig.token(jti="j1")) == "TOKEN_REVOKED"
    rig.verifier.verify(rig.token(jti="j3"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"aud": ["payroll", "mail"]}, "WRONG_AUDIENCE"),
        ({"aud": 7}, "WRONG_AUDIENCE"),
        ({"iss": "mallory"}, "WRONG_ISSUER"),
        ({"sub": ""}, "MALFORMED_TOKEN"),
        ({"sub": "x" * 201}, "MALFORMED_TOKEN"),
        ({"sub": "two\nlines"}, "MALFORMED_TOKEN"),
        ({"exp": True}, "MALFORMED_TOKEN"),
        ({"exp": 1e300}, "MALFORMED_TOKEN"),
        ({"exp": "9" * 5}, "MALFORMED_TOKEN"),
        ({"exp": NOW + 90_000}, "TOKEN_LIVES_TOO_LONG"),
        ({"iat": None}, "CLAIM_MISSING"),
        ({"nbf": NOW + 60}, "TOKEN_NOT_YET_VALID"),
        ({"nbf": "soon"}, "MALFORMED_TOKEN"),
    ],
)
def test_claims_are_judged(rig: Rig, changes: dict[str, Any], reason: str) -> None:
    assert rig.reason(rig.token(**changes)) == reason


@pytest.mark.parametrize(
    "token", ["", ".", "..", "a.b", "a.b.c", "a.b.c.d.e", "é.ü.ß", "\udcff.a.b", "eyJ9.e30.", "x" * 9_000]
)
def test_what_is_no_token_is_refused(rig: Rig, token: str) -> None:
    assert rig.verifier.known(token) is None
    with pytest.raises(UnauthenticatedError) as error:
        rig.verifier.verify(token)
    assert error.value.reason in {"MALFORMED_TOKEN", "ALGORITHM_NOT_ALLOWED"}


def test_keys_that_cannot_sign_for_us_are_passed_over() -> None:
    good = TrialIssuer("good").jwk()
    others = [
        {"kty": "oct", "kid": "secret", "k": "c2VjcmV0"},
        {**good, "kid": "for encryption", "use": "enc"},
        {**good, "kid": "private", "d": "AAAA"},
        {**good, "kid": "another algorithm", "alg": "ES512"},
        {name: value for name, value in good.items() if name != "kid"},
        {"kty": "OKP", "crv": "Ed25519", "kid": "ed", "x": "AAAA"},
        "no key",
    ]
    assert set(parse(json.dumps({"keys": [*others, good]}).encode())) == {"good"}


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"keys": {}},
        {"keys": []},
        {"keys": [{"kty": "oct", "kid": "a", "k": "c2VjcmV0"}]},
        {"keys": [TrialIssuer("a").jwk(), TrialIssuer("a").jwk()]},
        {"keys": [{"kty": "EC", "crv": "P-256", "kid": "a", "x": "AA", "y": "AA"}]},
        {"keys": [{"kty": "RSA", "kid": "a", "n": "AQAB", "e": "AQAB"}]},
        {"keys": [{}] * 101},
    ],
)
def test_a_jwks_that_is_none_is_refused(document: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(json.dumps(document).encode())


async def test_a_file_of_keys_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    path.write_text(jwks((TrialIssuer("k1"),)))
    keys = FileKeys(path, 0.01)
    told = asyncio.Event()
    keys.on_change(told.set)
    watching = asyncio.create_task(keys.run())
    try:
        path.write_text(jwks((TrialIssuer("k2"),)))
        await asyncio.wait_for(told.wait(), 20)
        assert set(keys.current) == {"k2"}
    finally:
        watching.cancel()


_ISSUER = TrialIssuer("k1")


def verifier() -> TokenVerifier:
    settings = TokenSettings(issuer=ISSUER, jwks="/unused")
    return TokenVerifier(settings, Keys([_ISSUER]), lambda: frozenset({"stolen"}), lambda: NOW)


def verified(token: str) -> bool:
    """True for a good token, False for a refused one; raises for anything else."""
    one = verifier()
    try:
        good = one.verify(token)
    except UnauthenticatedError:
        return False
    assert one.known(token) == good
    assert 0 < len(good.name) <= 200
    return True


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_CLAIMS = st.fixed_dictionaries(
    {},
    optional={
        "iss": st.just(ISSUER) | _JSON,
        "aud": st.just(AUDIENCE) | st.just([AUDIENCE, "x"]) | _JSON,
        "sub": st.just("alice") | _JSON,
        "iat": st.just(NOW) | _JSON,
        "exp": st.just(NOW + 60) | _JSON,
        "nbf": st.just(NOW) | _JSON,
        "jti": st.just("stolen") | _JSON,
        "roles": st.just(["viewer"]) | _JSON,
    },
)


@given(st.text(max_size=50) | st.lists(st.text("aZ09_-=é", max_size=12), max_size=5).map(".".join))
def test_any_text(token: str) -> None:
    assert not verified(token)


@given(
    st.fixed_dictionaries(
        {}, optional={"alg": st.sampled_from(["ES256", "RS256", "HS256", "none"]) | _JSON, "kid": st.just("k1") | _JSON}
    )
    | _JSON,
    _JSON,
    st.binary(max_size=80),
)
def test_any_header_and_signature(header: Any, claims: Any, signature: bytes) -> None:
    parts = (json.dumps(header).encode(), json.dumps(claims).encode(), signature)
    assert not verified(".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts))


@settings(max_examples=100)
@given(_CLAIMS)
def test_any_claims_under_a_good_signature(claims: dict[str, Any]) -> None:
    body = json.dumps(claims).encode()
    token = jwt.api_jws.encode(body, _ISSUER.key, "ES256", {"kid": "k1"})
    good = verified(token)
    expected = {"iss": ISSUER, "sub": claims.get("sub"), "iat": claims.get("iat")}
    if good:
        assert expected.items() <= claims.items()
        assert claims.get("jti") != "stolen"
