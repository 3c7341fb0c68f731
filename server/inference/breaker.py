"""Circuit breaker: pybreaker keeps the state, this adapter drives it from asyncio.

pybreaker's own call wrappers do not fit: under asyncio `call` never trips, a cancelled call counts as a failure, an
excluded exception counts as a success, every caller gets through in half-open, and its timer is the wall clock.

States::

    CLOSED ──(bad calls in a row, failure rate or slow rate)──▶ OPEN ──(open time over, a probe asks)──▶ HALF_OPEN
       ▲                                                         ▲                                          │
       │                                                         └────────────(a probe fails)───────────────┤
       └────────────────────────(enough probes succeed)─────────────────────────────────────────────────────┘

A call is bad when it failed or was slow: a replica that suddenly takes 20 times as long is as useless to an order as a
dead one, and the rates of a window that is mostly from before would notice too late.

The open time is base · 2^(openings in a row − 1), capped, times a jitter of 0.8–1. Openings are in a row until the
breaker has stayed closed for a window's length, so that a replica which passes probes and fails orders does not flap.
Live calls pass only when CLOSED; half-open belongs to probes with a canned row. Every transition starts a new
generation: the result of a call that began in an older one changes nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final

import pybreaker
from pydantic import BaseModel, ConfigDict, Field

from feature_cache.backoff import Backoff
from feature_cache.constants import Constant
from server.inference.outcome import Outcome

_BUCKETS: Final = 10
"""The window is counted in this many parts."""

_SHORTEST_FACTOR: Final = 0.8
"""An open time is shortened at random to at least this share."""

_FAILURES: Final = frozenset((Outcome.MODEL_ERROR, Outcome.BAD_ANSWER, Outcome.TRANSPORT, Outcome.TIMEOUT))


class BreakerSettings(BaseModel):
    """When a breaker opens and how it closes again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    consecutive_failures: int = Field(default=5, ge=1, le=1_000)
    """The breaker opens after this many failed or slow batches in a row. Lower it to give up a failing replica
    sooner."""
    failure_rate: float = Field(default=0.5, gt=0, le=1)
    """The breaker opens when this share of the batches of the last 10 s failed, 0 to 1."""
    slow_rate: Constant[float] = 0.8
    """Open when this share of the window's batches was slow. Below it a
    replica is slow only now and then."""
    slow_seconds: float = Field(default=0.025, gt=0, le=10)
    """A batch that takes at least this time is slow, in seconds. Raise it for a slower model, to about half of your
    callers' deadline."""
    window_seconds: Constant[float] = 10.0
    """Length of the window for the two rates, in seconds. Long enough for the rates to mean something, short enough
    that an old outage is forgotten."""
    minimum_calls: int = Field(default=20, ge=1, le=100_000)
    """The rates count only if the window has at least this many batches. Raise it when a few failures at low traffic
    open the breaker."""
    open_seconds: Constant[float] = 0.5
    """First open time, in seconds; doubles with each opening in a row, up to `max_open_seconds`. A replica that only
    paused is back soon, and probing it costs no order."""
    max_open_seconds: Constant[float] = 0.75
    """Longest open time, in seconds; probes carry no order, so a short one costs nothing, and a replica that has just
    started may need several."""
    half_open_probes: Constant[int] = 2
    """Probes in flight at once, and successes in a row needed to close. One success may be chance."""


class Mode(enum.Enum):
    """Who drives the breaker."""

    AUTOMATIC = "automatic"
    FORCED_OPEN = "forced_open"
    FORCED_CLOSED = "forced_closed"
    METRICS_ONLY = "metrics_only"
    """Transitions happen and are counted, but every call passes."""


class State(enum.Enum):
    """pybreaker's states."""

    CLOSED = pybreaker.STATE_CLOSED
    OPEN = pybreaker.STATE_OPEN
    HALF_OPEN = pybreaker.STATE_HALF_OPEN


