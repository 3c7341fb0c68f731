"""A decision server that requires credentials, and the credentials that it accepts."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from server.security.private import write_private
from server.security.trial import ISSUER, KeyPair, TrialIssuer, jwks
from support.authority import RevokingAuthority
from support.bare_server import environment
from support.harness import INSTRUMENTS, START_SECONDS, eventually
from support.leash import LeashedPopen

SECONDS: Final = 5.0
ROLES: Final = {
    **{f"claim:{role}": role for role in ("trader", "viewer", "operator", "admin")},
    **{f"cn:{role}": role for role in ("trader", "viewer", "operator", "admin")},
    "uri:spiffe://pretrade/on-call": "operator",
}


@dataclass
class SecureServer:
    """`python -m server`, which asks for credentials on both ports; and what makes them."""

    directory: Path
    credential: str
    """`token` or `certificate`."""
    tls: bool = True
    authority: RevokingAuthority = field(default_factory=RevokingAuthority)
    issuer: TrialIssuer = field(default_factory=TrialIssuer)
    env: dict[str, str] = field(init=False)
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.install(self.authority.certify("pretrade", dns=["localhost"], ips=["127.0.0.1"]))
        write_private(self.path("ca.pem"), self.authority.pem.decode())
        write_private(self.path("jwks.json"), jwks((self.issuer,)))
        write_private(self.path("revoked"), "")
        write_private(self.path("policy.json"), "{}")
        write_private(self.path("crl.pem"), self.authority.revoking(()).decode())
        credentials = {
            "TLS__CERTIFICATE": self.path("server.pem"),
            "TLS__KEY": self.path("server.key"),
            "TLS__CLIENT_CA": self.path("ca.pem"),
            "TLS__CLIENT_CRL": self.path("crl.pem"),
            "TLS__WARN_DAYS": "0",
            "TOKENS__JWKS": self.path("jwks.json"),
            "TOKENS__ISSUER": ISSUER,
            "TOKENS__REVOKED": self.path("revoked"),
            "ACCESS__ADMIN": self.credential,
            "ACCESS__DECISION": self.credential,
            "ACCESS__ROLES": json.dumps(ROLES),
            "ACCESS__POLICY": self.path("policy.json"),
            "ACCESS__FAILURES_PER_SECOND": "1000",
            "ACCESS__ADMIN_CALLS_PER_SECOND": "1000",
            "INSTRUMENTS": json.dumps(INSTRUMENTS),
            "BUDGET__CAP_SECONDS": "1.5",
            "BUDGET__AUDIT_RESERVE_SECONDS": "0.5",
        }
        changes = {f"PRETRADE_{name}": str(value) for name, value in credentials.items()}
        self.env = environment(self.directory, **changes)
        if not self.tls:
            self.env = {name: value for name, value in self.env.items() if not name.startswith("PRETRADE_TLS__")}

    def path(self, name: str) -> Path:
        """One of its files."""
        return self.directory / name

    def install(self, pair: KeyPair) -> None:
        """Gives the server a certificate."""
        write_private(self.path("server.key"), pair.key.decode())
        write_private(self.path("server.pem"), pair.certificate.decode())

    @property
    def decision(self) -> str:
        return f"127.0.0.1:{self.env['PRETRADE_GRPC__PORT']}"

    @property
    def admin(self) -> str:
        return f"127.0.0.1:{self.env['PRETRADE_ADMIN__PORT']}"

    @contextmanager
    def running(self, **changes: str) -> Iterator[SecureServer]:
        """Runs it; whatever is left of it is killed in the end."""
        self.env |= {f"PRETRADE_{name}": value for name, value in changes.items()}
        with self.path("server.log").open("ab") as log:
            self.process = LeashedPopen([sys.executable, "-m", "server"], env=self.env, stderr=log)
        try:
            eventually(self._serves, bool, START_SECONDS)
            yield self
        finally:
            family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()

    def _serves(self) -> bool:
        assert self.process.poll() is None, self.log()
        # A kubelet has no certificate: on the port that wants none, or on the one that wants one.
        pair = self.authority.certify("probe") if self.credential == "certificate" else None
        with self.channel(self.decision, pair=pair) as channel, suppress(grpc.RpcError):
            request = health_pb2.HealthCheckRequest()
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its types know no methods
            return bool(stub.Check(request, timeout=1.0).status == health_pb2.HealthCheckResponse.SERVING)
        return False

    def channel(self, address: str, *, pair: KeyPair | None = None, ca: bytes | None = None) -> grpc.Channel:
        """A channel of its own, over TLS where the server speaks it."""
        if not self.tls:
            return grpc.insecure_channel(address)
        certificate, key = (None, None) if pair is None else (pair.certificate, pair.key)
        credentials = grpc.ssl_channel_credentials(ca or self.authority.pem, key, certificate)
        return grpc.secure_channel(address, credentials, [("grpc.use_local_subchannel_pool", 1)])

    def token(self, role: str, **changes: Any) -> str:
        """A good token, with changes."""
        return self.issuer.token(f"{role}-1", changes.pop("roles", [role]), **changes)

    def log(self) -> str:
        return self.path("server.log").read_text()

    def entries(self) -> list[packet_pb2.JournalEntry]:
        """What is in SQL of the journal."""
        with closing(sqlite3.connect(self.path("audit.db"))) as database, suppress(sqlite3.OperationalError):
            rows = database.execute("SELECT entry FROM journal_entries ORDER BY position").fetchall()
            return [packet_pb2.JournalEntry.FromString(row[0]) for row in rows]
        return []

    def refusals(self) -> list[packet_pb2.AccessRefused]:
        """Those in SQL."""
        return [entry.access_refused for entry in self.entries() if entry.WhichOneof("entry") == "access_refused"]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the series of a metric that carry these labels."""
        with urlopen(f"http://127.0.0.1:{self.env['PRETRADE_METRICS__PORT']}/metrics", timeout=5.0) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
        samples = (sample for family in families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata that shows a token."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def status(channel: grpc.Channel, token: str | None = None) -> admin_pb2.GetStatusResponse:
    """Asks for the status: a viewer's call."""
    stub = admin_pb2_grpc.AdminServiceStub(channel)
    return stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=SECONDS, metadata=bearer(token))


def halt(channel: grpc.Channel, token: str | None = None, author: str = "somebody") -> None:
    """Halts trading: an operator's call."""
    request = admin_pb2.SetTradingStateRequest(state=admin_pb2.TRADING_STATE_HALTED, author=author, reason="test")
    admin_pb2_grpc.AdminServiceStub(channel).SetTradingState(request, timeout=SECONDS, metadata=bearer(token))


def decide(channel: grpc.Channel, token: str | None = None) -> pb.Decision:
    """Asks for a decision: a trader's call."""
    order = pb.Order(order_ref="a", instrument=INSTRUMENTS[0], side=pb.SIDE_BUY, quantity=1.0, strategy="test")
    stub = decision_pb2_grpc.DecisionServiceStub(channel)
    return stub.Decide(pb.DecideRequest(order=order), timeout=SECONDS, metadata=bearer(token)).decision


def refused(call: Any, *arguments: Any) -> grpc.StatusCode:
    """The status of a call that must fail."""
    try:
        call(*arguments)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    raise AssertionError("the call was answered")


def secret_in(text: str, secrets: list[str]) -> list[str]:
    """Secrets that stand in a text, whole or in good part."""
    return [secret[:12] for secret in secrets if secret in text or secret[-32:] in text]
