"""Security of a server process, put together from its settings."""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from typing import Final, Literal

import grpc
from prometheus_client.metrics_core import Metric

from feature_cache.token_bucket import TokenBuckets
from server.process.health import Component
from server.security import metrics
from server.security.access import AccessControl
from server.security.client_tls import ClientMaterial, ClientTls
from server.security.identity import Policy
from server.security.keys import Keys, open_keys
from server.security.orders import OrderAccess
from server.security.refusals import Refusals
from server.security.settings import (
    AccessSettings,
    AdminCredential,
    DecisionCredential,
    TlsSettings,
    TokenSettings,
)
from server.security.tls import Material, grpc_credentials, open_material, ssl_context
from server.security.tokens import TokenVerifier, revocations
from server.security.watched import Watched

Plane = Literal["decision", "admin"]

_BURST_SECONDS: Final = 2.0
_LOOK_AGAIN_SECONDS: Final = 1.0
"""Between two looks at the callers of open streams: about as often as files are looked at, so that a caller who was
revoked is gone within 2 s, and rarely enough for thousands of streams."""
_BURST_FAILURES_SECONDS: Final = 4.0
_DAY_SECONDS: Final = 86_400.0


class Security:
    """Certificates, keys, policy and access control of both ports.

    Args:
        tls: Certificates.
        tokens: Whose tokens are believed.
        access: What each port asks for, and who is what.
        operator: Digest of the operator token; None where no port asks for it.
        record: Makes an entry of the audit journal durable.
        instance_id: This server process.
        clock: Monotonic seconds.
        publish: Gets the certificates besides, at the start and with every replacement.
        wall_clock: Seconds since the Unix epoch.

    Raises:
        OSError: A file cannot be read, or is no good.
    """

    def __init__(
        self,
        tls: TlsSettings,
        tokens: TokenSettings,
        access: AccessSettings,
        operator: bytes | None,
        record: Callable[[bytes], Awaitable[object]],
        instance_id: str,
        clock: Callable[[], float],
        publish: Callable[[Material], None] | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._tls = tls
        self._access = access
        self._operator = operator
        self._clock = clock
        self._wall_clock = wall_clock
        try:
            self.material = open_material(tls, publish or (lambda material: None))
            self._keys: Keys | None = open_keys(tokens, tls.refresh_seconds, clock)
            paths = [path for path in (tokens.revoked,) if path is not None]
            self._revoked = Watched("revoked tokens", paths, lambda text=b"": revocations(text))
            paths = [path for path in (access.policy,) if path is not None]
            base = access.base_policy()
            self._policy = Watched("access policy", paths, lambda text=b"{}": base.with_file(text))
        except ValueError as error:
            raise OSError(f"credentials: {error}") from error
        failures = access.failures_per_second
        self._failures = TokenBuckets(failures, _BURST_FAILURES_SECONDS, clock)
        self.refusals = Refusals(
            record, TokenBuckets(failures, _BURST_FAILURES_SECONDS, clock), instance_id, lambda: int(wall_clock() * 1e9)
        )
        self.verifier: TokenVerifier | None = None
        if self._keys is not None:
            self.verifier = TokenVerifier(tokens, self._keys, lambda: self._revoked.value, wall_clock)
            self._keys.on_change(self.verifier.forget)
        # What callers may take is in the policy.
        self.orders = OrderAccess(TokenBuckets(math.inf, _BURST_SECONDS, clock), self.refusals)
        self._controls: dict[Plane, AccessControl] = {}
        self._of_clients: list[Watched[ClientMaterial]] = []

    async def run(self) -> None:
        """Keeps files and keys up to date, until cancelled."""
        verifier = self.verifier
        async with asyncio.TaskGroup() as group:
            for watched in self._watched():
                forget = verifier.forget if verifier is not None and watched is self._revoked else _nothing
                group.create_task(watched.watch(self._tls.refresh_seconds, forget))
            if self._keys is not None:
                group.create_task(self._keys.run())
            while True:
                await asyncio.sleep(_LOOK_AGAIN_SECONDS)
                for control in self._controls.values():
                    await control.look_again()

    def access(self, plane: Plane) -> AccessControl | None:
        """What guards the ports of a plane; None when they are open."""
        credential: DecisionCredential | AdminCredential = getattr(self._access, plane)
        if credential == "open":
            return None
        if plane not in self._controls:
            self._controls[plane] = self._control(plane, credential)
        return self._controls[plane]

    def _control(self, plane: Plane, credential: DecisionCredential | AdminCredential) -> AccessControl:
        material = self.material
        return AccessControl(
            plane=plane,
            credential=credential,
            siblings=plane == "admin",
            verifier=self.verifier,
            keys=self._keys,
            operator=self._operator,
            material=None if material is None else lambda: material.value,
            policy=lambda: self._policy.value,
            calls=TokenBuckets(math.inf, _BURST_SECONDS, self._clock) if plane == "admin" else None,
            failures=self._failures,
            refusals=self.refusals,
            wall_clock=self._wall_clock,
        )

    def credentials(self, plane: Plane) -> grpc.ServerCredentials | None:
        """TLS of a port on grpc.aio; None without. What asks for the operator token is on loopback, and needs none."""
        credential: DecisionCredential | AdminCredential = getattr(self._access, plane)
        if self.material is None or credential == "operator_token":
            return None
        return grpc_credentials(self.material, credential == "certificate")

    def http_context(self) -> ssl.SSLContext | None:
        """TLS of the HTTP port; None without."""
        if self.material is None:
            return None
        return ssl_context(self.material, "certificate" in (self._access.decision, self._access.admin))

    def tell_of(self, clients: Iterable[ClientTls | None]) -> None:
        """Shows the files of connections to others, too, which are watched by those who make them."""
        self._of_clients += [client.files for client in clients if client is not None]

    def components(self) -> dict[str, Component]:
        """What is unhealthy when files or keys cannot be renewed."""
        components = {}
        if self.material is not None:
            components["certificates"] = Component(partial(self._certificate_problem, self.material), required=False)
        if (keys := self._keys) is not None:
            components["token_keys"] = Component(lambda: keys.problem, required=False)
        if self._access.policy is not None:
            components["access_policy"] = Component(lambda: self._policy.problem, required=False)
        return components

    def _certificate_problem(self, material: Watched[Material]) -> str:
        days = (material.value.expires_at - self._wall_clock()) / _DAY_SECONDS
        if material.problem:
            return material.problem
        if days < self._tls.warn_days:
            return f"expires in {days:.1f} days" if days > 0 else "has expired"
        if material.value.revocations_until < self._wall_clock():
            return "client_crl is out of date; the last known revocations hold"
        return ""

    def metrics(self) -> Iterator[Metric]:
        """One scrape."""
        refused = metrics.ACCESS_REFUSED.family()
        for (plane, reason), count in self.refusals.counts.copy().items():
            refused.add_metric((plane, reason), count)
        yield refused
        yield metrics.TOKENS_VERIFIED.family(0 if self.verifier is None else self.verifier.verified)
        versions, failures = metrics.CREDENTIALS_VERSION.family(), metrics.CREDENTIALS_FAILURES.family()
        for watched in (*self._watched(), *self._of_clients):
            versions.add_metric((watched.name,), watched.version)
            failures.add_metric((watched.name,), watched.failures)
        if self._keys is not None:
            failures.add_metric(("token keys",), self._keys.failures)
        yield versions
        yield failures
        material = self.material
        yield metrics.CERTIFICATE_EXPIRY_SECONDS.family(None if material is None else material.value.expires_at)

    def _watched(self) -> list[Watched[Material] | Watched[frozenset[str]] | Watched[Policy]]:
        return [*([self.material] if self.material is not None else []), self._revoked, self._policy]


def _nothing() -> None:
    """For a bucket that is not configured."""
