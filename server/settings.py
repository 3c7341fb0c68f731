"""All settings of the decision server: one section a component, composed here.

Values come from `PRETRADE_*` environment variables (`__` between section and field, for example
`PRETRADE_BUDGET__CAP_SECONDS=0.02`), for secrets from files of the same name in the directory `PRETRADE_SECRETS_DIR`,
and where neither says anything from the TOML file `PRETRADE_CONFIG_FILE` (a table a section). A wrong value, an unknown
field or an unknown variable refuses to start. `pretrade config reload` has a running server read the file anew.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tomllib import TOMLDecodeError
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from fallback.budget import BudgetSettings
from fallback.cached_score import CachedScoreSettings
from fallback.chain import ChainSettings
from fallback.guards import GuardSettings
from fallback.rules import RulesSettings
from feature_cache.store import cluster
from feature_cache.store.l1 import FeatureCacheSettings
from server.audit.reading.reading import ReplaySettings
from server.audit.shipping.shipping import ShippingSettings, TopicSettings
from server.canary.burn import SloSettings
from server.canary.settings import CanarySettings, ShadowSettings
from server.control.state import ControlSettings
from server.decision.admission import AdmissionSettings
from server.decision.explaining import ExplainSettings
from server.decision.idempotency import IdempotencySettings
from server.drift.watch import DriftSettings
from server.envoy import edges
from server.inference.batcher import BatcherSettings
from server.inference.breaker import BreakerSettings
from server.inference.codec import ProtocolName
from server.inference.oip import OpenInferenceSettings
from server.inference.replica import ReplicaSettings
from server.inference.retry_budget import RetrySettings
from server.journal.journal import JournalSettings
from server.rpc.decision import StreamSettings
from server.security.settings import AccessSettings, ClientTlsSettings, TlsSettings, TokenSettings, check
from server.telemetry.decision_log import DecisionLogSettings

PREFIX = "PRETRADE_"
CONFIG_FILE = "PRETRADE_CONFIG_FILE"
_OTHERS = (
    CONFIG_FILE,
    "PRETRADE_WORKER_",
    "PRETRADE_KAFKA_",
    "PRETRADE_LOCAL_",
    "PRETRADE_SECRETS_DIR",
    "PRETRADE_CLIENT_",
    "PRETRADE_TARGET",
    "PRETRADE_ADMIN_TARGET",
)
"""Variables that belong to the feature worker, the embedded stack and the `pretrade` command."""


Endpoint = Annotated[str, Field(pattern=r"^(dns://[^\s/@]+/)?[^\s:/@]+:\d{1,5}$")]
"""`host:port`, or `dns://server:port/host:port` to ask a name server other than the machine's."""
ReplicaName = Literal["primary", "secondary", "challenger"]
Instrument = Annotated[str, Field(pattern=r"^[A-Z0-9-]+\.[A-Z0-9-]+$", max_length=64)]
"""`SYMBOL.VENUE`."""


class GrpcSettings(BaseModel):
    """The decision port."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    edge: Literal["auto", "grpcio", "envoy"] = "grpcio"
    """Who speaks HTTP/2 with the callers: `grpcio`, which runs everywhere; `envoy`, with the server in its process:
    faster, and gRPC-Web and JSON as well; or `auto`: `envoy` where it can run. That needs Linux, the extra `envoy` and
    a Python with a shared library, and sets `processes` to 1 where it is unset."""
    host: str = "127.0.0.1"
    """Address to listen on; loopback only, unless `access.decision` asks for credentials or
    `access.decision_open_to_network` says that none are wanted."""
    port: int = Field(default=7001, ge=0, le=65_535)
    """Port to listen on; 0 for any free one."""
    health_port: int | None = Field(default=None, ge=1, le=65_535)
    """Port of the same address for health checks alone, without TLS and credentials: for probes that know neither, as a
    kubelet's. Unset: none."""
    max_message_bytes: int = Field(default=1_048_576, ge=1_024, le=67_108_864)
    """Largest request, in bytes; a larger one is refused with RESOURCE_EXHAUSTED."""
    max_streams_per_connection: int = Field(default=1_024, ge=1, le=1_000_000)
    """Calls under way on one connection."""
    max_pending_calls: int = Field(default=64, ge=1, le=100_000)
    """Calls that wait to be taken up by the event loop; of more than these some, of twice as many all are refused by
    the transport, with CANCELLED. A burst needs room; in an overload all of it is waiting time, so a small machine
    wants no more than it takes up in a quarter of its callers' deadlines. With the edge `envoy`, what waits is
    bounded by `admission`, and refused like any other call beyond it."""
    handshake_seconds: float = Field(default=5.0, ge=0.1, le=120)
    """How long a new connection may take for its first bytes, in seconds; then it is closed."""
    keepalive_seconds: float = Field(default=30.0, ge=1, le=7_200)
    """A connection on which nothing arrives for so long is pinged, and closed if it does not answer within 10 s."""
    read_seconds: float = Field(default=5.0, gt=0, le=600)
    """How long a unary call may take to send its message, in seconds; then it ends DEADLINE_EXCEEDED."""
    drain_seconds: float = Field(default=0.2, ge=0, le=300)
    """On SIGTERM: time between NOT_SERVING and refusing new calls, in seconds, for load balancers to notice."""
    grace_seconds: float = Field(default=2.0, ge=0, le=300)
    """On SIGTERM: time calls under way get to finish, in seconds."""


