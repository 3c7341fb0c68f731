"""The micro-batcher: puts the rows of many callers into one call to the model server.

A model server takes about the same time for 1 row as for 1,000, and handles a few hundred calls a second. One batch is
therefore under way at a time, and the rows that arrive meanwhile form the next. It leaves as soon as enough rows have
come for the orders under way; a lone row leaves at once. When that is, and how many rows a batch may have, is decided
in `pacing.py`.

A caller waits on its own row with its own deadline and never owns the batch's call: if it gives up or is cancelled, the
other rows of the batch are not affected. A batch that does not come back is *abandoned*, not cancelled: its slot is
free again, but it counts against the cap until the call really ends.

If a batch fails as a whole because of what it contains, it is *split*: sent once more, in parts, so that one poison row
cannot fail the others.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain, pairwise
from typing import Final

import structlog
from pydantic import BaseModel, ConfigDict, Field, model_validator

from feature_cache.constants import Constant
from server.inference.flight import Flight, Report, Split
from server.inference.outcome import BLAMES_CONTENT, BatchFailedError, Outcome
from server.inference.pacing import HOLD_SECONDS, Departure, Patience, RowLimit
from server.inference.rows import Lane, Result, Row, RowBlock, RowQueue, watch_together
from server.inference.shadow_queue import ShadowQueue
from server.inference.wire import ScoreBatch
from server.timing.deadlines import Deadlines
from server.timing.histogram import ROW_EDGES, Histogram
from server.timing.latency import LatencyWindow

_log = structlog.get_logger(__name__)

_LATELY_SECONDS: Final = 1.0
"""A replica that was asked for an order within this time serves orders: no large block is put in their way."""
_CLOCK_RESOLUTION_SECONDS: Final = 0.001
"""Rows that are to leave sooner than this leave now: an event loop's timers are no finer."""


class BatcherSettings(BaseModel):
    """How rows are gathered into batches, and how much may be under way to one replica."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_rows: int = Field(default=256, ge=1, le=1_024)
    """Most rows in one batch. Lower it to the largest batch that your model server takes."""
    slots: int = Field(default=1, ge=1, le=64)
    """Batches of orders in flight at once. Raise it for a model server with several workers: one worker scores more
    rows in one full batch than in two that are half as full."""
    max_in_flight: Constant[int] = 8
    """Batches in flight including abandoned ones; above it the replica counts as full. More calls than that to a server
    that answers none of them would only fill its memory."""
    max_queued_rows: Constant[int] = 4_096
    """Live and canary rows waiting for a slot; a live row takes a canary row's place when there is no other. Several
    batches; rows that wait longer than these take would miss their deadlines anyway."""
    max_shadow_rows: int = Field(default=1_024, ge=1, le=1_024)
    """Most rows in one batch of shadow rows, on a model server that no order asks. Lower it to the largest batch that
    your challenger takes."""
    max_queued_shadow_rows: Constant[int] = 4_096
    """Shadow rows that wait; more are shed. Four blocks, so that one late answer sheds none."""
    shadow_linger_seconds: Constant[float] = 0.25
    """Shadow rows gather this long, in seconds, unless a block fills earlier. Four calls a second cost a challenger
    next to nothing, and evidence about a canary is still fresh."""
    shadow_patience_seconds: Constant[float] = 0.5
    """A batch of shadow rows is abandoned after this time, in seconds. No caller waits for it, and what nobody waits
    for may run at a low priority."""
    min_patience_seconds: float = Field(default=0.01, gt=0, le=10)
    """A batch is never abandoned before this time, in seconds. Raise it for a model that is slow even when it is
    well."""
    max_patience_seconds: float = Field(default=0.05, gt=0, le=10)
    """A batch is abandoned at the latest after this time, in seconds; between the two bounds, after four times the
    recent p95. Keep it below your callers' deadlines. While a replica answers batches that were given up, the next ones
    are waited for longer."""
    wanted_seconds: Constant[float] = 0.01
    """A batch gets no more rows than should be back within this, in seconds. A batch that takes longer makes the rows
    behind it late."""
    split_parts: Constant[int] = 8
    """Parts in which a batch that failed as a whole is sent once more; 1 for not at all. Eight parts find one bad row
    among 256 with few more calls, and let the others have their scores."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> BatcherSettings:
        if self.slots > self.max_in_flight:
            raise ValueError(f"slots ({self.slots}) cannot exceed max_in_flight ({self.max_in_flight})")
        if self.min_patience_seconds > self.max_patience_seconds:
            raise ValueError("min_patience_seconds cannot exceed max_patience_seconds")
        return self


