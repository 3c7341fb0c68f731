"""Access to one port: who calls, and whether he may."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from server.errors import (
    CredentialsUnknownError,
    PermissionDeniedError,
    PretradeError,
    RateLimitedError,
    UnauthenticatedError,
)
from server.security import methods
from server.security.identity import CALLER, MAX_NAME, Caller, Policy, Role
from server.security.keys import Keys
from server.security.rates import Rates
from server.security.refusals import Refusals
from server.security.settings import Credential
from server.security.tls import ClientCertificate, Material
from server.security.tokens import TokenVerifier, UnknownKeyError

_BEARER: Final = "bearer "
_SIBLING: Final = Caller("sibling", frozenset({Role.VIEWER}))
_MAX_CERTIFICATES: Final = 1_000
_TOO_MANY_FAILURES: Final = "TOO_MANY_FAILURES"
"""The reason of an attempt that nobody looked into."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a call shows of itself before its request is read."""

    method: str
    """`/package.Service/Method`."""
    authorization: str
    """The header's value; empty without."""
    peer: Callable[[], str]
    """The address it came from, without the port; `unix:…` for a socket of this machine."""
    certificate: Callable[[], bytes | None]
    """The client's certificate in PEM, verified by the transport; None without."""


class AccessControl:
    """Lets calls of one port pass, or refuses them.

    Health checks always pass. Nothing of a call but its headers has been read, and a token that is known costs two
    look-ups in a table. Whoever shows unknown credentials too often is not looked into any more for a while; callers
    with known tokens behind the same address go on.

    Args:
        plane: `decision` or `admin`.
        credential: What identifies callers.
        siblings: True when the other processes of the server ask on sockets of this machine.
        verifier: Of tokens; needed for `token`.
        keys: The issuer's; needed for `token`.
        material: Knows which certificates are revoked; needed for `certificate`.
        policy: The roles in force.
        calls: Of each caller; None for any number.
        failures: Of each address.
        refusals: Told of what was refused.
        wall_clock: Seconds since the Unix epoch.
    """

    def __init__(
        self,
        *,
        plane: str,
        credential: Credential,
        siblings: bool,
        verifier: TokenVerifier | None,
        keys: Keys | None,
        material: Callable[[], Material] | None,
        policy: Callable[[], Policy],
        calls: Rates | None,
        failures: Rates,
        refusals: Refusals,
        wall_clock: Callable[[], float],
    ) -> None:
        self._plane = plane
        self._credential = credential
        self._siblings = siblings
        self._verifier = verifier
        self._keys = keys
        self._material = material
        self._policy = policy
        self._calls = calls
        self._failures = failures
        self._refusals = refusals
        self._wall_clock = wall_clock
        self._certificates: dict[bytes, ClientCertificate] = {}

    async def admit(self, attempt: Attempt) -> None:
        """Returns for a call that may go on, with `CALLER` set.

        Raises:
            UnauthenticatedError, PermissionDeniedError, RateLimitedError, CredentialsUnknownError: It may not.
        """
        if attempt.method.startswith(methods.HEALTH):
            return
        caller = None
        try:
            caller = await self._caller(attempt)
            self._check(caller, attempt.method)
        except PretradeError as error:
            self._refusals.note(
                self._plane, attempt.method, attempt.peer(), "" if caller is None else caller.name, error.reason
            )
            raise
        CALLER.set(caller)

    def _check(self, caller: Caller, method: str) -> None:
        if caller is _SIBLING:
            if method not in methods.OF_SIBLINGS:
                raise PermissionDeniedError("ROLE_MISSING", "not on this socket")
            return
        if self._calls is not None and not self._calls.take(caller.name):
            raise RateLimitedError(
                "RATE_LIMITED", f"more than {self._calls.per_second:g} calls a second", 1 / self._calls.per_second
            )
        wanted = methods.roles(method)
        if not wanted & caller.roles:
            raise PermissionDeniedError("ROLE_MISSING", f"needs the role {' or '.join(sorted(wanted))}")

    async def _caller(self, attempt: Attempt) -> Caller:
        if self._siblings and attempt.peer().startswith("unix:"):
            return _SIBLING
        if self._credential == "certificate":
            return self._of_certificate(attempt)
        return await self._of_token(attempt)

    async def _of_token(self, attempt: Attempt) -> Caller:
        assert self._verifier is not None
        assert self._keys is not None
        if attempt.authorization[: len(_BEARER)].lower() != _BEARER:
            raise UnauthenticatedError("NO_TOKEN", "needs `authorization: Bearer …`")
        text = attempt.authorization[len(_BEARER) :].strip()
        token = self._verifier.known(text)
        if token is None:
            self._check_failures(attempt)
            try:
                try:
                    token = self._verifier.verify(text)
                except (UnknownKeyError, CredentialsUnknownError):
                    if not await self._keys.refresh():
                        raise
                    token = self._verifier.verify(text)
            except UnauthenticatedError:
                self._failures.take(attempt.peer())
                raise
        return self._named(token.name, token.principals)

    def _of_certificate(self, attempt: Attempt) -> Caller:
        assert self._material is not None
        pem = attempt.certificate()
        if pem is None:
            raise UnauthenticatedError("NO_CERTIFICATE", "needs a client certificate")
        certificate = self._certificates.get(pem)
        if certificate is None:
            try:
                certificate = ClientCertificate.parse(pem)
            except ValueError as error:
                raise UnauthenticatedError("MALFORMED_CERTIFICATE", "the certificate cannot be read") from error
            if len(self._certificates) >= _MAX_CERTIFICATES:
                self._certificates.clear()
            self._certificates[pem] = certificate
        if (certificate.issuer, certificate.serial) in self._material().revoked:
            raise UnauthenticatedError("CERTIFICATE_REVOKED", "the certificate was revoked")
        if self._wall_clock() >= certificate.expires_at:  # of a connection that is older
            raise UnauthenticatedError("CERTIFICATE_EXPIRED", "the certificate has expired")
        if not certificate.name:
            raise UnauthenticatedError(
                "NO_NAME", f"the certificate has no name of 1 to {MAX_NAME} printable characters"
            )
        return self._named(certificate.name, certificate.principals)

    def _named(self, name: str, principals: tuple[str, ...]) -> Caller:
        caller = self._policy().caller(name, principals)
        if caller is None:
            raise UnauthenticatedError("DENIED", "the caller is denied")
        return caller

    def _check_failures(self, attempt: Attempt) -> None:
        if not self._failures.has(attempt.peer()):
            raise RateLimitedError(
                _TOO_MANY_FAILURES, "too many unknown credentials from this address", 1 / self._failures.per_second
            )


def peer_host(peer: str) -> str:
    """A peer as gRPC names it, without its port: `127.0.0.1`; sockets of this machine as they are."""
    kind, _, address = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return peer or "unknown"  # never a socket of this machine, unless gRPC says so
    return unquote(address.rpartition(":")[0]).strip("[]")
