"""Login at an OpenID provider: the authorization code flow with PKCE, state and nonce.

The person logs in at the provider, which sends the browser back with a code. The console exchanges the code for an ID
token, which proves that this login was begun here, and an access token. Every call to the server shows the access
token, and the server decides by it who the person is and what it may do, as for any other token of its issuer.

Source: OpenID Connect Core 1.0, RFC 7636 (PKCE), RFC 9207 (issuer in the answer).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final
from urllib.parse import urlsplit

import httpx2
from authlib.integrations.base_client import OAuthError
from authlib.integrations.httpx_client import AsyncOAuth2Client
from authlib.oidc.core import CodeIDToken
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from pretrade.client.addresses import is_loopback
from pretrade.console.sealing import sealed, unsealed

PENDING_SECONDS: Final = 600.0
"""How long a person may take at the provider."""
_PURPOSE: Final = "console login"
_SECRET_BYTES: Final = 32
_PATIENCE_SECONDS: Final = 5.0
"""For each question to the provider."""
_KNOWN_SECONDS: Final = 3_600.0
"""For how long the provider's endpoints are taken to be the same."""
_LEEWAY_SECONDS: Final = 60
"""How far the provider's clock and ours may differ."""
_RENEW_SECONDS: Final = 45.0
"""Before an access token expires it is renewed; halfway, if it lasts less than twice as long."""
_AGAIN_SECONDS: Final = 10.0
"""After which a provider that did not answer is asked again to renew one."""
_ALGORITHMS: Final = ("RS256", "ES256", "PS256")
"""Signatures of ID tokens that are taken: those with a public key."""
_LONGEST_REASON: Final = 300


class LoginFailedError(Exception):
    """The login did not work; says why, for the person."""


class ProviderAwayError(LoginFailedError):
    """The provider does not answer, or something else does."""


@dataclass(frozen=True, slots=True)
class OidcSettings:
    """The provider, and the console as it knows it."""

    issuer: str
    """The provider's URL, as it stands in the `iss` of its tokens."""
    client_id: str
    client_secret: str = field(default="", repr=False)
    """Empty for a public client."""
    scope: str = "openid"

    @classmethod
    def checked(cls, issuer: str, client_id: str, client_secret: str, scope: str) -> OidcSettings:
        """These settings.

        Raises:
            ValueError: One of them cannot be used.
        """
        if not _is_safe(issuer):
            raise ValueError(f"issuer {issuer!r}: must be an https URL, or an http URL on loopback")
        if not client_id:
            raise ValueError("the client's id is needed")
        if "openid" not in scope.split():
            raise ValueError(f"scope {scope!r}: must have openid")
        return cls(issuer, client_id, client_secret, scope)

    @property
    def name(self) -> str:
        """What people know the provider by."""
        return urlsplit(self.issuer).netloc


@dataclass(frozen=True, slots=True)
class Begun:
    """A login that has begun."""

    url: str
    """Where the browser goes."""
    kept: str
    """What the browser keeps until it comes back, sealed: it shows that the same browser has begun the login."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the provider gives out."""

    access: str = field(repr=False)
    refresh: str = field(repr=False)
    """Empty where it gives none: the person then logs in again when the access token has expired."""
    renew_at: float
    """When the access token is to be renewed, in Unix seconds; infinity where the provider does not say how long it
    lasts."""


