"""JSON Web Tokens: which are valid, and whom they identify."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import jwt

from server.errors import CredentialsUnknownError, UnauthenticatedError
from server.security.identity import MAX_NAME
from server.security.keys import Keys
from server.security.settings import TokenSettings

_MAX_CHARACTERS: Final = 8_192
_MAX_REMEMBERED: Final = 10_000
_MAX_PRINCIPALS: Final = 64
_REQUIRED: Final = ("exp", "iat", "iss", "aud", "sub")


@dataclass(frozen=True, slots=True)
class Token:
    """A token that was found good."""

    name: str
    """What `name_claim` says."""
    principals: tuple[str, ...]
    """`sub:…`, then `claim:…`."""
    jti: str
    expires_at: float
    """Unix seconds; the leeway is in it."""


class UnknownKeyError(UnauthenticatedError):
    """No key has this `kid`; a moment ago, at least."""


class TokenVerifier:
    """Tells good tokens from others. A token is verified once, and then remembered until it expires or the keys change.

    Args:
        settings: What a token must be.
        keys: Those of the issuer.
        revoked: `jti` of tokens that no longer count.
        wall_clock: Seconds since the Unix epoch: what tokens go by.
    """

    def __init__(
        self,
        settings: TokenSettings,
        keys: Keys,
        revoked: Callable[[], frozenset[str]],
        wall_clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._revoked = revoked
        self._wall_clock = wall_clock
        self._known: OrderedDict[bytes, Token] = OrderedDict()
        self.verified = 0
        """Signatures verified since start."""

    def forget(self) -> None:
        """Makes every token be verified again, because keys or revocations have changed."""
        self._known.clear()

    def known(self, token: str) -> Token | None:
        """A token that was verified before and is still valid.

        It is only as valid as the keys. If these could not be fetched for too long, the issuer may have withdrawn the
        one that signed the token.
        """
        if self._keys.current is None:
            return None
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = self._known.get(digest)
        if found is not None and self._wall_clock() >= found.expires_at:
            del self._known[digest]
            return None
        return found

    def verify(self, token: str) -> Token:
        """Verifies a token and remembers it.

        Raises:
            UnknownKeyError: It names a key that is not among the issuer's.
            UnauthenticatedError: It is no good; the reason says why.
            CredentialsUnknownError: The keys are not known.
        """
        if len(token) > _MAX_CHARACTERS:
            raise UnauthenticatedError("MALFORMED_TOKEN", "the token is too long")
        self.verified += 1
        good = self._read(token, self._key(token))
        self._known[hashlib.sha256(token.encode()).digest()] = good
        if len(self._known) > _MAX_REMEMBERED:
            self._known.popitem(last=False)
        return good

    def _key(self, token: str) -> jwt.PyJWK:
        """The key that must have signed it, of an algorithm that we chose and not the token."""
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError) as error:
            raise UnauthenticatedError("MALFORMED_TOKEN", "not a signed JSON Web Token") from error
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in self._settings.algorithms:
            allowed = " or ".join(self._settings.algorithms)
            raise UnauthenticatedError("ALGORITHM_NOT_ALLOWED", f"the token must be signed with {allowed}")
        if "crit" in header:
            raise UnauthenticatedError("MALFORMED_TOKEN", "the token has critical headers")
        keys = self._keys.current
        if keys is None:
            raise CredentialsUnknownError("TOKEN_KEYS_UNKNOWN", "the issuer's keys are not known at the moment")
        key = keys.get(kid) if isinstance(kid, str) else None
        if key is None:
            raise UnknownKeyError("UNKNOWN_KEY", "the token's kid names no key of the issuer")
        if key.algorithm_name != algorithm:
            raise UnauthenticatedError("ALGORITHM_NOT_ALLOWED", "the token's algorithm is not that of its key")
        return key

    def _read(self, token: str, key: jwt.PyJWK) -> Token:
        settings = self._settings
        assert key.algorithm_name is not None
        try:
            claims = jwt.decode(
                token,
                key.key,
                algorithms=[key.algorithm_name],
                audience=settings.audience,
                issuer=settings.issuer,
                # Times are ours to judge, by a clock that can be given.
                options={"require": list(_REQUIRED), "verify_exp": False, "verify_nbf": False, "verify_iat": False},
            )
        except jwt.InvalidSignatureError as error:
            raise UnauthenticatedError("BAD_SIGNATURE", "the token's signature is wrong") from error
        except jwt.InvalidAudienceError as error:
            raise UnauthenticatedError("WRONG_AUDIENCE", "the token is for another audience") from error
        except jwt.InvalidIssuerError as error:
            raise UnauthenticatedError("WRONG_ISSUER", "the token is of another issuer") from error
        except jwt.MissingRequiredClaimError as error:
            raise UnauthenticatedError("CLAIM_MISSING", f"the token has no {error.claim}") from error
        except (jwt.PyJWTError, ValueError) as error:
            raise UnauthenticatedError("MALFORMED_TOKEN", "the token's claims cannot be read") from error
        return self._judged(claims)

    def _judged(self, claims: dict[str, Any]) -> Token:
        settings, now = self._settings, self._wall_clock()
        expires, issued = _instant(claims, "exp"), _instant(claims, "iat")
        begins = _instant(claims, "nbf") if "nbf" in claims else issued
        if now >= expires + settings.leeway_seconds:
            raise UnauthenticatedError("TOKEN_EXPIRED", "the token has expired")
        if max(begins, issued) > now + settings.leeway_seconds:
            raise UnauthenticatedError("TOKEN_NOT_YET_VALID", "the token is not valid yet")
        if expires - issued > settings.max_lifetime_seconds:
            raise UnauthenticatedError("TOKEN_LIVES_TOO_LONG", "the token is valid for longer than allowed")
        subject, name, identifier = claims["sub"], claims.get(settings.name_claim), claims.get("jti", "")
        for claim, value in (("sub", subject), (settings.name_claim, name)):
            if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME or not value.isprintable():
                raise UnauthenticatedError("MALFORMED_TOKEN", f"{claim}: must be 1 to {MAX_NAME} printable characters")
        if identifier and identifier in self._revoked():
            raise UnauthenticatedError("TOKEN_REVOKED", "the token was revoked")
        roles = claims.get(settings.roles_claim, ())
        values = (roles,) if isinstance(roles, str) else roles if isinstance(roles, list) else ()
        principals = (f"claim:{value}" for value in values[:_MAX_PRINCIPALS] if isinstance(value, str))
        return Token(str(name), (f"sub:{subject}", *principals), str(identifier), expires + settings.leeway_seconds)


def _instant(claims: dict[str, Any], name: str) -> float:
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e12:
        raise UnauthenticatedError("MALFORMED_TOKEN", f"{name}: must be a time in seconds")
    return float(value)


def revocations(text: bytes) -> frozenset[str]:
    """The `jti`s in a file, one a line; lines that begin with # are comments.

    Raises:
        ValueError: It is not text.
    """
    lines = (line.strip() for line in text.decode().splitlines())
    return frozenset(line for line in lines if line and not line.startswith("#"))