class AdminSettings(BaseModel):
    """The admin port."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on; loopback only, unless `access.admin` asks for tokens or client certificates."""
    port: int = Field(default=7002, ge=0, le=65_535)
    """Port to listen on; 0 for any free one."""

    @field_validator("host")
    @classmethod
    def _is_address(cls, host: str) -> str:
        if host != "localhost":
            ipaddress.ip_address(host)
        return host


class MetricsSettings(BaseModel):
    """The Prometheus port."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=7003, ge=0, le=65_535)
    """Port to listen on; 0 for any free one."""


class OtherChallenger(BaseModel):
    """A challenger besides the first, which gets shadow rows and nothing else."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    endpoint: Endpoint
    """`host:port` of its gRPC inference service."""
    model: str = Field(default="challenger", pattern="^[!-~]{1,64}$")
    """Name of its model."""
    tls: ClientTlsSettings | None = None
    """TLS to it, with the fields of `replicas.tls`; unset: none."""


class ReplicaEndpoints(BaseModel):
    """Where the models are served."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    primary: Endpoint = "127.0.0.1:7070"
    """`host:port` of the primary's gRPC inference service; `dns://server/host:port` asks another name server."""
    secondary: Endpoint = "127.0.0.1:7170"
    """`host:port` of the secondary's."""
    challenger: Endpoint = "127.0.0.1:7270"
    """`host:port` of the challenger's."""
    primary_protocol: ProtocolName = "torchserve"
    """What the primary speaks: `torchserve`, or `oip`, the Open Inference Protocol of Triton, KServe and MLServer; see
    the section `oip`."""
    secondary_protocol: ProtocolName = "torchserve"
    """What the secondary speaks."""
    challenger_protocol: ProtocolName = "torchserve"
    """What the challenger speaks."""
    champion_model: str = Field(default="champion", pattern="^[!-~]{1,64}$")
    """Name of the model on primary and secondary."""
    challenger_model: str = Field(default="challenger", pattern="^[!-~]{1,64}$")
    """Name of the model on the challenger."""
    other_challengers: Mapping[Annotated[str, Field(pattern="^challenger-[a-z0-9-]{1,32}$")], OtherChallenger] = {}
    """Further challengers by name, `challenger-…`; a JSON object."""
    champion_version: str | None = Field(default=None, pattern="^[0-9a-f]{16}$")
    """The only champion version whose scores are used: 16 hex digits. Unset: what was promoted last, or else what the
    replicas serve."""
    management: Mapping[ReplicaName, Endpoint] = {}
    """`host:port` of the gRPC management service of TorchServe, as a JSON object by replica (`primary`, `secondary`,
    `challenger`): where versions are loaded while it runs, at each address where a name has several. One that is not
    named is loaded by somebody else."""
    tls: Mapping[ReplicaName, ClientTlsSettings] = {}
    """TLS to inference and management service, as a JSON object by replica, of objects of `ca`, `certificate`, `key`
    (paths) and `server_name`. One that is not named is called in the open, as fits the loopback of a pod."""
    token_files: Mapping[ReplicaName, Path] = {}
    """The `key_file.json` of each TorchServe that asks for its tokens, as a JSON object by replica."""