class Breaker:
    """The breaker of one replica. Not thread-safe: used from one event loop.

    Args:
        name: The replica's name, for the listener.
        settings: When to open and close.
        clock: Monotonic seconds.
        random: Uniform in [0, 1), for the jitter.
        on_transition: Called as (from, to) after every change of state.
    """

    def __init__(
        self,
        name: str,
        settings: BreakerSettings,
        clock: Callable[[], float],
        random: Callable[[], float],
        on_transition: Callable[[State, State], None],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._on_transition = on_transition
        self._circuit = pybreaker.CircuitBreaker(name=name)
        self._closed = True
        """The circuit's state is CLOSED; asked for every order."""
        self._mode = Mode.AUTOMATIC
        self._mode_expires = float("inf")
        self.generation = 0
        """Changes with every transition; a result is reported with the one its call began in."""
        self._consecutive_failures = 0
        self._open_time = Backoff(
            settings.open_seconds, settings.max_open_seconds, spread=(1.0, _SHORTEST_FACTOR), uniform=random
        )
        self._closed_at = -float("inf")
        self._half_open_at = 0.0
        self._probes_in_flight = 0
        self._probe_successes = 0
        self._window = _Window(settings.window_seconds)

    @property
    def state(self) -> State:
        """The state the outcomes led to, whatever the mode."""
        return State(self._circuit.current_state)

    @property
    def mode(self) -> Mode:
        """Who drives the breaker now; a forced mode past its expiry is over."""
        if self._mode is not Mode.AUTOMATIC and self._clock() >= self._mode_expires:
            self.force(Mode.AUTOMATIC)
        return self._mode

    @property
    def passes(self) -> bool:
        """True when a live call may go through. Never true for half-open."""
        if self._mode is Mode.AUTOMATIC or self.mode is Mode.AUTOMATIC:
            return self._closed
        return self._mode is not Mode.FORCED_OPEN

    @property
    def suspicious(self) -> bool:
        """True while closed after a bad call."""
        return self._consecutive_failures > 0 and self._closed

    @property
    def seconds_to_half_open(self) -> float:
        """Seconds until a probe may be tried; 0 when it may be now, infinite when not open."""
        match self.state:
            case State.CLOSED:
                return float("inf")
            case State.HALF_OPEN:
                return 0.0
            case State.OPEN:
                return max(0.0, self._half_open_at - self._clock())

    def force(self, mode: Mode, expires_in_seconds: float | None = None) -> None:
        """Sets who drives the breaker; back to automatic after `expires_in_seconds`, if given.

        Back to automatic, the state is the one the outcomes led to meanwhile: forcing does not forget a broken replica.
        """
        self._mode = mode
        self._mode_expires = float("inf") if expires_in_seconds is None else self._clock() + expires_in_seconds

    def record(self, outcome: Outcome, seconds: float, generation: int) -> None:
        """Counts the outcome of a call that began in `generation`.

        OVERLOAD and IGNORED say nothing about the replica's health and count for nothing, neither does anything that
        began in an older generation or comes back while the breaker is not closed.
        """
        if generation != self.generation or not self._closed:
            return
        failed = outcome in _FAILURES
        if not failed and outcome is not Outcome.SUCCESS:
            return
        slow = seconds >= self._settings.slow_seconds
        self._consecutive_failures = self._consecutive_failures + 1 if failed or slow else 0
        calls, failures, slows = self._window.add(self._clock(), failed, slow)
        settings = self._settings
        if self._consecutive_failures >= settings.consecutive_failures or (
            calls >= settings.minimum_calls
            and (failures >= settings.failure_rate * calls or slows >= settings.slow_rate * calls)
        ):
            self._open()

    def try_probe(self) -> int | None:
        """Asks to send one probe. Returns the generation to report it with, or None when none may go now.

        The caller must report every permitted probe with `record_probe`.
        """
        if self.state is State.OPEN and self._clock() >= self._half_open_at:
            self._probes_in_flight = self._probe_successes = 0
            self._move(self._circuit.half_open)
        if self.state is not State.HALF_OPEN or self._probes_in_flight >= self._settings.half_open_probes:
            return None
        self._probes_in_flight += 1
        return self.generation

    def record_probe(self, outcome: Outcome, seconds: float, generation: int) -> None:
        """Counts a probe's outcome: a sound and quick answer counts towards closing, anything else opens again."""
        if generation != self.generation:
            return
        self._probes_in_flight -= 1
        if outcome in (Outcome.IGNORED, Outcome.OVERLOAD):
            return
        if outcome is not Outcome.SUCCESS or seconds >= self._settings.slow_seconds:
            self._open()
            return
        self._probe_successes += 1
        if self._probe_successes >= self._settings.half_open_probes:
            self._closed_at = self._clock()
            self._consecutive_failures = 0
            self._window = _Window(self._settings.window_seconds)
            self._move(self._circuit.close)

    def _open(self) -> None:
        settings = self._settings
        if self._closed and self._clock() - self._closed_at >= settings.window_seconds:
            self._open_time.reset()
        self._half_open_at = self._clock() + self._open_time.next_pause()
        self._move(self._circuit.open)

    def _move(self, transition: Callable[[], object]) -> None:
        previous = self.state
        transition()
        self._closed = self.state is State.CLOSED
        self.generation += 1
        self._on_transition(previous, self.state)


class _Window:
    """Calls, failures and slow calls of the last seconds, in a ring of buckets."""

    __slots__ = ("_bucket_seconds", "_buckets", "_newest")

    def __init__(self, window_seconds: float) -> None:
        self._bucket_seconds = window_seconds / _BUCKETS
        self._buckets = [[0, 0, 0] for _ in range(_BUCKETS)]
        self._newest = 0

    def add(self, now: float, failed: bool, slow: bool) -> tuple[int, int, int]:
        """Adds one call and returns the sums of (calls, failures, slow calls)."""
        current = int(now / self._bucket_seconds)
        for index in range(max(self._newest + 1, current - _BUCKETS + 1), current + 1):
            self._buckets[index % _BUCKETS] = [0, 0, 0]
        self._newest = max(self._newest, current)
        bucket = self._buckets[self._newest % _BUCKETS]
        bucket[0] += 1
        bucket[1] += failed
        bucket[2] += slow
        calls, failures, slows = (sum(column) for column in zip(*self._buckets, strict=True))
        return calls, failures, slows
