"""What was known of an instrument at an instant, as a vector of any feature set.

A vector is put together as a decision server does it: features of `mf1` from the engine, computed ones from their
computers, which see the events that the engine has taken in. What callers bring is NaN here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from feature_cache import feature_sets
from feature_cache.engine.engine import FeatureEngine
from feature_cache.feature_set import FeatureSet, FeatureSetError
from feature_cache.feature_sets import ImpossibleValuesError
from feature_cache.features import MF1
from feature_cache.store.codec import BookState
from pretrade.market.v1 import market_pb2 as pb

if TYPE_CHECKING:
    from feature_cache.feature_sets import Computer, Registered
    from feature_cache.store.codec import FeatureSnapshot


class Known:
    """What is known of one instrument while its events pass.

    Args:
        instrument: Its name.
        feature_set: That the vectors are of; this process knows it.

    Raises:
        FeatureSetError: A computer cannot be made.
    """

    def __init__(self, instrument: str, feature_set: FeatureSet) -> None:
        self.engine: Final = FeatureEngine(instrument)
        self._set = feature_set
        self._parts = feature_sets.parts_of(feature_set)
        self._computers: dict[str, tuple[Registered, Computer]] = {}
        for part in self._parts:
            found = feature_sets.known().by_id(part.source)
            if found is not None and found.make is not None:
                with _told(found):
                    self._computers[part.source] = found, found.make(instrument)

    def on_event(self, event: pb.MarketEvent) -> None:
        """Takes an event in.

        Raises:
            feature_cache.engine.book.EventError: It is no sound event; nothing changed.
            FeatureSetError: A computer failed.
        """
        if self.engine.on_event(event):
            for registered, computer in self._computers.values():
                with _told(registered):
                    computer.on_event(event)

    def vector(self) -> FeatureSnapshot:
        """As of the newest event, in market orientation; raises as `beside`."""
        return self.beside()[1]

    def beside(self) -> tuple[FeatureSnapshot, FeatureSnapshot]:
        """The vector of `mf1` as of the newest event, and that of the set, both in market orientation.

        Raises:
            FeatureSetError: A computer failed, or gave what its set's definition excludes.
        """
        known = self.engine.snapshot()
        if self._set == MF1:
            return known, known
        values = np.full(len(self._set), np.nan, dtype=np.float32)
        if known.state is not BookState.UNKNOWN:
            for part in self._parts:
                values[part.places] = self._of_source(part.source, known.values)[part.in_source]
        return known, replace(known, values=values, feature_set=self._set)

    def _of_source(self, source: str, of_mf1: NDArray[np.float32]) -> NDArray[np.float32]:
        if source == MF1.id:
            return of_mf1
        registered, computer = self._computers[source]
        with _told(registered):
            return registered.row(computer.values())


@contextmanager
def _told(registered: Registered) -> Iterator[None]:
    """Says whose set it is that failed."""
    try:
        yield
    except Exception as error:  # guests' code: whatever it raises
        told = str(error) if isinstance(error, ImpossibleValuesError | FeatureSetError) else repr(error)
        raise FeatureSetError(f"{registered.feature_set.id} of {registered.origin}: {told}") from error
