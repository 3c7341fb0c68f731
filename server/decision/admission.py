"""Admission control: how many decisions may be under way at once."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from feature_cache.constants import Constant
from server.errors import DrainingError, OverloadedError, PretradeError

_WINDOW_SECONDS: Final = 0.1
_MIN_SAMPLES: Final = 20
_QUANTILE: Final = 0.9
_STEEPEST_FALL: Final = 0.7
_DROPPED: Final = math.inf
_TARGET_SHARE: Final = 0.6
"""Of the time that a call is allowed. What is left absorbs the calls that take longer than nine in ten."""
_HARDLY_ANY_SECONDS: Final = 0.0075
"""A call that is allowed no more than this says nothing of an overload: on an idle server it may be late, too."""
PATIENCE_SECONDS: Final = 0.5
"""How long an order without a deadline, or a batch, waits for a place. A caller without a deadline often asks again at
once when it is refused, and a caller that waits costs nothing."""
_PATIENT_SHARE: Final = 0.75
"""Of the limit, for orders that may wait. It is less than the gate lets in, or the gate would refuse them before one of
them could wait."""
WAITING_BATCHES: Final = 128
"""Most batches that wait for places before they begin. One that waits costs its message and its orders, half a megabyte
where they are 1,024."""

_FIRST_LIMIT: Final = 512
"""Where the limit starts. It is more only where more were needed and were in time."""
_NEEDED_SHARE: Final = 0.5
"""Of the limit: when so many decisions were under way at once in a window, it was needed."""
_EASY_SHARE: Final = 0.5
"""Of their targets: a window in which nine in ten took no longer says that there may be many more."""
_STEEPEST_RISE: Final = 1.5
_AHEAD_SHARE: Final = 0.5
"""Of the limit, for orders that begin while others of their call are under way. The next calls find room for all of
theirs that must begin at once."""


def overloaded() -> OverloadedError:
    """The error of a call that is shed, here or in the gate."""
    return OverloadedError("TOO_MANY_IN_FLIGHT", "too many decisions are under way; try again shortly")


class AdmissionSettings(BaseModel):
    """How many decisions may be under way at once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_in_flight: int = Field(default=2_048, ge=1, le=1_000_000)
    """Most decisions under way at once, at any latency; a call beyond it is shed with RESOURCE_EXHAUSTED. The limit
    starts at 512, or here if that is less, and rises above 512 only while more are needed and are in time."""
    min_in_flight: int = Field(default=96, ge=1, le=1_000_000)
    """The limit never falls below this number of decisions. A replica takes as long for a batch of this many rows as
    for one, and as many orders of a `DecideBatch` are taken up at a time as find places. Lower it on a very small
    machine."""
    target_seconds: float | None = Field(default=None, gt=0, le=10)
    """The limit falls while one call in ten takes longer than this, in seconds, or longer than 0.6 of the time that
    its deadline and `budget.cap_seconds` allow. Unset: only the latter. Set it to refuse calls rather than let them
    wait."""
    reserved_share: Constant[float] = 0.1
    """Share of the limit that only reduce-only orders may use."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> AdmissionSettings:
        if self.min_in_flight > self.max_in_flight:
            raise ValueError(f"min_in_flight ({self.min_in_flight}) exceeds max_in_flight ({self.max_in_flight})")
        return self

    def target(self, allowed_seconds: float) -> float:
        """The most that nine in ten calls should take, in seconds, if each is allowed so many."""
        share = _TARGET_SHARE * allowed_seconds
        return share if self.target_seconds is None or share < self.target_seconds else self.target_seconds


class Admission:
    """Counts decisions under way and sheds those beyond a limit that follows the latency of the ones admitted.

    It counts orders and not calls: a slice of 256 orders of one `DecideBatch` takes 256 places.

    Every admitted order is one of three things: *answered* after some time, *dropped* (a deadline missed, or a model
    that could not be asked in time), or neither, which says nothing: cancelled, refused, or granted so little time
    that it could hardly have been in time on an idle server.

    An answer is slow if it took longer than its target: 0.6 of the time that it was allowed, or `target_seconds` if
    that is shorter. The limit therefore follows the deadlines that the callers give. Callers that can wait for 200 ms
    wait in an overload; callers that cannot wait longer than 25 ms are refused instead.

    Per window of at least 0.1 s and 20 orders, with w = the 90th percentile of time / target (infinite when dropped)::

        w <= 1:  limit ← limit + √limit                 at most 512, or `max_in_flight` where it was needed
        w <= ½:  limit ← limit · 1.5                    the same, from 512 on and where it was needed
        w >  1:  limit ← limit · max(0.7, 1 / w)        at least `min_in_flight`

    It starts at 512. Up to there it grows in every good window, used or not, so that a burst is not refused for an
    overload long gone. Orders of batches and streams cost so much less than single calls that thousands may be under
    way: above 512 the limit grows in windows in which half of it was taken, and falls by √limit in those in which it
    was not. The last `reserved_share` of it is a lane of its own for orders that can only reduce an exposure.

    An order without a deadline is not shed at once. It waits while three quarters of the limit are under way, which
    leaves the rest to orders that cannot wait, but not when `max_in_flight` are under way or wait already. A batch
    waits in the same queue, as one, for some of its orders at a time: however far the limit has fallen, a batch is
    decided piece by piece. If it were refused instead, a caller who asks again at once would take the time that the
    limit needs to rise.

    Source: Netflix concurrency-limits, `Gradient2Limit`, with a target in place of the long-term latency, which drifts
    upwards in a long overload.
    """

    def __init__(self, settings: AdmissionSettings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._limit = float(min(_FIRST_LIMIT, settings.max_in_flight))
        self._samples: list[float] = []
        """Times as shares of their targets."""
        self._window_started = clock()
        self._most_under_way = 0
        """In the window."""
        self._waiting: OrderedDict[asyncio.Future[bool], int] = OrderedDict()
        """Resolved when there may be a place, the oldest first, with the number of orders that wait for places."""
        self._waiting_batches = 0
        self.in_flight = 0
        """Decisions under way."""
        self.shed = 0
        """Decisions refused because too many were under way."""
        self.draining = False
        """True: no new decision is admitted."""
        self.keeps_up = True
        """Whether nine in ten were in time in the last window."""

    @property
    def limit(self) -> int:
        """Decisions that may be under way now."""
        return int(self._limit)

    @property
    def ordinary_limit(self) -> int:
        """The same for orders that are not reduce-only."""
        limit = int(self._limit)
        return limit - int(limit * self._settings.reserved_share)

    @property
    def _patient_limit(self) -> int:
        """The same for orders that have no deadline and have waited."""
        return max(1, int(self.ordinary_limit * _PATIENT_SHARE))

    @property
    def waiting(self) -> int:
        """Orders without a deadline, and batches, that wait for a place."""
        return len(self._waiting)

    @property
    def waiting_orders(self) -> int:
        """The same without the batches."""
        return max(0, len(self._waiting) - self._waiting_batches)

    @property
    def must_wait(self) -> bool:
        """Whether an order without a deadline that comes now has to wait for a place."""
        return self._must_wait(is_next=False)

    def has_places_at_once(self, orders: int) -> bool:
        """The opposite, of so many orders that come together."""
        return not (self.draining or self._waiting) and self.in_flight + orders <= self._patient_limit

    def has_places(self, orders: int) -> bool:
        """Whether so many orders may begin before others of their call have ended: half of the places stay free."""
        free = self.ordinary_limit * _AHEAD_SHARE - self.in_flight
        return not (self.draining or self._waiting) and orders <= free

    async def place(self, most_seconds: float = math.inf) -> None:
        """Waits until an ordinary order without a deadline may be admitted, or until it has waited long enough.

        An order of a stream that has a deadline may wait no longer than `most_seconds`.
        """
        await self._place(1, min(most_seconds, PATIENCE_SECONDS), is_next=False)

    async def places(self, orders: int, most_seconds: float, *, has_begun: bool) -> int:
        """Waits in the same way for places of ordinary orders of one batch; how many of so many orders may begin now.

        None where it has waited long enough, or too many others wait, and there is no place.

        Args:
            orders: That are to begin.
            most_seconds: How long it may wait, if that is shorter than the patience.
            has_begun: Others of the batch have. Then it is the next, so that the batches that have begun come to their
                ends before others begin.
        """
        if has_begun or self._waiting_batches < WAITING_BATCHES:
            self._waiting_batches += 1
            try:
                await self._place(orders, min(most_seconds, PATIENCE_SECONDS), is_next=has_begun)
            finally:
                self._waiting_batches -= 1
        free = self._patient_limit - self.in_flight
        return min(orders, free if free > 0 else max(0, self.ordinary_limit - self.in_flight))

    async def _place(self, orders: int, seconds: float, *, is_next: bool) -> None:
        """Waits until one of so many orders may be admitted."""
        until = self._clock() + seconds
        while self._must_wait(is_next) and (left := until - self._clock()) > 0:
            is_next = await self._turn(orders, left, is_next)

    def _must_wait(self, is_next: bool) -> bool:
        """Whether an order has to wait: behind those that came before it, unless it is the next one."""
        if self.draining or self.in_flight + len(self._waiting) >= self._settings.max_in_flight:
            return False
        return self.in_flight >= self._patient_limit or (bool(self._waiting) and not is_next)

    async def _turn(self, orders: int, seconds: float, is_next: bool) -> bool:
        """Waits so long at most for a place that is given back; whether there was one."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[bool] = loop.create_future()
        over = loop.call_later(seconds, _resolve, turn, False)
        self._waiting[turn] = orders
        if is_next:  # of a batch that has begun, or somebody else took the place
            self._waiting.move_to_end(turn, last=False)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done():
                self._call_next()
            raise
        finally:
            over.cancel()
            self._waiting.pop(turn, None)

    def _call_next(self) -> None:
        """Has as many orders try again as there are places."""
        free = self._patient_limit - self.in_flight
        while free > 0 and self._waiting:
            turn, orders = self._waiting.popitem(last=False)
            _resolve(turn, True)
            free -= orders

    def admit(self, reduce_only: bool) -> None:
        """Admits one decision, whose place is taken until it says `leave`.

        Raises:
            DrainingError: The server is about to stop.
            OverloadedError: Too many decisions are under way.
        """
        if self.draining or self.in_flight >= (self.limit if reduce_only else self.ordinary_limit):
            raise self.refused(1)
        self._enter(1)

    def refused(self, orders: int) -> PretradeError:
        """Counts so many orders as shed; why they are not admitted."""
        if self.draining:
            return DrainingError("DRAINING", "the server is draining; try another one")
        self.shed += orders
        return overloaded()

    def admit_together(self, orders: int) -> bool:
        """The same for so many ordinary orders, all of them or none; nothing is shed."""
        if self.draining or self.in_flight + orders > self.ordinary_limit:
            return False
        self._enter(orders)
        return True

    def _enter(self, orders: int) -> None:
        self.in_flight += orders
        self._most_under_way = max(self._most_under_way, self.in_flight)

    def leave(self, orders: int = 1) -> None:
        """Gives the places of so many decisions back."""
        self.in_flight -= orders
        if self._waiting:
            self._call_next()

    def answered(self, times: Sequence[tuple[float, float]], orders: int = 1) -> None:
        """Counts admitted orders that are answered now.

        Args:
            times: Seconds since their arrival, and how many they were allowed.
            orders: How many have each of these times.
        """
        target_of = self._settings.target
        shares = [seconds / target_of(allowed) for seconds, allowed in times if allowed > _HARDLY_ANY_SECONDS]
        self._add(shares * orders)

    def dropped(self, allowed_seconds: float) -> None:
        """Counts an admitted order whose `allowed_seconds` were too short."""
        if allowed_seconds > _HARDLY_ANY_SECONDS:
            self._add([_DROPPED])

    def _add(self, shares: list[float]) -> None:
        samples = self._samples
        samples += shares
        now = self._clock()
        if len(samples) < _MIN_SAMPLES or now - self._window_started < _WINDOW_SECONDS:
            return
        samples.sort()
        self._adapt(samples[math.ceil(len(samples) * _QUANTILE) - 1])
        samples.clear()
        self._window_started = now

    def _adapt(self, share: float) -> None:
        settings, limit = self._settings, self._limit
        was_needed = self._most_under_way >= _NEEDED_SHARE * limit
        self._most_under_way = self.in_flight
        self.keeps_up = share <= 1
        if not self.keeps_up:
            self._limit = max(settings.min_in_flight, limit * max(_STEEPEST_FALL, 1 / share))
        elif limit < _FIRST_LIMIT:
            self._limit = min(_FIRST_LIMIT, settings.max_in_flight, limit + math.sqrt(limit))
        elif was_needed:
            rise = limit * _STEEPEST_RISE if share <= _EASY_SHARE else limit + math.sqrt(limit)
            self._limit = min(settings.max_in_flight, rise)
        else:
            self._limit = max(_FIRST_LIMIT, limit - math.sqrt(limit))


def _resolve(turn: asyncio.Future[bool], came: bool) -> None:
    if not turn.done():
        turn.set_result(came)