class TracingSettings(BaseModel):
    """Spans of decisions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    otlp_endpoint: Endpoint | None = None
    """`host:port` of an OTLP gRPC collector; unset: no tracing and no cost."""
    tls: ClientTlsSettings | None = None
    """TLS to the collector; unset: none. `{}` believes the authorities that gRPC comes with."""
    one_in: int = Field(default=100, ge=0)
    """One of so many good decisions is traced, beside every slow, failed or degraded one and those whose callers keep
    their trace; 0 for none."""
    slow_seconds: float = Field(default=0.01, gt=0, le=10)
    """A decision that takes longer is traced, in seconds."""
    max_per_second: float = Field(default=20.0, ge=1, le=100_000)
    """Traces a second at most, since a trace costs 0.5 ms of a core and the worst of times makes the most of them; the
    rest is counted."""


class FeatureSettings(BaseModel):
    """What features may decide."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_age_seconds: float = Field(default=1.0, gt=0, le=60)
    """Older features, from exchange event time, are stale and decide nothing; in seconds."""


class Settings(BaseSettings):
    """Everything the decision server can be told."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,  # which may be a secret, in its place or in a wrong one
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        use_attribute_docstrings=True,
        secrets_dir=os.environ.get("PRETRADE_SECRETS_DIR"),
    )

    instruments: Annotated[tuple[Instrument, ...], Field(min_length=1)] = ("BTCUSDT.BINANCE", "ETHUSDT.BINANCE")
    """Instruments that may be decided, `SYMBOL.VENUE`; a JSON list."""
    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    """Redis with the feature vectors; a Redis Cluster, version 7 or later, is
    `redis+cluster://[user:password@]host:port,host:port…` (`rediss+cluster` with TLS), naming some of its nodes."""
    database_url: SecretStr = SecretStr("sqlite:///pretrade-audit.db")
    """SQLAlchemy URL of the audit store: SQLite or `postgresql+psycopg://…`."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log line; `debug` writes one line a decision."""
    processes: int | None = Field(default=None, ge=1, le=64)
    """Server processes that share the ports, each with a journal of its own, `<journal>.<i>`, and the metrics port
    `metrics.port` + i, with i from 0 to this number; under a supervisor that starts dead ones again and replaces all on
    SIGHUP. Linux only. Unset: one process, alone. Limits per second hold within a process."""
    startup_patience_seconds: float = Field(default=5.0, ge=0, le=600)
    """How long to wait for replicas and features before serving degraded, in seconds."""
    grpc: GrpcSettings = GrpcSettings()
    admin: AdminSettings = AdminSettings()
    metrics: MetricsSettings = MetricsSettings()
    replicas: ReplicaEndpoints = ReplicaEndpoints()
    oip: OpenInferenceSettings = OpenInferenceSettings()
    replica: ReplicaSettings = ReplicaSettings()
    batcher: BatcherSettings = BatcherSettings()
    breaker: BreakerSettings = BreakerSettings()
    retry: RetrySettings = RetrySettings()
    budget: BudgetSettings = BudgetSettings()
    admission: AdmissionSettings = AdmissionSettings()
    idempotency: IdempotencySettings = IdempotencySettings()
    stream: StreamSettings = StreamSettings()
    features: FeatureSettings = FeatureSettings()
    feature_cache: FeatureCacheSettings = FeatureCacheSettings()
    chain: ChainSettings = ChainSettings()
    cached_score: CachedScoreSettings = CachedScoreSettings()
    rules: RulesSettings = RulesSettings()
    guards: GuardSettings = GuardSettings()
    control: ControlSettings = ControlSettings()
    shadow: ShadowSettings = ShadowSettings()
    canary: CanarySettings = CanarySettings()
    slo: SloSettings = SloSettings()
    journal: JournalSettings = JournalSettings()
    shipping: ShippingSettings = ShippingSettings()
    decisions_topic: TopicSettings = TopicSettings()
    replay: ReplaySettings = ReplaySettings()
    explain: ExplainSettings = ExplainSettings()
    drift: DriftSettings = DriftSettings()
    tracing: TracingSettings = TracingSettings()
    tls: TlsSettings = TlsSettings()
    tokens: TokenSettings = TokenSettings()
    access: AccessSettings = AccessSettings()
    decision_log: DecisionLogSettings = DecisionLogSettings()

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, url: SecretStr) -> SecretStr:
        cluster.check_url(url.get_secret_value())
        return url

    @field_validator("database_url")
    @classmethod
    def _is_database(cls, url: SecretStr) -> SecretStr:
        return _with_scheme(url, ("sqlite:", "postgresql+psycopg:"))

    @field_validator("processes")
    @classmethod
    def _can_share_ports(cls, processes: int | None) -> int | None:
        if processes is not None and sys.platform != "linux":
            raise ValueError("several processes share a port on Linux only")
        return processes

    @model_validator(mode="after")
    def _numbers_are_finite(self) -> Settings:
        """A limit that is no number holds against nothing, and one that is infinite is a limit that was forgotten."""
        for path, value in _numbers("", self):
            if not math.isfinite(value):
                raise ValueError(f"{path}: must be finite, not {value}")
        return self

    @model_validator(mode="after")
    def _sections_fit(self) -> Settings:
        reserves = self.budget.fallback_reserve_seconds + self.budget.audit_reserve_seconds
        if reserves >= self.budget.cap_seconds:
            raise ValueError(
                f"budget: the reserves ({reserves:g} s) leave nothing of the cap ({self.budget.cap_seconds:g} s)"
            )
        if self.budget.reply_reserve_seconds >= self.budget.audit_reserve_seconds:
            raise ValueError("budget: reply_reserve_seconds must be less than audit_reserve_seconds")
        spoken = self.replicas
        if self.oip.champion is None and {spoken.primary_protocol, spoken.secondary_protocol} != {"torchserve"}:
            raise ValueError("oip.champion: needed by replicas that speak the Open Inference Protocol")
        if self.oip.challenger is None and spoken.challenger_protocol != "torchserve":
            raise ValueError("oip.challenger: needed by a challenger that speaks the Open Inference Protocol")
        check(self.tls, self.tokens, self.access, {"decision": self.grpc.host, "admin": self.admin.host})
        for limit in self.guards.limits:
            if limit.instrument not in (None, *self.instruments):
                raise ValueError(f"guards.limits: {limit.instrument} is not one of the instruments")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment, then secrets, then the configuration file."""
        sources = (init_settings, env_settings, file_secret_settings)
        path = os.environ.get(CONFIG_FILE)
        return sources if path is None else (*sources, TomlConfigSettingsSource(settings_cls, Path(path)))

    def config_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the settings, secrets masked; stamped into every packet."""
        return hash_of(self.model_dump_json())


