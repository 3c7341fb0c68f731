"""Settings of the process that keeps bars, from `PRETRADE_BARS_*` variables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from feature_cache.bars.store import BarStore

PREFIX: Final = "PRETRADE_BARS_"


class BarsSettings(BaseSettings):
    """A wrong value refuses to start."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True)

    database_url: SecretStr
    """SQLAlchemy URL of the database that gets the bars: `postgresql+psycopg://user@host/name` or `sqlite:///bars.db`.
    """
    parquet_dir: Path | None = None
    """Directory that gets a Parquet file of each day, UTC, when it is over; needs the extra `export`."""
    kafka_bootstrap_servers: Annotated[str, Field(pattern=r"^[^\s@/]+$")] = "127.0.0.1:9092"
    """Comma-separated `host:port` of the brokers. TLS, name and password are in `PRETRADE_KAFKA_*`."""
    kafka_topic: str = "market.events"
    """Topic of the market events."""
    kafka_group: str = "pretrade-bars"
    """Consumer group; processes of one group share the partitions."""
    metrics_host: str = "127.0.0.1"
    """Address on which `/metrics`, `/healthz` and `/readyz` are served."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of `/metrics`, `/healthz` and `/readyz`; 0 serves none of them."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged."""

    @field_validator("database_url")
    @classmethod
    def _is_supported(cls, url: SecretStr) -> SecretStr:
        BarStore(url.get_secret_value())
        return url
