"""What can go wrong with the embedded stack.

StackError
├── DirectoryInUseError   another stack works in this directory
├── PartFailedError       a part did not start, or a step before it failed
└── StartCancelledError   the start was given up because something else failed or the user stopped it
"""

from __future__ import annotations

from pathlib import Path


class StackError(Exception):
    """The embedded stack cannot do what it was asked."""


class DirectoryInUseError(StackError):
    """Another stack works in this directory."""

    def __init__(self, directory: Path, holder: int) -> None:
        super().__init__(f"another pretrade (pid {holder}) runs in {directory}; stop it or name another directory")


class PartFailedError(StackError):
    """One part failed; `log_tail` are the last lines it wrote."""

    def __init__(self, part: str, reason: str, log_path: Path, log_tail: str) -> None:
        super().__init__(f"{part} {reason}; its log is {log_path}")
        self.part = part
        self.reason = reason
        self.log_path = log_path
        self.log_tail = log_tail


class StartCancelledError(StackError):
    """The start of a part was given up before it was ready."""


class NotReadyError(Exception):
    """What a readiness probe raises as long as its part is not ready; the message says what is missing."""