def hash_of(settings_json: str) -> str:
    """The hash by which packets name settings."""
    return hashlib.sha256(settings_json.encode()).hexdigest()[:16]


def control_path(settings: Settings) -> Path:
    """The file of the control state, beside the journal: one for all processes of a server."""
    return settings.journal.path.with_name(f"{settings.journal.path.name}.control.json")


def _numbers(path: str, value: object) -> Iterator[tuple[str, float]]:
    """Every number with a fraction in a setting, with the path to it, for example `guards.limits.0.max_notional`."""
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _numbers(f"{path}.{name}".lstrip("."), getattr(value, name))
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield from _numbers(f"{path}.{name}", one)
    elif isinstance(value, tuple | list):
        for place, one in enumerate(value):
            yield from _numbers(f"{path}.{place}", one)


def _with_scheme(url: SecretStr, schemes: tuple[str, ...]) -> SecretStr:
    if not url.get_secret_value().startswith(schemes):
        raise ValueError(f"must begin with {' or '.join(schemes)}")
    return url


def load() -> Settings:
    """Settings from the environment.

    Raises:
        pydantic.ValidationError: A value is wrong or a field unknown.
        ValueError: A `PRETRADE_*` variable names no setting, or the configuration file cannot be read.
    """
    unknown = [
        name
        for name in os.environ
        if name.upper().startswith(PREFIX)
        and not name.upper().startswith(_OTHERS)
        and name.upper().removeprefix(PREFIX).split("__")[0].lower() not in Settings.model_fields
    ]
    if unknown:
        raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
    path = os.environ.get(CONFIG_FILE)
    try:
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(2, "no such file")
        settings = Settings()
    except (OSError, TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{CONFIG_FILE}: {path}: {getattr(error, 'strerror', None) or error}") from error
    if settings.grpc.edge == "auto":
        grpc = settings.grpc.model_copy(update={"edge": edges.best()})
        settings = settings.model_copy(update={"grpc": grpc})
    if settings.grpc.edge == "envoy" and settings.processes is None:
        # Envoy's process is always a supervisor's. Checked once more, for that is not possible everywhere.
        settings = settings.model_copy(update={"processes": Settings.model_validate({"processes": 1}).processes})
    return settings
