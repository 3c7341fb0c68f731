"""How the last hour went, by the audit: each minute's newest decisions, how long they took, who answered, who heard.

The audit keeps what every caller heard and how long the answer took, so no other port has to be reached for it, and the
person's own role says who may see it. A busy minute is sampled: its newest decisions stand for it. A minute that has
passed is asked for once, whoever looks.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from pretrade.audit.v1 import audit_pb2 as pb
from pretrade.client.enum_names import enum_name
from pretrade.console.calls import CallFailedError
from pretrade.decision.v1 import decision_pb2

MINUTES: Final = 60
SAMPLE: Final = 200
"""Decisions of a minute that are looked at, the newest first: its p99 then rests on two of them, the hour's on 120."""
_AT_ONCE: Final = 4
"""Minutes that are asked for at the same time. The audit has the next question then when it has answered one, and of
the 32 that may wait there most are left to others."""
_LOOK_SECONDS: Final = 0.5
"""After which a look asks for no further minutes: the page shows what is known, and looks again soon."""
_SETTLED_SECONDS: Final = 20.0
"""After a minute's end, by when its decisions are in the audit, and what became of their replies."""
_MINUTE: Final = 60
_REPLIED: Final = "replied"
_UNSETTLED: Final = "unsettled"

List = Callable[[pb.ListDecisionsRequest], Awaitable[pb.ListDecisionsResponse]]


@dataclass(frozen=True, slots=True)
class Minute:
    """The newest decisions of one minute."""

    used_us: tuple[int, ...] = ()
    """How long each answer took, sorted: from its order's arrival until it was handed over."""
    sources: Counter[str] = field(default_factory=Counter)
    actions: Counter[str] = field(default_factory=Counter)
    """What the callers heard."""
    in_time: int = 0
    """Answers that were handed over before their deadlines had passed."""
    settled: int = 0
    """Answers of which that is known."""
    is_whole: bool = True
    """False for a sample: the minute had more decisions."""
    problem: str = ""
    """What could not be read of it; empty when all is well."""

    @property
    def decisions(self) -> int:
        """How many were looked at."""
        return len(self.used_us)

    def used_at(self, share: float) -> float:
        """The time in microseconds that this share of the answers kept within; NaN without any."""
        return quantile(self.used_us, share)


@dataclass(frozen=True, slots=True)
class Summary:
    """The whole hour."""

    minute: Minute
    """All minutes together."""
    missing: int
    """Minutes that have not been asked for yet."""
    problem: str
    """What could not be read of the newest minute that could not be read whole; empty when all is well."""

    @property
    def in_time(self) -> float:
        """Share of the answers that were in time; NaN without any."""
        return self.minute.in_time / self.minute.settled if self.minute.settled else math.nan


class Hour:
    """The last hour, kept for all who look.

    Args:
        wall_clock: Seconds since the Unix epoch.
        monotonic: Seconds on a clock that never jumps.
    """

    def __init__(self, wall_clock: Callable[[], float], monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall_clock = wall_clock
        self._monotonic = monotonic
        self._minutes: dict[int, Minute] = {}
        self._final: set[int] = set()
        """Minutes that need not be asked for again."""
        self._lock = asyncio.Lock()

    async def look(self, ask: List) -> None:
        """Asks for what is missing, the newest first, and for the current minute anew, for half a second.

        Raises:
            CallFailedError: A minute has no answer; those that were answered before are known.
        """
        if self._lock.locked():  # somebody else's page is just asking
            return
        async with self._lock:
            newest = int(self._wall_clock() // _MINUTE)
            for old in [minute for minute in self._minutes if minute <= newest - MINUTES]:
                del self._minutes[old]
                self._final.discard(old)
            wanted = iter([minute for minute in range(newest, newest - MINUTES, -1) if minute not in self._final])
            until = self._monotonic() + _LOOK_SECONDS
            failures: list[CallFailedError] = []

            async def read_some() -> None:
                for minute in wanted:
                    try:
                        await self._read(minute, ask)
                    except CallFailedError as error:
                        failures.append(error)
                    if failures or self._monotonic() >= until:
                        return

            await asyncio.gather(*(read_some() for _ in range(_AT_ONCE)))
            if failures:
                raise failures[0]

    async def _read(self, minute: int, ask: List) -> None:
        asked_at = self._wall_clock()
        found = await ask(_request(minute))
        self._minutes[minute] = minute_of(found.decisions, is_whole=not found.next_page_token, problem=found.incomplete)
        if asked_at > (minute + 1) * _MINUTE + _SETTLED_SECONDS and not found.incomplete:
            self._final.add(minute)

    def summary(self) -> Summary:
        """All that is known of the hour, together."""
        known = self._minutes.values()
        together = Minute(
            used_us=tuple(sorted(used for one in known for used in one.used_us)),
            sources=sum((one.sources for one in known), Counter()),
            actions=sum((one.actions for one in known), Counter()),
            in_time=sum(one.in_time for one in known),
            settled=sum(one.settled for one in known),
            is_whole=all(one.is_whole for one in known),
        )
        problems = (self._minutes[minute].problem for minute in sorted(self._minutes, reverse=True))
        return Summary(together, MINUTES - len(self._minutes), next(filter(None, problems), ""))

    def series(self) -> dict[str, list[float | None]]:
        """The hour for a chart, the oldest minute first: Unix seconds, milliseconds, and decisions looked at."""
        newest = int(self._wall_clock() // _MINUTE)
        minutes = range(newest - MINUTES + 1, newest + 1)
        found = [self._minutes.get(minute, Minute()) for minute in minutes]
        return {
            "time": [float(minute * _MINUTE) for minute in minutes],
            "p50_ms": [_milliseconds(one.used_at(0.5)) for one in found],
            "p99_ms": [_milliseconds(one.used_at(0.99)) for one in found],
            "not_in_time": [_percent(one.settled - one.in_time, one.settled) for one in found],
        }


def minute_of(decisions: Iterable[pb.AuditedDecision], *, is_whole: bool, problem: str = "") -> Minute:
    """What some decisions of a minute say of it."""
    decided = list(decisions)
    settled = [one for one in decided if one.reply_status != _UNSETTLED]
    return Minute(
        used_us=tuple(sorted(one.packet.decision.budget.used_us for one in decided)),
        sources=Counter(enum_name(decision_pb2.Source, one.packet.decision.source) for one in decided),
        actions=Counter(enum_name(pb.HeardAction, one.heard_action) for one in decided),
        in_time=sum(one.reply_status == _REPLIED for one in settled),
        settled=len(settled),
        is_whole=is_whole,
        problem=problem,
    )


def quantile(ordered: Sequence[int], share: float) -> float:
    """The smallest value that this share of the values does not exceed; NaN without any."""
    if not ordered:
        return math.nan
    return float(ordered[max(0, math.ceil(share * len(ordered)) - 1)])


def _request(minute: int) -> pb.ListDecisionsRequest:
    request = pb.ListDecisionsRequest(page_size=SAMPLE)
    request.filter.since.FromDatetime(dt.datetime.fromtimestamp(minute * _MINUTE, dt.UTC))
    request.filter.until.FromDatetime(dt.datetime.fromtimestamp((minute + 1) * _MINUTE, dt.UTC))
    return request


def _milliseconds(microseconds: float) -> float | None:
    return None if math.isnan(microseconds) else microseconds / 1_000


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None
