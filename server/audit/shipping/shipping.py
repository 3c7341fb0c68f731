"""The messages between the server and the shipping process, and the settings of both."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from feature_cache.constants import Constant


class ShippingSettings(BaseModel):
    """Shipping of the audit from the journal into SQL."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_rows: Constant[int] = 2000
    """Most journal entries in one transaction; fewer when they are large. A round trip to the other side is a small
    part of it."""
    poll_seconds: Constant[float] = 0.1
    """Pause before the journal is read again when everything was shipped, in seconds. The audit in SQL may be this
    late."""
    retry_min_seconds: Constant[float] = 0.1
    """First pause after a failure; doubles up to `retry_max_seconds`, each with random jitter of half its length."""
    retry_max_seconds: Constant[float] = 5.0
    """Longest pause after a failure, in seconds. The journal holds the rows meanwhile, so nothing is lost by it."""
    retained_rows: Constant[int] = 2_000
    """Entries that stay in the journal after they were shipped, each with the decisions of a commit. The last seconds
    stay at hand for repeats and explanations where the database is slow."""
    days_ahead: Constant[int] = 3
    """Days for which PostgreSQL has a partition before they begin. It can run unattended for as many days: a
    weekend."""
    retention_days: int | None = Field(default=None, ge=1)
    """Number of days, UTC, that stay in the database besides today; older days are removed. Set it to what your
    regulator requires. Unset: all days stay."""
    signing_key: Path | None = None
    """PEM file of an Ed25519 private key. It signs the journal heads, which say in the database and on the topic how
    far the journal has come; `pretrade audit verify --key` takes the public key. Set it so that a person who can write
    the database cannot forge them. Unset: heads are not signed."""
    drain_seconds: float = Field(default=5.0, ge=0, le=300)
    """How long a stopping server waits for the remaining rows to be shipped, in seconds; what is left is shipped after
    the next start."""


class Task(BaseModel):
    """What to ship, and where to."""

    journal: Path
    slot: str
    """Where the journal is written, `host:path`."""
    database_url: str
    """SQLAlchemy URL; may hold a password, and therefore is not a command-line argument."""
    settings: ShippingSettings
    close: bool = False
    """True when no process writes the journal: it is then closed as soon as all of it is shipped."""


class TopicSettings(BaseModel):
    """Decisions on a Kafka topic, for consumers. Off unless brokers are named; needs the extra `worker`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bootstrap_servers: str | None = Field(default=None, pattern=r"^[^\s@/]+$")
    """Brokers, `host:port` separated by commas. Unset: nothing is published. TLS, name and password are set by
    `PRETRADE_KAFKA_*`."""
    topic: str = Field(default="decisions", pattern=r"^[A-Za-z0-9._-]{1,200}$")
    """Name of the topic; it is created if it is missing."""
    partitions: int = Field(default=6, ge=1, le=1000)
    """Number of partitions, if the topic is created. Raise it for more consumers in parallel."""
    batch_rows: Constant[int] = 500
    """Most journal entries under way to the brokers at once. A round trip to the other side is a small part of it."""
    poll_seconds: Constant[float] = 0.05
    """Pause before the journal is read again when everything was published, in seconds. The topic may be this late."""
    retry_min_seconds: Constant[float] = 0.1
    """First pause after a failure; doubles up to `retry_max_seconds`, each with random jitter of half its length."""
    retry_max_seconds: Constant[float] = 5.0
    """Longest pause after a failure."""


class TopicTask(BaseModel):
    """What to publish, and where to."""

    journal: Path
    slot: str
    """As in `Task`."""
    settings: TopicSettings
    signing_key: Path | None = None
    """As in `ShippingSettings`."""


class Progress(BaseModel):
    """What a process that follows the journal reports to its parent."""

    position: int
    """The last row shipped; 0 while that is unknown."""
    error: str
    """Why nothing can be shipped; empty when all is well."""
    neglected: str = ""
    """What was postponed without stopping anything: a partition, or the removal of old days."""
    skipped: int = 0
    """Rows that were trimmed before they could be published."""
    closed: bool = False
    """True when the end of the journal is recorded, as the parent asked."""


CLOSE: Final = b"close\n"
"""What the parent sends when it no longer writes the journal: ship the rest, and record where the journal ends."""