class Provider:
    """An OpenID provider.

    Args:
        settings: Where it is, and how it knows us.
        redirect_uri: Where it sends browsers back to.
        wall_clock: Seconds since the Unix epoch.
    """

    def __init__(self, settings: OidcSettings, redirect_uri: str, wall_clock: Callable[[], float]) -> None:
        self.settings: Final = settings
        self._redirect_uri = redirect_uri
        self._wall_clock = wall_clock
        self._key = secrets.token_bytes(_SECRET_BYTES)
        self._known: Mapping[str, Any] = {}
        self._known_until = -math.inf

    async def begin(self) -> Begun:
        """Begins a login.

        Raises:
            LoginFailedError: The provider does not say where.
        """
        endpoints = await self._endpoints()
        state, nonce, verifier = (secrets.token_urlsafe(_SECRET_BYTES) for _ in range(3))
        async with self._client(endpoints) as client:
            url, _ = client.create_authorization_url(
                endpoints["authorization_endpoint"], state=state, code_verifier=verifier, nonce=nonce
            )
        until = self._wall_clock() + PENDING_SECONDS
        content = json.dumps({"state": state, "nonce": nonce, "verifier": verifier, "until": until})
        return Begun(url, sealed(self._key, _PURPOSE, urlsafe_b64encode(content.encode()).decode()))

    async def finish(self, kept: str, answer: Mapping[str, str]) -> Tokens:
        """What a login came to that the same browser has begun.

        Args:
            kept: What the browser kept.
            answer: The query with which the provider sent it back.

        Raises:
            LoginFailedError: It did not work.
        """
        begun = self._begun(kept)
        if not hmac.compare_digest(answer.get("state", "").encode(), str(begun["state"]).encode()):
            raise LoginFailedError("This answer is not to the login that this browser has begun.")
        if answer.get("iss", self.settings.issuer) != self.settings.issuer:
            raise LoginFailedError("This answer is of another provider.")
        if error := answer.get("error", ""):
            raise LoginFailedError(f"{error}: {answer.get('error_description', '')}"[:_LONGEST_REASON].rstrip(": "))
        if not (code := answer.get("code", "")):
            raise LoginFailedError("The answer has no code.")
        endpoints = await self._endpoints()
        async with self._client(endpoints) as client:
            found = await _asked(
                client.fetch_token(endpoints["token_endpoint"], code=code, code_verifier=begun["verifier"])
            )
        await self._check(found, str(begun["nonce"]), endpoints)
        return self._tokens(found)

    async def renewed(self, tokens: Tokens) -> Tokens:
        """Tokens that follow.

        Raises:
            LoginFailedError: The provider gives none any more.
            ProviderAwayError: It does not answer.
        """
        endpoints = await self._endpoints()
        async with self._client(endpoints) as client:
            found = await _asked(client.refresh_token(endpoints["token_endpoint"], refresh_token=tokens.refresh))
        following = self._tokens(found)
        return replace(following, refresh=following.refresh or tokens.refresh)

    def _begun(self, kept: str) -> Mapping[str, Any]:
        content = unsealed(self._key, _PURPOSE, kept)
        if content is None:
            raise LoginFailedError("This browser has begun no login here, or too long ago. Try again.")
        begun: Mapping[str, Any] = json.loads(urlsafe_b64decode(content))
        if self._wall_clock() >= begun["until"]:
            raise LoginFailedError("The login took too long. Try again.")
        return begun

    async def _endpoints(self) -> Mapping[str, Any]:
        """Where the provider's endpoints are, as it says itself."""
        if self._wall_clock() < self._known_until:
            return self._known
        issuer = self.settings.issuer
        found = await self._get(f"{issuer.rstrip('/')}/.well-known/openid-configuration")
        if found.get("issuer") != issuer:
            raise LoginFailedError(f"{issuer} calls itself {found.get('issuer')!r}: give the issuer as it does.")
        for name in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
            if not _is_safe(str(found.get(name, ""))):
                raise LoginFailedError(f"{issuer} names no {name} that can be used.")
        self._known, self._known_until = found, self._wall_clock() + _KNOWN_SECONDS
        return found

    async def _get(self, url: str) -> Mapping[str, Any]:
        async with httpx2.AsyncClient(timeout=_PATIENCE_SECONDS) as client:
            answer = await _asked(client.get(url))
        try:
            answer.raise_for_status()
            found = answer.json()
        except (httpx2.HTTPStatusError, ValueError) as error:
            raise ProviderAwayError(f"{url} does not answer as an OpenID provider: {error}") from error
        if not isinstance(found, dict):
            raise ProviderAwayError(f"{url} does not answer as an OpenID provider.")
        return found

    def _client(self, endpoints: Mapping[str, Any]) -> AsyncOAuth2Client:
        settings = self.settings
        offered = endpoints.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        how = "client_secret_basic" if "client_secret_basic" in offered else "client_secret_post"
        return AsyncOAuth2Client(
            client_id=settings.client_id,
            client_secret=settings.client_secret or None,
            token_endpoint_auth_method=how if settings.client_secret else "none",
            scope=settings.scope,
            redirect_uri=self._redirect_uri,
            code_challenge_method="S256",
            timeout=_PATIENCE_SECONDS,
        )

    async def _check(self, found: Mapping[str, Any], nonce: str, endpoints: Mapping[str, Any]) -> None:
        """Whether the ID token is of this login, for us, and of this provider."""
        keys = await self._get(endpoints["jwks_uri"])
        try:
            decoded = jwt.decode(str(found.get("id_token", "")), KeySet.import_key_set(keys), algorithms=[*_ALGORITHMS])  # type: ignore[arg-type]  # as it came
            claims = CodeIDToken(
                decoded.claims,
                decoded.header,
                {
                    "iss": {"essential": True, "value": self.settings.issuer},
                    "aud": {"essential": True, "value": self.settings.client_id},
                    "nonce": {"essential": True, "value": nonce},
                },
                {"nonce": nonce, "client_id": self.settings.client_id, "access_token": found.get("access_token")},
            )
            claims.validate(now=int(self._wall_clock()), leeway=_LEEWAY_SECONDS)
        except (JoseError, ValueError, TypeError, KeyError) as error:
            raise LoginFailedError(f"The provider's ID token is not good: {error}.") from error

    def _tokens(self, found: Mapping[str, Any]) -> Tokens:
        access, lifetime = str(found.get("access_token", "")), found.get("expires_in")
        if not access:
            raise LoginFailedError("The provider gave no access token.")
        lasts = float(lifetime) if isinstance(lifetime, int | float) else math.inf
        due = self._wall_clock() + max(lasts - _RENEW_SECONDS, lasts / 2)
        return Tokens(access, str(found.get("refresh_token") or ""), due)


