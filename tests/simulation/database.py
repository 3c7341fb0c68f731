"""The audit database: the real `Store` on an SQLite of its own. It can be away, be slow, or lose a commit's answer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from server.audit.store.store import Store
from server.journal.journal_file import Row
from simulation.disk import Disk
from simulation.vfs import SimulatedSqlite
from simulation.world import World

if TYPE_CHECKING:
    from server.journal.journal_file import Head

URL: Final = "sqlite:////db/audit.db"
_PATH: Final = "/db/audit.db"
_CAPACITY_BYTES: Final = 2**40


@dataclass(slots=True)
class Weather:
    """How the database does now."""

    down: bool = False
    seconds: tuple[float, float] = (5e-4, 3e-3)
    """Of a statement."""
    lost_commits: int = 0
    """So many commits are going to be made, and their word lost."""


class Database:
    """The database of all servers of a simulation.

    Args:
        world: Whose time it takes.
        sqlite: Holds its file.
    """

    def __init__(self, world: World, sqlite: SimulatedSqlite) -> None:
        self.world = world
        self.weather = Weather()
        self.disk = Disk(world, "db", _CAPACITY_BYTES, lambda: 0)
        self.disk.instant = True
        sqlite.mount(self.disk)
        self._chance = world.random("database")
        if _template.content is None:
            _template.make()
            _template.content = bytes(self._file().content)
        else:
            self.disk.write(self.disk.create(_PATH), 0, _template.content)

    def _file(self) -> Any:
        found = self.disk.find(_PATH)
        assert found is not None
        return found

    def open(self, wait: Any = None) -> Store:
        """A store for one process; None for `wait` in the hub, where nothing takes time."""
        store = copy.copy(_template.prototype)
        store.__class__ = _SimulatedStore
        store.database = self  # type: ignore[attr-defined]
        store.wait = wait  # type: ignore[attr-defined]
        return store

    def check(self, wait: Any) -> None:
        """Takes its time, and raises when the database is away."""
        if wait is None:
            return
        wait(self._chance.uniform(*self.weather.seconds))
        if self.weather.down:
            raise _gone("connection refused")

    def commit_is_lost(self) -> bool:
        """Whether the word of this commit does not arrive."""
        if self.weather.lost_commits:
            self.weather.lost_commits -= 1
            self.world.note("database", "commit lost")
            return True
        return False


class _SimulatedStore(Store):
    """The store as one shipping process has it."""

    database: Database
    wait: Any

    def migrate(self) -> tuple[str | None, str]:
        """Done already, in the file that every simulation begins with."""
        self.database.check(self.wait)
        return None, ""

    def shipped(self, journal_id: str, start: Head, slot: str | None = None) -> Head:
        self.database.check(self.wait)
        return super().shipped(journal_id, start, slot)

    def state(self, journal_id: str, stated: bytes) -> None:
        self.database.check(self.wait)
        super().state(journal_id, stated)

    def write(self, journal_id: str, shipped: Head, rows: Sequence[Row], stated: bytes | None = None) -> bool:
        self.database.check(self.wait)
        written = super().write(journal_id, shipped, rows, stated)
        if self.wait is not None and self.database.commit_is_lost():
            raise _gone("server closed the connection unexpectedly")
        return written

    def close(self) -> None:
        """Keeps the engine, whose compiled statements every simulation uses."""
        self._engine.pool.dispose()


class _Template:
    """The migrated database's bytes, and a store whose engine is used again and again: both are dear to make."""

    content: bytes | None = None
    prototype: Store

    def make(self) -> None:
        """Makes both, on the disk that is mounted now."""
        self.prototype = Store(URL)
        self.prototype.migrate()
        self.prototype._engine.dispose()  # the last connection moves the log into the file


_template: Final = _Template()


def _gone(why: str) -> sa.exc.OperationalError:
    return sa.exc.OperationalError("a statement", None, ConnectionError(why))
