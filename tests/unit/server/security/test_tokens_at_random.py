"""Whatever is shown as a token, it is good or it is refused; nothing else comes of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import jwt
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import UnauthenticatedError
from server.security.keys import KeySet, parse
from server.security.settings import TokenSettings
from server.security.tokens import TokenVerifier
from server.security.trial import AUDIENCE, ISSUER, TrialIssuer, jwks

_NOW = 1_800_000_000.0
_ISSUER = TrialIssuer("k1")


class Keys:
    current: KeySet = parse(jwks((_ISSUER,)).encode())
    problem = ""
    failures = 0

    def on_change(self, listener: Callable[[], None]) -> None: ...

    async def refresh(self) -> bool:
        return False

    async def run(self) -> None:
        return None


def verifier() -> TokenVerifier:
    settings = TokenSettings(issuer=ISSUER, jwks="/unused")
    return TokenVerifier(settings, Keys(), lambda: frozenset({"stolen"}), lambda: _NOW)


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
        "iat": st.just(_NOW) | _JSON,
        "exp": st.just(_NOW + 60) | _JSON,
        "nbf": st.just(_NOW) | _JSON,
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