class MicroBatcher:
    """Coalesces rows for one replica: live before canary before shadow, and the earliest deadline first in each.

    A batch takes live rows and fills up with canary rows. Shadow rows leave in batches of their own when neither waits,
    one such batch at a time and beside the others. They are shed first, then canary rows; a live row is refused only
    when nothing but live rows fills the queue. What a row can expect to wait depends on its lane: for nothing that
    leaves after it.

    A split costs at most `split_parts` further calls and lasts no longer than its rows' deadlines: a part is never
    split again, and leaves only with the rows that a caller still waits for and that can still be in time. In a batch
    of up to `split_parts` rows exactly the poison rows fail, however many they are; in a larger one of n rows a poison
    row takes at most ceil(n / split_parts) - 1 mates with it, which may be retried elsewhere.

    Args:
        send: Scores a batch of payloads in a call that carries a `traceparent`, that of the first row; the other rows
            learn of it afterwards. Raises `BatchFailedError`.
        begin: Called when a batch leaves, with whether one of its rows has a caller's own features, and whether it
            holds shadow rows; what it returns is called once with the batch's outcome.
        latency: Recent time of a batch; the batcher adds to it.
        settings: Limits.
        clock: Monotonic seconds; must be the event loop's clock.
        stalled_seconds: How long the event loop stood still since an instant, which is no time of the replica's.
        under_way: Orders that the server is deciding now, those that wait for a score of this replica among them.
    """

    def __init__(
        self,
        send: Callable[[list[bytes], str], Awaitable[ScoreBatch]],
        begin: Callable[[bool, bool], Report],
        latency: LatencyWindow,
        settings: BatcherSettings,
        clock: Callable[[], float],
        stalled_seconds: Callable[[float], float] = lambda since: 0.0,
        under_way: Callable[[], int] = lambda: 0,
    ) -> None:
        self._send = send
        self._begin = begin
        self._latency = latency
        self._settings = settings
        self._clock = clock
        self._stalled_seconds = stalled_seconds
        self._deadlines = Deadlines(clock)
        self._departure = Departure(under_way)
        self._waiting_since = math.nan
        """When the oldest of the rows that a caller waits for came, or the last batch left rows behind."""
        self._hold: asyncio.TimerHandle | None = None
        self._patience = Patience(settings.min_patience_seconds, settings.max_patience_seconds, latency)
        self._row_limit = RowLimit(settings.max_rows, settings.wanted_seconds)
        self._lanes = {lane: RowQueue() for lane in Lane}
        self._live, self._canary = self._lanes[Lane.LIVE], self._lanes[Lane.CANARY]
        self._parts: deque[tuple[list[Row], Split]] = deque()
        self._shadow = ShadowQueue(settings.max_queued_shadow_rows, settings.shadow_linger_seconds, self._pump)
        self._shadow_parts: deque[tuple[list[Row], Split]] = deque()
        self._shadow_active = 0
        self._asked_at = -math.inf
        """When the last row came that a caller waits for."""
        self._active = 0
        self._abandoned = 0
        self._pump_scheduled = False
        self._closed = False
        self._flights: dict[Flight, asyncio.Task[None]] = {}
        self.batches = 0
        """Batches that came back in time with a usable answer."""
        self.rows = 0
        """Rows that got a score while a caller waited for it."""
        self.displaced = 0
        """Canary rows given up for a live row because the queue was full."""
        self.splits = 0
        """Batches that failed as a whole and were sent once more in parts."""
        self.queue_waits = Histogram()
        """Seconds that live and canary rows waited for their batch to leave."""
        self.batch_sizes = Histogram(ROW_EDGES)
        """Rows of the batches that left."""
        self.batch_times = Histogram()
        """Seconds of the batches that ended, or until they were given up."""

    @property
    def row_limit(self) -> int:
        """Rows that a batch may have now."""
        return self._row_limit.limit

    @property
    def in_flight(self) -> int:
        """Batches in flight, abandoned ones included."""
        return self._active + self._shadow_active + self._abandoned

    @property
    def abandoned(self) -> int:
        """Batches given up whose call has not ended."""
        return self._abandoned

    @property
    def queued(self) -> int:
        """Rows that have not left, given-up ones included until their turn comes."""
        parts = sum(len(rows) for rows, _ in (*self._parts, *self._shadow_parts))
        return len(self._live) + len(self._canary) + len(self._shadow) + parts

    @property
    def shed(self) -> int:
        """Shadow rows dropped because the queue was full."""
        return self._shadow.shed

    @property
    def full(self) -> bool:
        """True when a live row would not be taken: the queue is full, or too many calls have not ended."""
        return self.full_for(Lane.LIVE)

    def full_for(self, lane: Lane) -> bool:
        """True when a row of this lane would not be taken."""
        rows = len(self._live) + (len(self._canary) if lane is Lane.CANARY else 0)
        return rows >= self._settings.max_queued_rows or self.stuck

    @property
    def stuck(self) -> bool:
        """True when too many calls have not ended."""
        return self.in_flight >= self._settings.max_in_flight

    @property
    def expected_seconds(self) -> float:
        """Expected time to a score for a live row that arrives now."""
        return self.expected_seconds_in(Lane.LIVE)

    def expected_seconds_in(self, lane: Lane, rows: int = 1) -> float:
        """Expected time to a score for the last of some rows that arrive now.

        Parts and full batches ahead of it, then its own.
        """
        return self._latency.expected * self.expected_batches(lane, rows)

    def expected_batches(self, lane: Lane, rows: int = 1) -> float:
        """The same in times that a batch takes; half of one for a batch that is under way."""
        ahead = rows - 1 + len(self._live) + (len(self._canary) if lane is Lane.CANARY else 0)
        slots = self._settings.slots
        batches_ahead = (len(self._parts) + ahead // self._row_limit.limit) / slots
        waits = self._active >= slots
        return batches_ahead + 1 + 0.5 * waits

    def would_wait(self, rows: int) -> bool:
        """Whether so many live rows that came now would wait here: for a slot, or for others."""
        if self._active >= self._settings.slots:
            return True
        return len(self._live) + len(self._canary) + rows < self._departure.awaited

    @property
    def under_way_seconds(self) -> float:
        """How long the oldest of the orders' batches has been under way, given-up ones aside; 0 without one."""
        oldest = next((one for one in self._flights if not (one.shadow or one.abandoned)), None)
        return 0.0 if oldest is None else self._clock() - oldest.started

    def submit(
        self,
        payload: bytes,
        deadline: float,
        lane: Lane = Lane.LIVE,
        traceparent: str = "",
        from_caller: bool = False,
    ) -> asyncio.Future[Result]:
        """Queues a row that a caller waits for.

        Args:
            payload: One encoded row.
            deadline: Instant after which the caller cannot use a score.
            lane: Whose it is.
            traceparent: W3C context of the attempt; empty without tracing.
            from_caller: True for a row with a caller's own features, which may be made to fail.

        Returns:
            A future of the score or of the reason why there is none; it is resolved at `deadline` at the latest.
            OVERLOAD at once when `full_for` its lane, and later when a live row needs a canary row's place. Cancelling
            it is safe: a row not yet sent leaves the queue.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue(Row(payload, deadline, future, self._clock(), traceparent, from_caller), lane)
        return future

    def _queue(self, row: Row, lane: Lane) -> None:
        if self._closed or self.full_for(lane):
            row.taker.set_result(Outcome.OVERLOAD)
            return
        self._asked_at = row.queued_at
        self._deadlines.watch(row.taker, row.deadline, late=Outcome.TIMEOUT)
        if len(self._live) + len(self._canary) >= self._settings.max_queued_rows:
            last = self._canary.pop_last()  # with the latest deadline
            self.displaced += len(last) if last.resolve(Outcome.OVERLOAD) else 0
        if not self._live and not self._canary:
            self._waiting_since = row.queued_at
        self._lanes[lane].push(row)
        self._schedule_pump(asyncio.get_running_loop())

    def submit_together(self, rows: Sequence[Row]) -> None:
        """The same for live rows that come at one instant, their `queued_at`; at least one.

        Each row's taker takes its result as a future would.
        """
        if self._push(rows):
            watch_together(rows, self._deadlines, self._clock)
        else:
            for row in rows:
                self._queue(row, Lane.LIVE)

    def submit_block(self, rows: RowBlock, lane: Lane = Lane.LIVE) -> None:
        """The same for rows of orders in columns, which leave in one batch if a batch may have so many."""
        if self._push((rows,), lane):
            self._deadlines.watch(rows, rows.deadline, late=Outcome.TIMEOUT)
        else:
            for row in rows.apart():
                self._queue(row, lane)

    def _push(self, rows: Sequence[Row | RowBlock], lane: Lane = Lane.LIVE) -> bool:
        """Queues rows that come at one instant; False, and none of them queued, where there is no room for all."""
        queue, waiting = self._lanes[lane], len(self._live) + len(self._canary)
        if self._closed or self.stuck or waiting + sum(map(len, rows)) > self._settings.max_queued_rows:
            return False
        self._asked_at = rows[0].queued_at
        if not waiting:
            self._waiting_since = self._asked_at
        for row in rows:
            queue.push(row)
        self._schedule_pump(asyncio.get_running_loop())
        return True

    def _apart(self, block: RowBlock) -> list[Row]:
        """The rows of a block, which wait on one by one."""
        rows = block.apart()
        if rows:
            watch_together(rows, self._deadlines, self._clock)
        return rows

    def submit_shadow(self, rows: Sequence[Row | RowBlock]) -> int:
        """Queues shadow rows, without a deadline, to be sent with others when no live row waits.

        Returns:
            How many were taken, from the first on; the others are shed.
        """
        taken = 0 if self._closed else self._shadow.add(rows)
        least = min(self._settings.max_shadow_rows, self._row_limit.limit)
        if taken and self._shadow.is_due(least) and self._shadow.is_due(self._block_rows()):
            self._schedule_pump(asyncio.get_running_loop())
        return taken

    async def close(self) -> None:
        """Answers every queued row with OVERLOAD, ends the calls in flight and answers their rows with IGNORED."""
        self._closed = True
        if self._hold is not None:
            self._hold.cancel()
        in_parts = (row for rows, _ in (*self._parts, *self._shadow_parts) for row in rows)
        for row in (*self._live.clear(), *self._canary.clear(), *self._shadow.clear(), *in_parts):
            row.resolve(Outcome.OVERLOAD)
        self._parts.clear()
        self._shadow_parts.clear()
        tasks = list(self._flights.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # A task that is cancelled before its first step runs none of its code, not even `finally`.
        for flight in list(self._flights):
            self._land(flight, Outcome.IGNORED)

    def _schedule_pump(self, loop: asyncio.AbstractEventLoop) -> None:
        """Lets the rows of this iteration of the event loop gather before a batch leaves."""
        if not self._pump_scheduled:
            self._pump_scheduled = True
            loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_scheduled = False
        most = self._settings.max_in_flight
        while self._active < self._settings.slots and self.in_flight < most and not self._closed:
            if self._parts:
                self._depart_part(self._parts, shadow=False)
                continue
            if self._holds():
                break
            rows = self._take()
            if not rows:
                break
            self._departure.left(sum(map(len, rows)))
            self._depart_anew(rows, shadow=False)
        while self._shadow_may_leave():
            if self._shadow_parts:
                self._depart_part(self._shadow_parts, shadow=True)
            else:
                self._depart_anew(self._shadow.take(self._block_rows()), shadow=True)

    def _holds(self) -> bool:
        """True when the rows that callers wait for wait for others; sets the time at which they leave in any case."""
        rows = len(self._live) + len(self._canary)
        if not rows or rows >= self._departure.awaited:
            return False
        latest = self._waiting_since + HOLD_SECONDS
        due = min(latest, min(self._live.first_deadline, self._canary.first_deadline) - self._latency.p95)
        if due - self._clock() <= _CLOCK_RESOLUTION_SECONDS:
            return False
        if self._hold is None or self._hold.when() > due:
            if self._hold is not None:
                self._hold.cancel()
            self._hold = asyncio.get_running_loop().call_at(due, self._stop_holding, due == latest)
        return True

    def _stop_holding(self, in_vain: bool) -> None:
        self._hold = None
        if in_vain:
            self._departure.waited_in_vain()
        self._pump()

    def _shadow_may_leave(self) -> bool:
        """True when shadow rows are due, none are under way, and no row waits that a caller waits for."""
        if self._shadow_active or self.in_flight >= self._settings.max_in_flight or self._closed:
            return False
        if self._live or self._canary or self._parts:
            return False
        return bool(self._shadow_parts) or self._shadow.is_due(self._block_rows())

    def _block_rows(self) -> int:
        """Rows that a batch of shadow rows may have: no more than any batch while orders ask this replica."""
        serves = self._clock() - self._asked_at < _LATELY_SECONDS
        return min(self._settings.max_shadow_rows, self._row_limit.limit if serves else self._settings.max_shadow_rows)

    def _depart_anew(self, rows: Sequence[Row | RowBlock], shadow: bool) -> None:
        """Sends rows that have not been sent before."""
        report = self._begin(any(isinstance(row, Row) and row.from_caller for row in rows), shadow)
        self._depart(Flight(rows, self._clock(), report, self._settings.split_parts > 1, shadow))

    def _depart_part(self, parts: deque[tuple[list[Row], Split]], shadow: bool) -> None:
        """Sends the next part of a split batch, unless no caller waits for it any more."""
        rows, split = parts.popleft()
        earliest_useful = self._clock() + self._latency.expected
        rows = [row for row in rows if row.is_worth_sending(earliest_useful)]
        if rows:
            self._depart(Flight(rows, self._clock(), split.part_ended, False, shadow))
        else:
            split.part_ended(Outcome.IGNORED, 0.0)

    def _take(self) -> list[Row | RowBlock]:
        """The next batch of what callers wait for: live rows by deadline, then canary rows."""
        taken: list[Row | RowBlock] = []
        room = self._row_limit.limit
        earliest_useful = self._clock() + self._latency.expected
        for lane in (self._live, self._canary):
            while lane and room and (lane.first_rows <= room or not taken):
                rows = lane.pop()
                if isinstance(rows, RowBlock) and not (rows.is_whole() and len(rows) <= room):
                    for row in self._apart(rows):
                        lane.push(row)
                elif rows.is_worth_sending(earliest_useful):
                    taken.append(rows)
                    room -= len(rows)
        self._waiting_since = self._clock()
        if self._hold is not None:
            self._hold.cancel()
            self._hold = None
        return taken

    def _depart(self, flight: Flight) -> None:
        """Sends one batch."""
        self._count(flight, 1)
        self.batch_sizes.observe(flight.count)
        if not flight.shadow:
            for row in flight.rows:
                self.queue_waits.observe(flight.started - row.queued_at, len(row))
        self._watch(flight)
        self._flights[flight] = asyncio.get_running_loop().create_task(self._fly(flight))

    async def _fly(self, flight: Flight) -> None:
        """Waits for one batch, for as long as the call takes."""
        outcome = Outcome.IGNORED
        try:
            answer = await self._send(flight.payloads(), flight.traceparent)
            outcome = await flight.hand_out(answer, self._clock())
        except BatchFailedError as failure:
            outcome = failure.outcome
            if outcome in BLAMES_CONTENT and flight.divisible and not flight.abandoned:
                self._split(flight, outcome)
        except Exception:
            # A fault of ours. Counted, so that the breaker bounds how often it happens; the next stage answers.
            _log.exception("batch failed unexpectedly")
            outcome = Outcome.MODEL_ERROR
        finally:
            self._land(flight, outcome)

    def _split(self, flight: Flight, outcome: Outcome) -> None:
        """Queues a failed batch's rows once more, in parts, those with the earliest deadlines first."""
        if flight.count == 1 or self._closed:
            return
        rows = chain.from_iterable(
            row.apart() if flight.shadow or isinstance(row, Row) else self._apart(row) for row in flight.rows
        )
        waiting = [row for row in rows if not row.taker.done()]
        if not waiting:
            return
        count = min(len(waiting), self._settings.split_parts)
        edges = [len(waiting) * part // count for part in range(count + 1)]
        assert flight.report is not None
        split = Split(flight.report, outcome, self._clock() - flight.started, count)
        parts = self._shadow_parts if flight.shadow else self._parts
        parts.extend((waiting[start:end], split) for start, end in pairwise(edges))
        flight.rows = []
        flight.report = None
        self.splits += 1

    def _land(self, flight: Flight, outcome: Outcome) -> None:
        """Ends a batch's account: its slot is free and no row of it stays without a result."""
        del self._flights[flight]
        self.rows += flight.scored
        if flight.timer is not None:
            flight.timer.cancel()
        if outcome is not Outcome.SUCCESS:
            for row in flight.rows:
                row.resolve(outcome)
        if flight.abandoned:
            self._abandoned -= 1
            if outcome is Outcome.SUCCESS and not flight.shadow:
                self._patience.came_late(self._clock() - flight.started, self._clock())
        else:
            self._count(flight, -1)
            seconds = self._clock() - flight.started
            self.batch_times.observe(seconds)
            if seconds > self._settings.min_patience_seconds:
                seconds -= self._stalled_seconds(flight.started)
            if outcome is Outcome.SUCCESS:
                self.batches += 1
                if not flight.shadow:  # what a block takes says nothing about an order's row
                    self._latency.add(seconds)
                    self._row_limit.landed(flight.count, seconds)
            if flight.report is not None:
                flight.report(outcome, seconds)
        self._schedule_pump(asyncio.get_running_loop())

    def _count(self, flight: Flight, change: int) -> None:
        """Counts a batch that leaves or ends."""
        if flight.shadow:
            self._shadow_active += change
        else:
            self._active += change

    def _watch(self, flight: Flight) -> None:
        """Sets the time at which a batch is given up."""
        now, patience = self._clock(), self._settings.shadow_patience_seconds
        if not flight.shadow:
            patience = self._patience.seconds(now, max(row.deadline for row in flight.rows))
        due = now + patience
        flight.timer = asyncio.get_running_loop().call_at(due, self._abandon, flight, due)

    def _abandon(self, flight: Flight, due: float) -> None:
        """Gives a batch up: its rows try elsewhere and its slot is free; its call goes on, counted, until it ends."""
        if self._clock() - due > self._settings.min_patience_seconds:
            # The event loop itself stood still: the answer may be waiting to be read, so the replica is not to blame.
            self._watch(flight)
            return
        flight.abandoned = True
        self._count(flight, -1)
        self._abandoned += 1
        seconds = self._clock() - flight.started
        self.batch_times.observe(seconds)
        if not flight.shadow:
            # Its true time is longer, but this much makes the next batch's patience grow with a slow replica.
            self._latency.add(seconds)
        for row in flight.rows:
            row.resolve(Outcome.TIMEOUT)
        if flight.report is not None:
            flight.report(Outcome.TIMEOUT, seconds)
        self._schedule_pump(asyncio.get_running_loop())
