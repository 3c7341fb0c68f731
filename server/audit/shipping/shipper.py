"""The server's side of shipping: keeps the shipping processes running, and trims the journal behind them.

The processes are `shipping_process.py`, which alone needs SQLAlchemy, and `publishing_process.py`, which alone needs a
Kafka client.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from server.audit.shipping.follower import Follower
from server.audit.shipping.heads import SigningKey, slot_of
from server.audit.shipping.shipping import ShippingSettings, Task, TopicSettings, TopicTask
from server.journal.journal import Journal

_URL: Final = re.compile(r"(sqlite|postgresql)(\+\w+)?://")
_TRIM_EVERY_ROWS: Final = 1000
_SILENT_SECONDS: Final = 10.0
"""Entries that wait longer, while none arrives, are a fault: a database may take connections and say nothing."""
_SCARCE_SHARE: Final = 0.5
"""Of what the journal may hold: beyond it, nothing that was shipped stays."""
_TOPIC_SHARE: Final = 0.5
"""Of what the journal may hold: a topic that needs more of it has to do without."""


class Shipper:
    """Moves what the journal holds into SQL, in a process of its own; never in the way of a decision.

    An async context manager, to be left before the journal is closed. Leaving it waits up to
    `ShippingSettings.drain_seconds` for the rest to be shipped. With a topic, another process publishes the same rows
    there, and neither waits for the other: rows stay in the journal until both have them, but for a topic's sake only
    while they fill less than half of what the journal may hold, so that a broker that stays away costs no decision.

    Args:
        journal: An open journal.
        database_url: SQLAlchemy URL of the audit database: `sqlite:///…` or `postgresql+psycopg://…`.
        settings: How.
        topic: Where decisions are published besides; nowhere without brokers.
        clock: Monotonic seconds.

    Raises:
        ValueError: The URL is of neither kind.
        KeyUnusableError: There is no key to sign with where the settings name one.
    """

    def __init__(
        self,
        journal: Journal,
        database_url: str,
        settings: ShippingSettings,
        topic: TopicSettings = TopicSettings(),  # noqa: B008 - frozen
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not _URL.match(database_url):
            raise ValueError("the audit database must be sqlite:///… or postgresql+psycopg://…")
        if settings.signing_key is not None:
            SigningKey(settings.signing_key)  # the processes read it by themselves; the start is the time to complain
        self._journal = journal
        self._settings = settings
        self._trimmed = 0
        self._clock = clock
        self._stands_at = 0
        """The newest row in SQL when it was last seen to move, or to have nothing to wait for."""
        self._stands_since = clock()
        path = journal.settings.path.absolute()
        slot = slot_of(path, journal.machine.host_name())
        task = Task(journal=path, slot=slot, database_url=database_url, settings=settings)
        self._sql = Follower(journal, "server.audit", task, "audit_shipping", self.trim)
        self.topic: Follower | None = None
        """The way to the topic, if there is one."""
        if topic.bootstrap_servers is not None:
            publish = TopicTask(journal=path, slot=slot, settings=topic, signing_key=settings.signing_key)
            self.topic = Follower(
                journal, "server.audit.shipping.publishing_process", publish, "audit_publishing", self.trim
            )

    @property
    def position(self) -> int:
        """Position of the newest row in SQL; 0 until the database has answered."""
        return self._sql.position

    @property
    def last_error(self) -> str:
        """Why nothing is shipped; empty when all is well."""
        return self._sql.last_error

    @property
    def problem(self) -> str:
        """Why nothing is shipped, also when nobody says so; empty when all is well. To be asked every few seconds."""
        if self.position != self._stands_at or not self.unshipped:
            self._stands_at, self._stands_since = self.position, self._clock()
        if self.last_error or self._clock() - self._stands_since < _SILENT_SECONDS:
            return self.last_error
        return f"the database does not answer: entries have waited for more than {_SILENT_SECONDS:.0f} s"

    @property
    def outages(self) -> int:
        """Times that shipping began to fail since start."""
        return self._sql.outages

    @property
    def restarts(self) -> int:
        """Times that the shipping process was started again after it had died."""
        return self._sql.restarts

    @property
    def unshipped(self) -> int:
        """Durable entries that are not in SQL yet."""
        return self._sql.behind

    async def __aenter__(self) -> Self:
        """Starts shipping; does not wait for the database, nor for the brokers."""
        self._sql.start()
        if self.topic is not None:
            self.topic.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Drains and stops."""
        await self._sql.stop(self._settings.drain_seconds)
        if self.topic is not None:
            await self.topic.stop(self._settings.drain_seconds)

    async def drain(self, within_seconds: float) -> bool:
        """Waits until every row appended so far is in SQL; False when that takes longer. Safe to cancel."""
        return await self._sql.drain(within_seconds)

    def trim(self) -> None:
        """Has the journal drop rows that have arrived and need not stay.

        What was shipped stays for a while, as the newest rows are asked for most, but not where it takes the room of
        what is to come: a journal that is half full keeps nothing that was shipped, so that it is full only of rows
        that are nowhere else. The shipper calls this after every progress. `composition/` also adds it to the listeners
        of `Journal.on_full`.
        """
        is_scarce = self._journal.full or self._journal.bytes > _SCARCE_SHARE * self._journal.limit_bytes
        through = self._sql.position - (0 if is_scarce else self._settings.retained_rows)
        if self.topic is not None and self._journal.bytes < _TOPIC_SHARE * self._journal.limit_bytes:
            through = min(through, self.topic.position)
        if through - self._trimmed >= (1 if is_scarce else _TRIM_EVERY_ROWS):
            self._trimmed = through
            self._journal.trim(through)