class RenewedToken:
    """The access token of a person, which is renewed for as long as the provider does.

    Args:
        provider: Who gave it out.
        tokens: What the login came to.
        wall_clock: Seconds since the Unix epoch.
    """

    def __init__(self, provider: Provider, tokens: Tokens, wall_clock: Callable[[], float]) -> None:
        self._provider = provider
        self._tokens = tokens
        self._wall_clock = wall_clock
        self._lock = asyncio.Lock()
        self._again_at = -math.inf

    def __call__(self) -> str:
        """The token of now."""
        return self._tokens.access

    async def renew(self) -> None:
        """Renews it if that is due. What cannot be renewed stays, and the server refuses it once it has expired."""
        async with self._lock:  # a refresh token may be good once
            now = self._wall_clock()
            if not self._tokens.refresh or now < max(self._tokens.renew_at, self._again_at):
                return
            try:
                self._tokens = await self._provider.renewed(self._tokens)
            except ProviderAwayError:
                self._again_at = now + _AGAIN_SECONDS
            except LoginFailedError:
                self._tokens = replace(self._tokens, refresh="")


async def _asked(question: Any) -> Any:
    """What the provider answers.

    Raises:
        LoginFailedError: It refuses.
        ProviderAwayError: It does not answer.
    """
    try:
        return await question
    except OAuthError as error:
        raise LoginFailedError(f"The provider refuses: {error}."[:_LONGEST_REASON]) from error
    except (httpx2.HTTPError, ValueError) as error:
        raise ProviderAwayError(f"The provider does not answer: {error or type(error).__name__}.") from error


def _is_safe(url: str) -> bool:
    """Whether secrets may go to a URL: by TLS, or within this machine."""
    parts = urlsplit(url)
    return bool(parts.hostname) and (
        parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
    )
