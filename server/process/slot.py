"""The numbered slot of one process among the processes of a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

READY: Final = b"ready"
"""What a process writes to its standard output, for its supervisor, when it serves."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A numbered slot. The process that takes it finds the journal of the process before it.

    There is one slot more than processes, so that a new process is ready before an old one ends.
    """

    index: int
    """From 0 to the number of processes."""
    processes: int
    """How many there should be."""
    sockets: Path
    """Directory of the sockets by which the processes ask each other; the supervisor made it for its own user alone."""
    restarts: int = 0
    """How often the process in this slot ended by itself and was started again."""
    keys: int | None = None
    """Memory of the idempotency keys that all processes share, as a file descriptor."""

    def admin_address(self, index: int) -> str:
        """Address at which the process in a slot answers the other processes, beside the shared admin port."""
        return f"unix:{self.sockets / f'process-{index}.sock'}"


def journal_path(shared: Path, index: int) -> Path:
    """The journal of a slot."""
    return shared.with_name(f"{shared.name}.{index}")
