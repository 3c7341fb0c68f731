"""What a decision costs, measured: the input of `loadtest.capacity`, kept in `costs.toml`.

`pretrade bench-capacity --costs FILE` measures all of it on the machine it runs on and writes such a file, but for
`[features]` and `[database]`, which `make bench-features` and the shipper's tests measure.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field

DEFAULT: Final = Path(__file__).with_name("costs.toml")
"""The costs of the machine of the README's figures."""

Cost = Annotated[float, Field(ge=0, le=1e6)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Stage(_Section):
    """Something that takes rows in batches."""

    batch_ms: Cost
    """Milliseconds of a batch, however many rows it has."""
    row_us: Cost
    """Microseconds more for each row."""
    sigma: Annotated[float, Field(ge=0, le=3)]
    """Standard deviation of the logarithm of a batch's time."""

    def seconds(self, rows: float) -> float:
        """Mean time of a batch."""
        return self.batch_ms / 1e3 + rows * self.row_us / 1e6


class Replica(Stage):
    """A batch on a TorchServe replica, as the server sees it."""

    gap_ms: Cost
    """Milliseconds until the next batch may leave: less than one takes when several are under way, more for the event
    loop's turn with the answers; read off the sizes of batches."""

    def gap_seconds(self, rows: float) -> float:
        """Mean time until the next may leave."""
        return self.gap_ms / 1e3 + rows * self.row_us / 1e6


class Cpu(_Section):
    """CPU of one part."""

    base_cores: Cost
    """Cores while nobody asks."""
    batch_us: Cost
    """Microseconds for each batch."""
    row_us: Cost
    """Microseconds more for each decision."""

    def cores(self, rate: float, batches: float) -> float:
        """Cores at so many decisions and batches a second."""
        return self.base_cores + (batches * self.batch_us + rate * self.row_us) / 1e6


class Features(_Section):
    """The feature worker."""

    event_us: Cost
    """Microseconds of its CPU for each market event, from Kafka to Redis."""


class Database(_Section):
    """What is kept, and how fast it gets there."""

    rows_per_second: Annotated[float, Field(gt=0)]
    """Rows that one server process ships to PostgreSQL when it catches up."""
    rows_per_decision: Annotated[float, Field(gt=0, le=10)]
    """Rows for each decision: its packet, and the pair of scores where a challenger scored it, too."""
    bytes_per_decision: Cost
    """Of PostgreSQL's disk, indexes included."""
    journal_bytes_per_decision: Cost
    """Of the local journal's disk, until they are shipped."""
    cold_bytes_per_decision: Cost
    """Of exported Parquet."""


class Measured(_Section):
    """How far all this is known."""

    rate: Annotated[float, Field(gt=0)]
    """The most decisions a second that one server process was seen to make; no plan gives one more."""


class Costs(_Section):
    """All of them."""

    measured: Measured

    replica: Replica
    """A batch on a TorchServe replica, as the server sees it."""
    journal: Stage
    """A group commit of the audit journal, fsync included: one for each batch."""
    rest: Stage
    """The way of one order besides, on idle cores: transport, features, guards, reply, and the caller's own."""
    loop: Cpu
    """The event loop, one thread of each server process: it is the first that is full."""
    server: Cpu
    """A server process with its edge and the processes it starts; the event loop is part of it."""
    primary: Cpu
    """The replica that decides."""
    shadow: Cpu
    """The challenger, by its own batches."""
    standby: Cpu
    """The secondary, while the primary decides."""
    stores: Cpu
    """Valkey and PostgreSQL."""
    features: Features
    database: Database

    @classmethod
    def read(cls, path: Path = DEFAULT) -> Self:
        """Reads a file of costs.

        Raises:
            OSError: It cannot be read.
            ValueError: It is no file of costs; says where not.
        """
        return cls.model_validate(tomllib.loads(path.read_text()))

    def write(self, path: Path, comment: str) -> None:
        """Writes a file of costs, with what each of them means."""
        lines = [f"# {line}" for line in comment.splitlines()]
        for name, field in type(self).model_fields.items():
            section: _Section = getattr(self, name)
            said = field.description or type(section).__doc__ or ""
            lines += ["", f"[{name}]  # {' '.join(said.split())}"]
            for key, inner in type(section).model_fields.items():
                lines.append(f"{key} = {getattr(section, key):.6g}  # {' '.join((inner.description or '').split())}")
        path.write_text("\n".join(lines) + "\n")
