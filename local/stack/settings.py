"""What a user can choose about the embedded stack."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final

from pydantic import DirectoryPath, Field, FilePath, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from feature_cache.described import descriptions
from feature_cache.sources.simulated.scenarios import ScenarioName

_PREFIX: Final = "PRETRADE_LOCAL_"

Address = Annotated[str, Field(pattern=r"^[^\s:/@]+:\d{1,5}$")]
"""`host:port`."""
OptionalPort = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=600)]


class LocalSettings(BaseSettings):
    """Settings of the embedded stack; each can be given as `PRETRADE_LOCAL_<NAME>`.

    A part whose address is given is used where it is and not started.
    """

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True)

    dir: Path = Path(".pretrade")
    """Where everything is kept: databases, models, the audit journal, and a log of each part in `logs/`."""
    data: DirectoryPath | None = None
    """Directory of a recorded session that feeds the stack and trains the models; none for the simulator."""
    speed: Annotated[str, Field(pattern=r"^(max|\d+(\.\d+)?)$")] = "1"
    """How fast market data is fed: a factor, or `max`."""
    scenario: ScenarioName = ScenarioName.NORMAL
    """What kind of market the simulator makes: normal, calm, news-jump, flash-crash, one-sided-flow or venue-outage."""
    market: bool = True
    """Whether market data is fed at all."""
    bars: bool = False
    """Whether bars are kept, in the stack's database; docs/bars.md."""
    alerts: bool = False
    """Whether Prometheus and Alertmanager run, which have to be installed; docs/alerts.md."""
    console: bool = False
    """Whether the console runs; `pretrade up` says yes. docs/console.md."""
    alertmanager_config: FilePath | None = None
    """Alertmanager's configuration, with those who are told; none for one by which nobody is."""
    instruments: tuple[str, ...] | None = None
    """Instruments to decide on, as a JSON list; none for those of the market data."""
    model_store: Path | None = None
    """Directory of `champion.mar` and `challenger.mar`; none to train them into `dir` when they are not there yet."""

    redis_url: SecretStr | None = None
    """Redis or Valkey to use instead of our own; `redis+cluster://host:port,…` for a cluster."""
    kafka_bootstrap_servers: Annotated[str, Field(pattern=r"^[^\s@/]+$")] | None = None
    """Kafka to use instead of our own broker, `host:port` separated by commas."""
    database_url: SecretStr | None = None
    """SQL database to use instead of our own PostgreSQL, as an SQLAlchemy URL."""
    primary: Address | None = None
    """gRPC address of a TorchServe that serves `champion`, instead of our own primary replica."""
    secondary: Address | None = None
    """The same for the secondary replica."""
    challenger: Address | None = None
    """gRPC address of a TorchServe that serves `challenger`, instead of our own."""

    replicas: Annotated[int, Field(ge=1, le=8)] = 1
    """TorchServes of our own that serve the primary: a pool, whose parts are called primary-1, primary-2 and so on."""
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    """GPUs of this machine that each of our replicas deals out to its workers, for models that Torch scores; 0: none. A
    worker whose Torch sees no GPU scores on the CPU, and says so in its log."""
    replica_tokens: bool = False
    """Whether our replicas ask for tokens, which the decision server then shows them; `pretrade up` says yes."""

    decision_port: OptionalPort = 0
    """Port of the decision service on 127.0.0.1; 0 for its default if that is free, else any free one."""
    admin_port: OptionalPort = 0
    """Port of the admin service on 127.0.0.1; 0 for its default if that is free, else any free one."""
    metrics_port: OptionalPort = 0
    """Port of the decision server's metrics on 127.0.0.1; 0 for its default if that is free, else any free one."""
    http_port: OptionalPort = 0
    """Port of JSON over HTTP on 127.0.0.1; 0 for 7004 if that is free, else any free one."""
    console_port: OptionalPort = 0
    """Port of the console on 127.0.0.1; 0 for 7020 if that is free, else any free one."""

    processes: Annotated[int, Field(ge=1, le=64)] | None = None
    """Decision server processes on the same ports; none for a single one, alone. Linux only."""
    broker_memory_mebibytes: Annotated[int, Field(ge=32, le=1_048_576)] = 256
    """Memory that `pretrade up` lets our own broker take, in MiB. It keeps its whole log in memory. At this size it is
    restarted with an empty log; features are back after some seconds."""
    start_timeout_seconds: Seconds = 60.0
    """How long a part may take until it is ready."""
    training_timeout_seconds: Seconds = 600.0
    """How long the training of the models may take."""
    stop_timeout_seconds: Seconds = 10.0
    """How long a part may take to end before it is killed."""
    guard_grace_seconds: Seconds = 3.0
    """The same when `pretrade` itself was killed and its guard ends the parts."""


def secret(text: str | None) -> SecretStr | None:
    """A text that no settings show."""
    return None if text is None else SecretStr(text)


def refuse_unknown_variables(environment: Mapping[str, str] = os.environ) -> None:
    """Refuses a misspelt variable, which pydantic-settings would ignore.

    Raises:
        ValueError: A variable with our prefix names no setting.
    """
    known = {_PREFIX + name.upper() for name in LocalSettings.model_fields}
    unknown = sorted(name for name in environment if name.upper().startswith(_PREFIX) and name.upper() not in known)
    if unknown:
        raise ValueError(f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def wrong_settings(error: ValidationError) -> Iterator[str]:
    """The rule that each refused setting breaks, and what it is for; never its value, which may hold a password."""
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0])
        purpose = descriptions(LocalSettings).get(name)
        below = f"\n  {' '.join(purpose.split())}" if purpose else ""
        yield f"{_PREFIX}{name.upper()}: {problem['msg']}.{below}"
