"""An instrument's book as a feature worker publishes it for people: its best levels, about twice a second.

`features.book:{INSTRUMENT}` holds the newest one as JSON and expires when none follows. No decision depends on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from feature_cache.store.codec import BookState
from feature_cache.store.vectors import book_key_of

if TYPE_CHECKING:
    from feature_cache.store.cluster import ClusterFeatureStore
    from feature_cache.store.vectors import FeatureStore

Level = tuple[float, float]
"""Price in the quote currency, and size in units of the base."""


class PublishedBook(BaseModel):
    """The best levels of one book."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    state: BookState
    unknown_because: str
    """Why the book is unknown, for people; empty while it is known."""
    event_time_ns: int
    """Exchange time of the newest event of the instrument, nanoseconds since the Unix epoch."""
    written_ns: int
    """When it was published, on the worker's clock."""
    bids: list[Level]
    """Best first; empty while the book is unknown."""
    asks: list[Level]


class BookReader:
    """The reading side.

    Args:
        store: Where the books are.
    """

    def __init__(self, store: FeatureStore | ClusterFeatureStore) -> None:
        self._store = store

    async def read(self, instrument: str) -> PublishedBook | None:
        """The newest book; None without one.

        Raises:
            RedisError, OSError: Redis does not answer.
        """
        value = (await self._store.read_texts(book_key_of, [instrument])).get(instrument)
        if value is None:
            return None
        try:
            return PublishedBook.model_validate_json(value)
        except ValidationError:
            return None  # of another version of the worker, or not a book: treated as none
