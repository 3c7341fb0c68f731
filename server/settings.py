"""All settings of the decision server: one section per component, composed here.

Values come from `PRETRADE_*` environment variables, with `__` between section and field, for example
`PRETRADE_BUDGET__CAP_SECONDS=0.02`. Secrets may come from files of the same name in the directory
`PRETRADE_SECRETS_DIR`. A value that is set in neither comes from the TOML file `PRETRADE_CONFIG_FILE`, in which each
section is a table. The server refuses to start with a wrong value, an unknown field or an unknown variable. `pretrade
config reload` makes a running server reread the file.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tomllib import TOMLDecodeError
from typing import Annotated, Literal

from pydantic import BaseModel, Field, PrivateAttr, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from fallback.budget import BudgetSettings
from fallback.cached_score import CachedScoreSettings
from fallback.chain import ChainSettings
from fallback.guards import GuardSettings
from fallback.rules import RulesSettings
from fallback.staleness import FeatureSettings
from feature_cache import feature_sets
from feature_cache.compiled import SWITCH
from feature_cache.constants import is_constant
from feature_cache.store import cluster
from feature_cache.store.l1 import FeatureCacheSettings
from server.audit.reading.explaining import ExplainSettings
from server.audit.reading.reading import MarketSettings, ReplaySettings
from server.audit.shipping.shipping import ShippingSettings, TopicSettings
from server.audit.watch import AuditWatchSettings
from server.canary.burn import SloSettings
from server.canary.settings import CanarySettings, ShadowSettings
from server.control.state import ControlSettings
from server.decision.admission import AdmissionSettings
from server.decision.idempotency import IdempotencySettings
from server.decision.record import hash_of
from server.drift.watch import DriftSettings
from server.envoy import edges
from server.http.settings import HttpSettings
from server.inference.batcher import BatcherSettings
from server.inference.breaker import BreakerSettings
from server.inference.embedded_check import EmbeddedSettings
from server.inference.endpoints import NamedModel, ReplicaEndpoints
from server.inference.model_map import RESERVED, ModelName
from server.inference.model_names import DEFAULT
from server.inference.oip import ModelDescription, OpenInferenceSettings
from server.inference.replica import ReplicaSettings
from server.inference.retry_budget import RetrySettings
from server.journal.journal import JournalSettings
from server.rpc.ports import AdminSettings, GrpcSettings
from server.rpc.stream import StreamSettings
from server.security.settings import AccessSettings, TlsSettings, TokenSettings, check
from server.telemetry.decision_log import DecisionLogSettings
from server.telemetry.settings import MetricsSettings, TracingSettings

PREFIX = "PRETRADE_"
CONFIG_FILE = "PRETRADE_CONFIG_FILE"
_OTHERS = (
    CONFIG_FILE,
    "PRETRADE_WORKER_",
    "PRETRADE_TA1_",
    "PRETRADE_BARS_",
    "PRETRADE_KAFKA_",
    "PRETRADE_LOCAL_",
    "PRETRADE_SECRETS_DIR",
    "PRETRADE_CLIENT_",
    "PRETRADE_TARGET",
    "PRETRADE_ADMIN_TARGET",
    "PRETRADE_ALERTMANAGER_URL",
    SWITCH,
)
"""Variables that belong to the feature worker, its feature set `ta1`, the keeper of bars, the embedded stack and the
`pretrade` command, and what has all of it interpreted."""


Instrument = Annotated[str, Field(pattern=r"^[A-Z0-9-]+\.[A-Z0-9-]+$", max_length=64)]
"""`SYMBOL.VENUE`."""


class Settings(BaseSettings):
    """All settings of the decision server."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,  # which may be a secret, in its place or in a wrong one
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        secrets_dir=os.environ.get("PRETRADE_SECRETS_DIR"),
    )

    instruments: Annotated[tuple[Instrument, ...], Field(min_length=1)] = ("BTCUSDT.BINANCE", "ETHUSDT.BINANCE")
    """Instruments for which orders are decided, `SYMBOL.VENUE`; a JSON list. An order for any other is refused. Set it
    to what you trade."""
    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    """URL of the Redis with the feature vectors. A Redis Cluster, version 7 or later, is
    `redis+cluster://[user:password@]host:port,host:port…` (`rediss+cluster` with TLS), with some of its nodes."""
    database_url: SecretStr = SecretStr("sqlite:///pretrade-audit.db")
    """SQLAlchemy URL of the audit database: SQLite or `postgresql+psycopg://…`. Use PostgreSQL as soon as several
    servers share it."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged. `debug` writes a line for every decision: use it to look for a fault, not
    under load."""
    processes: int | None = Field(default=None, ge=1, le=64)
    """Number of server processes that share the ports. A supervisor restarts those that die and replaces all on SIGHUP.
    Each process has a journal `<journal>.<i>` and the metrics port `metrics.port` + i, with i from 0 to this number.
    Unset: one process without a supervisor. Raise it when one core does not carry the load. Linux only. Limits per
    second hold within a process."""
    cores: Annotated[tuple[Annotated[int, Field(ge=0, le=1023)], ...], Field(min_length=1)] | None = None
    """Numbers of the cores that the server runs on, all of its processes together, as a JSON list such as `[0, 1, 2]`;
    what it starts to ship and to read the audit runs on the other cores. Set it where other programs on the machine
    have cores of their own. Unset: the kernel chooses. Linux only."""
    startup_patience_seconds: float = Field(default=5.0, ge=0, le=600)
    """How long a starting server waits for replicas and features before it serves degraded, in seconds. Raise it when
    your model servers start more slowly than that."""
    grpc: GrpcSettings = GrpcSettings()
    admin: AdminSettings = AdminSettings()
    http: HttpSettings = HttpSettings()
    metrics: MetricsSettings = MetricsSettings()
    replicas: ReplicaEndpoints = ReplicaEndpoints()
    models: Mapping[ModelName, NamedModel] = {}
    """Models besides the default one, which `replicas` describes; a JSON object by name, whose values are objects of
    `primary`, `secondary`, `challenger`, their protocols (`primary_protocol` and so on), `served_as`,
    `champion_version`, `management`, `tls`, `token_files` and `oip`, all of them optional. Set it to have several
    models decide different orders; `pretrade models map` says which."""
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
    embedded: EmbeddedSettings = EmbeddedSettings()
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
    market: MarketSettings = MarketSettings()
    drift: DriftSettings = DriftSettings()
    audit_watch: AuditWatchSettings = AuditWatchSettings()
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

    _without_envoy: str = PrivateAttr("")

    @property
    def without_envoy(self) -> str:
        """Why the edge is not Envoy, if that was left open; empty otherwise."""
        return self._without_envoy

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
        _check_pinned(spoken, self.oip, "replicas.")
        loaded = dict.fromkeys(spoken.loaded_as(), DEFAULT)
        for name in self.models:
            if name in RESERVED:
                raise ValueError(f"models: {name} is no name for a model; {', '.join(sorted(RESERVED))} are taken")
            try:
                of_model = self.of_model(name)
                _check_pinned(of_model.replicas, of_model.oip)
                _check_loaded(name, of_model.replicas, loaded)
            except ValueError as error:
                raise ValueError(f"models.{name}: {error}") from None
        hosts = {"decision": self.grpc.host, "admin": self.admin.host}
        check(self.tls, self.tokens, self.access, hosts, None if self.http.port is None else self.http.host)
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

    def of_model(self, name: str) -> Settings:
        """The settings of the server as one of its models has them: `replicas` says where that one is served.

        Raises:
            KeyError: There is no such model.
            ValueError: Its endpoints do not fit together.
        """
        if name == DEFAULT:
            return self
        model = self.models[name]
        own = {"replicas": model.endpoints(name, self.replicas), "oip": model.open_inference(name, self.oip)}
        return self.model_copy(update=own)

    def config_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the settings, secrets masked; stamped into every packet."""
        return hash_of(self.model_dump_json())


def _check_pinned(replicas: ReplicaEndpoints, oip: OpenInferenceSettings, section: str = "") -> None:
    """Raises `ValueError` where the version that is pinned is not the one that is described."""
    if oip.champion is None or {replicas.primary_protocol, replicas.secondary_protocol} == {"torchserve"}:
        return
    described = ModelDescription.read(oip.champion).version
    if replicas.champion_version not in (None, described):
        raise ValueError(f"{section}champion_version: {replicas.champion_version}, but oip.champion is {described}")


def _check_loaded(name: str, replicas: ReplicaEndpoints, loaded: dict[tuple[str, str], str]) -> None:
    """Raises `ValueError` where another model loads its versions under the same name; else adds those of this one."""
    for where in sorted(replicas.loaded_as()):
        other = loaded.setdefault(where, name)
        if other != name:
            service, served_as = where
            raise ValueError(
                f"served_as: the model {other} is called {served_as!r} at {service}, too, and each would unload the"
                " versions of the other; give it another name"
            )


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


def _constants_set(path: str, section: BaseModel) -> Iterator[str]:
    """Paths of the constants for which a value is given."""
    for name, field in type(section).model_fields.items():
        below, value = f"{path}.{name}".lstrip("."), getattr(section, name)
        if is_constant(field) and name in section.model_fields_set:
            yield below
        elif isinstance(value, BaseModel):
            yield from _constants_set(below, value)


def _check_sets(section: str, oip: OpenInferenceSettings) -> None:
    """Raises `ValueError` where a model is described whose feature set this process does not know."""
    for name, described in (("champion", oip.champion), ("challenger", oip.challenger)):
        if described is not None:
            try:
                _ = ModelDescription.read(described).feature_set
            except ValueError as error:
                raise ValueError(f"{section}oip.{name}: {described}: {error}") from error


def _refuse(unknown: Iterable[str]) -> None:
    if names := sorted(unknown):
        raise ValueError(f"unknown settings: {', '.join(names)}")


def problems_of(error: ValidationError) -> Iterator[str]:
    """What is wrong with settings, a line each that names the variable."""
    for problem in error.errors():
        *path, last = map(str, problem["loc"]) if problem["loc"] else ("",)
        if last == "[key]":
            *path, name = path
            yield f"{PREFIX}{'__'.join(path).upper()}: the name {name!r}: {problem['msg']}"
        else:
            yield f"{PREFIX}{'__'.join((*path, last)).upper()}: {problem['msg']}"


def load() -> Settings:
    """Settings from the environment.

    Raises:
        pydantic.ValidationError: A value is wrong or a field unknown.
        ValueError: A `PRETRADE_*` variable names no setting, the configuration file cannot be read, or a feature set is
            wrong.
    """
    unknown = [
        name
        for name in os.environ
        if name.upper().startswith(PREFIX)
        and not name.upper().startswith(_OTHERS)
        and name.upper().removeprefix(PREFIX).split("__")[0].lower() not in Settings.model_fields
    ]
    _refuse(unknown)
    path = os.environ.get(CONFIG_FILE)
    try:
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(2, "no such file")
        settings = Settings()
    except SettingsError as error:
        field = str(error).partition('"')[2].partition('"')[0]
        raise ValueError(f"{PREFIX}{field.upper()}, or a part of it: must be JSON: {error.__cause__}") from error
    except (OSError, TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{CONFIG_FILE}: {path}: {getattr(error, 'strerror', None) or error}") from error
    _refuse(f"{PREFIX}{path.replace('.', '__').upper()}" for path in _constants_set("", settings))
    feature_sets.load(settings.features.file)
    _check_sets("", settings.oip)
    for name, model in settings.models.items():
        _check_sets(f"models.{name}.", model.oip)
    if settings.grpc.edge == "auto":
        problem = edges.missing()
        grpc = settings.grpc.model_copy(update={"edge": "grpcio" if problem else "envoy"})
        settings = settings.model_copy(update={"grpc": grpc})
        settings._without_envoy = problem
    if settings.grpc.edge == "envoy" and settings.processes is None:
        # Envoy's process is always a supervisor's. Checked once more, for that is not possible everywhere.
        settings = settings.model_copy(update={"processes": Settings.model_validate({"processes": 1}).processes})
    return settings
