"""Access control of one port: who the caller is and what it may do, checked for streams as long as they are open."""

from __future__ import annotations

import asyncio
import hmac
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import unquote

from feature_cache.token_bucket import TokenBuckets
from server.errors import (
    CredentialsUnknownError,
    PermissionDeniedError,
    PretradeError,
    RateLimitedError,
    UnauthenticatedError,
)
from server.security import methods, operator
from server.security.identity import MAX_NAME, Attempt, Caller, Grants, Policy, Role
from server.security.keys import Keys
from server.security.refusals import Refusals
from server.security.settings import AdminCredential, DecisionCredential
from server.security.tls import ClientCertificate, Material
from server.security.tokens import Token, TokenVerifier, UnknownKeyError

_BEARER: Final = "bearer "
_WHAT_TO_SHOW: Final = {
    "token": "needs `authorization: Bearer …`",
    "operator_token": "needs the operator token, from the file `….operator-token` beside the server's journal: "
    "`pretrade --token-file FILE …`",
}
_OF_OPERATOR: Final = Grants(frozenset(Role), None, None, math.inf)
"""Whoever can read the server's own files can do everything to it anyway."""
_OF_SIBLINGS: Final = Grants(frozenset({Role.VIEWER}), None, None, math.inf)
_MAX_CERTIFICATES: Final = 1_000
_TOO_MANY_FAILURES: Final = "TOO_MANY_FAILURES"
"""The reason of an attempt that was not verified."""


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
        operator: Digest of the operator token; needed for `operator_token`.
        material: Knows which certificates are revoked; needed for `certificate`.
        policy: What principals are allowed, as it is now.
        calls: Buckets of the callers' calls; None for any number.
        failures: Of each address.
        refusals: Told of what was refused.
        wall_clock: Seconds since the Unix epoch.
    """

    def __init__(
        self,
        *,
        plane: str,
        credential: DecisionCredential | AdminCredential,
        siblings: bool,
        verifier: TokenVerifier | None,
        keys: Keys | None,
        operator: bytes | None,
        material: Callable[[], Material] | None,
        policy: Callable[[], Policy],
        calls: TokenBuckets | None,
        failures: TokenBuckets,
        refusals: Refusals,
        wall_clock: Callable[[], float],
    ) -> None:
        self._plane = plane
        self._credential = credential
        self._siblings = siblings
        self._verifier = verifier
        self._keys = keys
        self._operator = operator
        self._material = material
        self._policy = policy
        self._calls = calls
        self._failures = failures
        self._refusals = refusals
        self._wall_clock = wall_clock
        self._certificates: dict[bytes, ClientCertificate] = {}
        self._streams: dict[Caller, Callable[[PretradeError], None]] = {}
        """Callers of open streams, and how their streams are ended."""

    async def admit(self, attempt: Attempt) -> Caller | None:
        """The caller of a call that may go on; None for a health check, which is everybody's.

        Raises:
            UnauthenticatedError, PermissionDeniedError, RateLimitedError, CredentialsUnknownError: It may not.
        """
        if attempt.method.startswith(methods.HEALTH):
            return None
        caller = None
        try:
            caller = await self._caller(attempt)
            self._charge(caller)
            self._check(caller)
        except PretradeError as error:
            self._note(attempt, "" if caller is None else caller.name, error)
            raise
        return caller

    @contextmanager
    def watched(self, caller: Caller | None, end: Callable[[PretradeError], None]) -> Iterator[None]:
        """Holds an admitted stream: while the context is open it is looked at again and again, see `look_again`.

        Args:
            caller: As `admit` returned it.
            end: Ends the stream with an error; called at most once.
        """
        if caller is None:
            yield
            return
        self._streams[caller] = end
        try:
            yield
        finally:
            self._streams.pop(caller, None)

    async def look_again(self) -> None:
        """Ends the open streams whose callers would not be let in now, and gives the others what they may do now.

        Credentials expire and are revoked, keys are withdrawn, callers are denied or lose a role: a stream that was
        opened before must not outlive that. Keys are not fetched and failures not counted for it.
        """
        for caller in list(self._streams):
            try:
                now = self._caller_now(caller.attempt)
                self._check(now)
            except PretradeError as error:
                end = self._streams.pop(caller, None)
                if end is not None:  # else it has ended meanwhile
                    self._note(caller.attempt, caller.name, error)
                    end(error)
            else:
                caller.grants = now.grants
            await asyncio.sleep(0)  # after a change of keys each costs a signature

    def _note(self, attempt: Attempt, caller: str, error: PretradeError) -> None:
        self._refusals.note(self._plane, attempt.method, attempt.peer(), caller, error.reason)

    def _charge(self, caller: Caller) -> None:
        rate = caller.grants.admin_calls_per_second
        if self._calls is not None and not self._calls.take(caller.name, rate):
            raise RateLimitedError("RATE_LIMITED", f"more than {rate:g} calls a second", 1 / rate)

    def _check(self, caller: Caller) -> None:
        method = caller.attempt.method
        if caller.grants is _OF_SIBLINGS:
            if method not in methods.OF_SIBLINGS:
                raise PermissionDeniedError("ROLE_MISSING", "not on this socket")
            return
        wanted = methods.roles(method)
        if not wanted & caller.grants.roles:
            raise PermissionDeniedError("ROLE_MISSING", f"needs the role {' or '.join(sorted(wanted))}")

    async def _caller(self, attempt: Attempt) -> Caller:
        """Who calls. Fetches keys for a token whose key is unknown, and counts invalid credentials."""
        try:
            return self._known_caller(attempt)
        except _NotVerifiedError as unknown:
            token = unknown.token
        self._check_failures(attempt)
        try:
            verified = await self._verified(token)
        except UnauthenticatedError:
            self._failures.take(attempt.peer())
            raise
        return self._named(verified.name, verified.principals, attempt)

    async def _verified(self, token: str) -> Token:
        assert self._verifier is not None
        assert self._keys is not None
        try:
            return self._verifier.verify(token)
        except (UnknownKeyError, CredentialsUnknownError):
            if not await self._keys.refresh():
                raise
            return self._verifier.verify(token)

    def _caller_now(self, attempt: Attempt) -> Caller:
        """Who a call was let in for, by what is known now."""
        try:
            return self._known_caller(attempt)
        except _NotVerifiedError as unknown:
            assert self._verifier is not None
            verified = self._verifier.verify(unknown.token)
            return self._named(verified.name, verified.principals, attempt)

    def _known_caller(self, attempt: Attempt) -> Caller:
        """Who calls, where that takes no signature to find out.

        Raises:
            _NotVerifiedError: It takes one.
        """
        if self._siblings and attempt.peer().startswith("unix:"):
            return Caller("sibling", _OF_SIBLINGS, attempt)
        if self._credential == "certificate":
            return self._of_certificate(attempt)
        if attempt.authorization[: len(_BEARER)].lower() != _BEARER:
            raise UnauthenticatedError("NO_TOKEN", _WHAT_TO_SHOW[self._credential])
        text = attempt.authorization[len(_BEARER) :].strip()
        if self._credential == "operator_token":
            return self._of_operator(attempt, text)
        assert self._verifier is not None
        token = self._verifier.known(text)
        if token is None:
            raise _NotVerifiedError(text)
        return self._named(token.name, token.principals, attempt)

    def _of_operator(self, attempt: Attempt, token: str) -> Caller:
        assert self._operator is not None
        # Nobody can guess it, so attempts are not limited: neighbours must not keep on-call out by failing.
        if not hmac.compare_digest(operator.digest(token.encode("utf-8", "surrogateescape")), self._operator):
            raise UnauthenticatedError("WRONG_OPERATOR_TOKEN", "not the operator token of this server")
        return Caller(operator.NAME, _OF_OPERATOR, attempt, stands_for_others=True)

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
        return self._named(certificate.name, certificate.principals, attempt)

    def _named(self, name: str, principals: tuple[str, ...], attempt: Attempt) -> Caller:
        grants = self._policy().grants(principals)
        if grants is None:
            raise UnauthenticatedError("DENIED", "the caller is denied")
        return Caller(name, grants, attempt)

    def _check_failures(self, attempt: Attempt) -> None:
        if not self._failures.has(attempt.peer()):
            raise RateLimitedError(
                _TOO_MANY_FAILURES, "too many unknown credentials from this address", 1 / self._failures.per_second
            )


class _NotVerifiedError(Exception):
    """A token has not been verified, or has to be once more."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self.token = token


def peer_host(peer: str) -> str:
    """A peer as gRPC names it, without its port: `127.0.0.1`; sockets of this machine as they are."""
    kind, _, address = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return peer or "unknown"  # never a socket of this machine, unless gRPC says so
    return unquote(address.rpartition(":")[0]).strip("[]")
