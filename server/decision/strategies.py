"""Decisions by strategy and action, of so many strategies at most: callers may make up any number of names."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Iterable
from typing import Final

MOST: Final = 50
"""Strategies that are counted by name, besides those that an alert rule names."""
OTHERS: Final = "(others)"
"""What all further ones are counted as. No strategy of an alert rule is called so."""


class StrategyCounts:
    """Counts decisions by strategy and action. The first names to come are counted by themselves."""

    def __init__(self) -> None:
        self.counts: collections.Counter[tuple[str, int]] = collections.Counter()
        """By (strategy, action)."""
        self.named: Callable[[], Collection[str]] = frozenset
        """Strategies that are always counted by name."""
        self._known: set[str] = set()

    def count(self, decided: Iterable[tuple[str, int]]) -> None:
        """Counts decisions, each by its strategy and action."""
        for (strategy, action), times in collections.Counter(decided).items():
            self.counts[self._name(strategy), action] += times

    def _name(self, strategy: str) -> str:
        if strategy in self._known:
            return strategy
        if len(self._known) >= MOST and strategy not in self.named():
            return OTHERS
        self._known.add(strategy)
        return strategy
