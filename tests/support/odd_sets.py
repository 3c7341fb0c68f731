"""A file of feature sets as a worker may be given it: one that is sound, and those that misbehave.

Each has the one feature `trades`, which counts trades.
"""

from __future__ import annotations

import os
import re
import time
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from feature_cache.feature_set import Feature, FeatureSet
from feature_cache.feature_sets import ComputedSet


class Trades:
    """Sound."""

    def __init__(self, instrument: str) -> None:
        self.count = 0

    def on_event(self, event: Any) -> None:
        self.count += event.WhichOneof("event") == "trade"

    def values(self) -> NDArray[np.float32]:
        return np.array([self.count], dtype=np.float32)


class Raises(Trades):
    def on_event(self, event: Any) -> None:
        raise SystemExit("a guest must not end the worker")


class Dies(Trades):
    def on_event(self, event: Any) -> None:
        os._exit(3)


class Negative(Trades):
    def values(self) -> NDArray[np.float32]:
        return np.array([-1.0], dtype=np.float32)


class Infinite(Trades):
    def values(self) -> NDArray[np.float32]:
        return np.array([np.inf], dtype=np.float32)


class TooMany(Trades):
    def values(self) -> NDArray[np.float32]:
        return np.zeros(3, dtype=np.float32)


class Keeps(Trades):
    """Calls a function of C that never returns, and keeps the interpreter: a pattern that backtracks."""

    def on_event(self, event: Any) -> None:
        re.match("(a+)+$", "a" * 100 + "b")


class Slow(Trades):
    """Takes half a millisecond for an event."""

    def on_event(self, event: Any) -> None:
        time.sleep(0.0005)
        super().on_event(event)


class Late(Trades):
    """Takes a second to make its first computer, as an import might."""

    def __init__(self, instrument: str) -> None:
        if instrument.startswith("TRIAL."):
            time.sleep(1.0)
        super().__init__(instrument)


class NoTrial(Trades):
    """Fails to make its first computer."""

    def __init__(self, instrument: str) -> None:
        if instrument.startswith("TRIAL."):
            raise KeyError(instrument)
        super().__init__(instrument)


class Prints(Trades):
    """Prints whatever it sees."""

    def on_event(self, event: Any) -> None:
        os.write(1, b"not an answer\n")
        super().on_event(event)


_ALL: Final = {
    "trades": Trades,
    "raises": Raises,
    "dies": Dies,
    "negative": Negative,
    "infinite": Infinite,
    "too_many": TooMany,
    "keeps": Keeps,
    "slow": Slow,
    "late": Late,
    "no_trial": NoTrial,
    "prints": Prints,
}
FEATURE_SETS: Final = [
    ComputedSet(FeatureSet(name, (Feature("trades", "", "Trades since the start.", lowest=0.0),)), make)
    for name, make in _ALL.items()
]
