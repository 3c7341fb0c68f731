"""A small OpenID provider: discovery, keys, authorization codes with PKCE, refresh tokens that are good once."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

from server.security.trial import AUDIENCE, TrialIssuer

CLIENT: Final = "pretrade-console"
SECRET: Final = "the client's secret"


@dataclass
class Person:
    """Who logs in at the provider next."""

    sub: str = "ann"
    roles: tuple[str, ...] = ("viewer",)


@dataclass
class _Code:
    challenge: str
    redirect_uri: str
    nonce: str
    person: Person


@dataclass
class OidcProvider:
    """One provider, on loopback. What it does wrong, a test says."""

    person: Person = field(default_factory=Person)
    secret: str = SECRET
    """Empty for a public client."""
    asks: bool = False
    """Whether it shows a page before it sends a browser back."""
    refreshes: bool = False
    """Whether it gives out refresh tokens."""
    lifetime: int = 300
    id_changes: dict[str, Any] = field(default_factory=dict)
    """Claims of ID tokens that are different from what they should be; None for a claim that lacks."""
    id_issuer: TrialIssuer | None = None
    """Who signs ID tokens in its place."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What it says of itself that is different."""
    answer: dict[str, str] = field(default_factory=dict)
    """What it sends browsers back with that is different."""
    issuer: TrialIssuer = field(default_factory=lambda: TrialIssuer("provider-1"))
    refused: list[str] = field(default_factory=list)
    """Why it gave out no token, each time."""
    refreshed: int = 0
    _codes: dict[str, _Code] = field(default_factory=dict)
    _refresh_tokens: dict[str, Person] = field(default_factory=dict)
    _server: ThreadingHTTPServer = field(init=False)

    def __post_init__(self) -> None:
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider._get(self)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"])).decode()
                provider._post(self, dict(parse_qsl(body)))

            def log_message(self, *arguments: object) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        """Also its issuer."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def serving(self) -> Iterator[OidcProvider]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def forget_refresh_tokens(self) -> None:
        """Nobody's token is renewed any more."""
        self._refresh_tokens.clear()

    def _get(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        if parts.path == "/.well-known/openid-configuration":
            found = {
                "issuer": self.url,
                "authorization_endpoint": f"{self.url}/authorize",
                "token_endpoint": f"{self.url}/token",
                "jwks_uri": f"{self.url}/jwks",
                "id_token_signing_alg_values_supported": ["ES256"],
            }
            _json(handler, 200, found | self.metadata)
        elif parts.path == "/jwks":
            _json(handler, 200, {"keys": [self.issuer.jwk()]})
        elif parts.path == "/authorize":
            asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
            assert asked["response_type"] == "code"
            assert asked["code_challenge_method"] == "S256"
            assert asked["client_id"] == CLIENT
            assert "openid" in asked["scope"].split()
            if self.asks:
                form = (
                    f'<form method="post" action="{escape(handler.path)}"><button>Log in as {self.person.sub}</button>'
                )
                _send(handler, 200, form.encode(), "text/html")
            else:
                self._authorize(handler, asked)
        else:
            _json(handler, 404, {})

    def _post(self, handler: BaseHTTPRequestHandler, form: dict[str, str]) -> None:
        parts = urlsplit(handler.path)
        if parts.path == "/authorize":
            self._authorize(handler, {name: values[0] for name, values in parse_qs(parts.query).items()})
            return
        assert parts.path == "/token"
        problem = self._problem(handler, form)
        if problem:
            self.refused.append(problem)
            _json(handler, 400, {"error": "invalid_grant", "error_description": problem})
        elif form["grant_type"] == "refresh_token":
            self.refreshed += 1
            _json(handler, 200, self._tokens(self._refresh_tokens.pop(form["refresh_token"]), None))
        else:
            code = self._codes.pop(form["code"])
            _json(handler, 200, self._tokens(code.person, code.nonce))

    def _authorize(self, handler: BaseHTTPRequestHandler, asked: Mapping[str, str]) -> None:
        code = secrets.token_urlsafe(16)
        self._codes[code] = _Code(asked["code_challenge"], asked["redirect_uri"], asked["nonce"], self.person)
        answer = {"code": code, "state": asked["state"], "iss": self.url} | self.answer
        handler.send_response(303)
        handler.send_header("location", f"{asked['redirect_uri']}?{urlencode(answer)}")
        handler.send_header("content-length", "0")
        handler.end_headers()

    def _problem(self, handler: BaseHTTPRequestHandler, form: Mapping[str, str]) -> str:
        shown = handler.headers.get("authorization", "").removeprefix("Basic ")
        if self.secret and base64.b64decode(shown).decode() != f"{CLIENT}:{self.secret}":
            return "another client"
        if not self.secret and form.get("client_id") != CLIENT:
            return "another client"
        if form["grant_type"] == "refresh_token":
            return "" if form["refresh_token"] in self._refresh_tokens else "the refresh token was used"
        return self._problem_of_code(form)

    def _problem_of_code(self, form: Mapping[str, str]) -> str:
        code = self._codes.get(form["code"])
        if code is None:
            return "the code was used, or is none"
        if code.redirect_uri != form["redirect_uri"]:
            return "another redirect_uri"
        digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        if base64.urlsafe_b64encode(digest).decode().rstrip("=") != code.challenge:
            return "another code_verifier"
        return ""

    def _tokens(self, person: Person, nonce: str | None) -> dict[str, Any]:
        now = int(time.time())
        both = {"iss": self.url, "iat": now, "exp": now + self.lifetime}
        found: dict[str, Any] = {
            "access_token": self.issuer.token(person.sub, person.roles, aud=AUDIENCE, **both),
            "token_type": "Bearer",
            "expires_in": self.lifetime,
        }
        if nonce is not None:
            claims: dict[str, Any] = {**both, "aud": CLIENT, "nonce": nonce} | self.id_changes
            found["id_token"] = (self.id_issuer or self.issuer).token(person.sub, **claims)
        if self.refreshes:
            found["refresh_token"] = secrets.token_urlsafe(16)
            self._refresh_tokens[found["refresh_token"]] = person
        return found


def _json(handler: BaseHTTPRequestHandler, status: int, content: Mapping[str, Any]) -> None:
    _send(handler, status, json.dumps(content).encode(), "application/json")


def _send(handler: BaseHTTPRequestHandler, status: int, content: bytes, kind: str) -> None:
    handler.send_response(status)
    handler.send_header("content-type", kind)
    handler.send_header("content-length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)
