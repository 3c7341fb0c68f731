"""The control state on disk: one versioned file, shared by the processes of a server and kept over restarts.

A change is made under a lock, from what the file holds at that moment, and replaces the file whole: a reader sees the
old state or the new one, never a part. It is written when file and directory are synced, so it survives the loss of
power. Only the user of the server may read it. Everything here blocks and is called from threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import structlog
from pydantic import ValidationError

from server.control.model import Kept
from server.machine import REAL, Identity, Machine

_log = structlog.get_logger(__name__)

_LOCK_SECONDS: Final = 1.0
"""A process that was stopped while it held the lock must not keep on-call from halting trading."""
_LOCK_POLL_SECONDS: Final = 0.005


class UnreadableControlError(Exception):
    """The file is there and does not hold a control state."""


class ControlFile:
    """One server's control state on disk. Instances of several processes work on the same path.

    Args:
        path: The file; its directory must exist.
        machine: Whose disk it is on.
    """

    def __init__(self, path: Path, machine: Machine = REAL) -> None:
        self.path = path
        self._files = machine.files
        self._sleep = machine.threads.sleep
        self._clock = machine.clock
        self._seen: Identity | None = None
        self.unsynced = False
        """True when the file was replaced, but its directory could not be synced: a loss of power may undo that."""

    def read(self) -> Kept | None:
        """What the file holds; None when there is none.

        Raises:
            UnreadableControlError: It cannot be read or holds something else.
        """
        try:
            content, self._seen = self._files.read(self.path)
            return Kept.model_validate_json(content)
        except FileNotFoundError:
            self._seen = None
            return None
        except (OSError, ValidationError) as error:
            raise UnreadableControlError(f"{self.path}: {_first_line(error)}") from error

    def read_if_changed(self) -> Kept | None:
        """What the file holds when it is another one than at the last look; None when it is not, or there is none.

        Raises:
            UnreadableControlError: As `read`, once for each such file.
        """
        try:
            seen = self._files.identity(self.path)
        except OSError:
            return None
        return None if seen == self._seen else self.read()

    def change(self, change: Callable[[Kept | None], Kept]) -> Kept:
        """Replaces the file's state by what `change` makes of it, durably; one process at a time.

        Args:
            change: Gets what the file holds, None when there is none or it is unreadable. What it raises is passed on,
                and nothing changes; neither does it when it returns what it got.

        Returns:
            The new state.

        Raises:
            OSError: It cannot be written. Nothing changed, unless the file is `unsynced`.
        """
        with self._locked():
            try:
                current = self.read()
            except UnreadableControlError as error:
                _log.error("control state unreadable, written again", error=str(error))
                current = None
            new = change(current)
            if new != current:
                unfinished = self.path.with_name(f"{self.path.name}.new")
                self._seen = self._files.write(unfinished, new.model_dump_json().encode())
                self._files.replace(unfinished, self.path)
                self.unsynced = True
            if self.unsynced:
                self._files.sync_directory(self.path.parent)
                self.unsynced = False
        return new

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.path.with_name(f"{self.path.name}.lock")
        deadline = self._clock() + _LOCK_SECONDS
        while (lock := self._files.lock(path)) is None:
            if self._clock() >= deadline:
                _log.warning("control state changed without its lock", held_for_seconds=_LOCK_SECONDS)
                break
            self._sleep(_LOCK_POLL_SECONDS)
        try:
            yield
        finally:
            if lock is not None:
                self._files.unlock(lock)


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'content'}: {one['msg']}" for one in error.errors())
    return str(error)


def control_path(journal: Path) -> Path:
    """The file of the control state, beside the journal: one for all processes of a server."""
    return journal.with_name(f"{journal.name}.control.json")
