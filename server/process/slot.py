"""The place of one process among those that serve together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

READY: Final = b"ready"
"""What a process writes to its standard output, for its supervisor, when it serves."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A numbered place; whatever process takes it finds the journal of the one before it.

    There is one place more than there are processes, so that a new process is up before an old one goes.
    """

    index: int
    """From 0 to the number of processes."""
    processes: int
    """How many there should be."""
    sockets: Path
    """Directory of the sockets by which the processes ask each other; the supervisor made it for its own user alone."""
    restarts: int = 0
    """Times that this place's process ended by itself and was started again."""
    keys: int | None = None
    """Memory of the idempotency keys that all processes share, as a file descriptor."""

    def admin_address(self, index: int) -> str:
        """Where the process in a place answers the others about itself, past the shared admin port."""
        return f"unix:{self.sockets / f'process-{index}.sock'}"


def journal_path(shared: Path, index: int) -> Path:
    """The journal of a place."""
    return shared.with_name(f"{shared.name}.{index}")
