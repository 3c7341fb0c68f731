"""A micro-batcher on an event loop in virtual time, with a model server whose answers the test gives."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np

from server.inference.batcher import BatcherSettings, MicroBatcher
from server.inference.flight import Report
from server.inference.outcome import BatchFailedError, Outcome
from server.inference.rows import Lane, Result, Row, Scored
from server.inference.wire import ModelIdentity, ScoreBatch
from server.timing.latency import LatencyWindow
from support.virtual_time import VirtualTimeLoop

MODEL = ModelIdentity("champion", "00" * 8, 0.5, 0)
ONE_SLOT = BatcherSettings(slots=1, max_rows=4, max_in_flight=3)


class Call:
    """One batch at the model server, until the test answers it."""

    def __init__(self, rows: list[bytes]) -> None:
        self.rows = rows
        self.answer: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()

    def answer_each_its_own(self) -> None:
        self.answer.set_result([score_of(row) for row in self.rows])

    def fail(self, outcome: Outcome) -> None:
        self.answer.set_exception(BatchFailedError(outcome, "as the test wants it"))


class ModelServer:
    """What the batcher sends to, and what it reports."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.reports: list[tuple[Outcome, float]] = []
        self.from_callers: list[bool] = []
        """Whether a caller brought a row of the batch, a batch each."""
        self.has_parts = False
        self.shadows: list[bool] = []
        """Whether the batch held shadow rows, a batch each."""

    async def send(self, rows: list[bytes], traceparent: str) -> ScoreBatch:
        call = Call(rows)
        self.calls.append(call)
        scores = np.array(await call.answer, dtype=np.float32)
        return ScoreBatch(MODEL, scores, np.stack([scores / 2, scores / 4], axis=1) if self.has_parts else None)

    @property
    def outcomes(self) -> list[Outcome]:
        """Outcomes of the batches that have ended, in order."""
        return [outcome for outcome, _ in self.reports]

    def begin(self, from_caller: bool, shadow: bool) -> Report:
        self.from_callers.append(from_caller)
        self.shadows.append(shadow)
        return lambda outcome, seconds: self.reports.append((outcome, seconds))


class Bench:
    """A batcher, its model server and their time."""

    def __init__(self, batcher_settings: BatcherSettings) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        self.loop = loop
        self.server = ModelServer()
        self.latency = LatencyWindow(loop.time, prior_seconds=0.001)
        self.under_way = 0
        """Orders that the server says it is deciding."""
        self.batcher = MicroBatcher(
            self.server.send,
            self.server.begin,
            self.latency,
            batcher_settings,
            loop.time,
            under_way=lambda: self.under_way,
        )
        self.problems: list[str] = []
        loop.set_exception_handler(lambda _loop, context: self.problems.append(context["message"]))

    def submit(self, number: int, timeout_seconds: float = 0.05, lane: Lane = Lane.LIVE) -> asyncio.Future[Result]:
        return self.batcher.submit(payload(number), self.loop.time() + timeout_seconds, lane)

    def submit_together(self, *timeouts_seconds: float) -> list[asyncio.Future[Result]]:
        """Rows numbered from 1 that come at one instant, each with its own time."""
        now = self.loop.time()
        futures: list[asyncio.Future[Result]] = [self.loop.create_future() for _ in timeouts_seconds]
        rows = [
            Row(payload(number), now + seconds, future, now)
            for number, (seconds, future) in enumerate(zip(timeouts_seconds, futures, strict=True), 1)
        ]
        self.batcher.submit_together(rows)
        return futures

    def submit_shadow(self, number: int, from_caller: bool = False) -> asyncio.Future[Result] | None:
        """The shadow row's future; None when it was shed."""
        future: asyncio.Future[Result] = self.loop.create_future()
        row = Row(payload(number), math.inf, future, from_caller=from_caller)
        return future if self.batcher.submit_shadow([row]) else None

    async def calls(self, number: int) -> list[Call]:
        """The calls so far, once there are as many and everything that can happen now has happened."""
        await settle()
        assert len(self.server.calls) == number
        return self.server.calls


def payload(number: int) -> bytes:
    return number.to_bytes(4, "little")


def score_of(row: bytes) -> float:
    return int.from_bytes(row, "little") / 1_024


def scored(number: int) -> Scored:
    return Scored(score_of(payload(number)), MODEL)


async def settle() -> None:
    """Lets everything run that needs no passing of time."""
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def bench(batcher_settings: BatcherSettings = ONE_SLOT) -> AsyncIterator[Bench]:
    """A bench on which nothing may go unnoticed: no unhandled exception, nothing left in flight."""
    made = Bench(batcher_settings)
    try:
        yield made
    finally:
        await made.batcher.close()
    assert made.batcher.in_flight == 0
    assert made.problems == []
