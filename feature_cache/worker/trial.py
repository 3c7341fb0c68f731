"""Tries the computer of a feature set on a simulated market, before a worker does: is it right, and what does it cost?

It is shown what a worker would show it, and held to the rules that a worker holds it to and to one that no worker can
check: nothing but the events decides its values. Two computers of the same instrument that see the same events must
give the same values, to the bit, however often they are asked, and an event must be left as it was, since others get
the same object.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from feature_cache.engine.engine import FeatureEngine
from feature_cache.feature_sets import Computer, ImpossibleValuesError, Registered
from feature_cache.sources.simulator import NORMAL_RATE, simulate
from pretrade.market.v1 import market_pb2 as pb

INSTRUMENT: Final = "BTCUSDT.SIM"
SECONDS: Final = 90.0
"""Of market, by default: more than the windows of `mf1`."""
_ASKED_EVERY: Final = 5
"""Events between two vectors of the second computer; the first one is asked after each."""


@dataclass(slots=True)
class Trial:
    """What was found."""

    problems: list[str] = field(default_factory=list)
    """What a worker would suspend the set for, and what would make its values differ in a replay; for people."""
    events: int = 0
    seconds: float = 0.0
    """Of simulated market."""
    event_seconds: float = 0.0
    """That all calls of `on_event` took."""
    values_seconds: float = 0.0
    """That all calls of `values` took."""
    slowest_seconds: float = 0.0
    """The longest call: for so long the set's vectors may have to wait."""
    undefined: list[str] = field(default_factory=list)
    """Own features that were never defined."""

    @property
    def core_share(self) -> float:
        """Share of a core that one instrument of this market takes, if each event is followed by a vector."""
        return (self.event_seconds + self.values_seconds) / self.seconds if self.seconds else 0.0


def run(one: Registered, seconds: float = SECONDS) -> Trial:
    """Shows computers of a set a simulated market of so many seconds."""
    trial = Trial()
    try:
        _run(one, seconds, trial)
    except ImpossibleValuesError as error:
        trial.problems.append(str(error))
    except Exception as error:  # a guest's: whatever it raises is what there is to say of it
        trial.problems.append(f"raised {error!r} after {trial.events} events")
    return trial


def _run(one: Registered, seconds: float, trial: Trial) -> None:
    assert one.make is not None
    first, second = one.make(INSTRUMENT), one.make(INSTRUMENT)
    defined = ~np.isnan(_own(one, first.values()))  # also directly after a start
    begun_ns = 0
    for event in _events(seconds):
        given = event.SerializeToString(deterministic=True)
        begun_ns = begun_ns or event.event_time_ns
        trial.seconds = (event.event_time_ns - begun_ns) / 1e9
        trial.event_seconds += _timed(trial, first, event)
        if event.SerializeToString(deterministic=True) != given:
            trial.problems.append("on_event changed the event, which others are shown too")
            return
        values = _asked(trial, one, first)
        defined |= ~np.isnan(values)
        second.on_event(event)
        trial.events += 1
        if trial.events % _ASKED_EVERY == 0 and not _agree(trial, one, values, second):
            return
    trial.undefined = [
        one.feature_set.names[place] for place, is_defined in zip(one.own, defined, strict=True) if not is_defined
    ]


def _events(seconds: float) -> Iterator[pb.MarketEvent]:
    """Events that the engine of `mf1` takes in: others are not shown to a set."""
    engine = FeatureEngine(INSTRUMENT)
    for event in simulate(1, [INSTRUMENT], duration_seconds=seconds, events_per_second=NORMAL_RATE):
        if engine.on_event(event):
            yield event


def _timed(trial: Trial, computer: Computer, event: pb.MarketEvent) -> float:
    began = time.perf_counter()
    computer.on_event(event)
    took = time.perf_counter() - began
    trial.slowest_seconds = max(trial.slowest_seconds, took)
    return took


def _asked(trial: Trial, one: Registered, computer: Computer) -> NDArray[np.float32]:
    began = time.perf_counter()
    given = computer.values()
    took = time.perf_counter() - began
    trial.values_seconds += took
    trial.slowest_seconds = max(trial.slowest_seconds, took)
    return _own(one, given)


def _agree(trial: Trial, one: Registered, values: NDArray[np.float32], second: Computer) -> bool:
    """Whether a computer that was asked less often gives the same."""
    others = _own(one, second.values())
    same = (values == others) | (np.isnan(values) & np.isnan(others))
    if same.all():
        return True
    place = int(np.argmin(same))
    trial.problems.append(
        f"{one.feature_set.names[one.own[place]]} is {values[place]!r} and {others[place]!r} in two computers that saw"
        f" the same {trial.events} events: a clock, a random number, what they share, or how often `values` is asked"
        " decides it, so that no replay would give it again"
    )
    return False


def _own(one: Registered, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a computer gave, as a copy, if its set allows it. Raises ImpossibleValuesError."""
    return one.row(values)[list(one.own)]
