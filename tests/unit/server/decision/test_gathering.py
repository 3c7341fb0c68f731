"""Orders that come in small bursts wait for others while nobody could answer them sooner, and never otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.plain_orders import busy_plane, orders_of
from support.planes import Plane
from support.scripted_replica import Script, answers
from support.waiting import until

from fallback.order import Order, Part
from feature_cache.features import MF1
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision import blocks as blocks_module
from server.decision import gathering
from server.decision.decided_block import DecidedRow
from server.decision.pending import Waited
from server.decision.promise import Promise
from server.inference.wire import ScoreBatch


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four orders are enough for a block here, and no order loses its patience, however slow the machine is."""
    monkeypatch.setattr(blocks_module, "LEAST", 4)
    monkeypatch.setattr(gathering, "_PATIENCE_SECONDS", 1_000.0)


class Model:
    """A model server that answers when the test says so."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        """Rows of each."""
        self.may_answer = asyncio.Semaphore(0)

    async def __call__(self, rows: list[bytes]) -> ScoreBatch:
        self.batches.append(len(rows))
        await self.may_answer.acquire()
        return await answers(0.75, 0.0)(rows)


@asynccontextmanager
async def patient_plane(path: Path, model: Script, **changes: Any) -> AsyncIterator[Plane]:
    """A server that waits for its model as long as the test takes, however slow the machine is."""
    async with busy_plane(path, model, answers(0.75), **changes) as p:
        settings = p.primary.batcher._settings.model_copy(
            update={"min_patience_seconds": 1_000.0, "max_patience_seconds": 1_000.0}
        )
        p.primary.batcher._settings = settings
        yield p


class Embedded:
    """A model in this process that likes every row."""

    name, version, threshold, expires_at, feature_set = "champion", "aa" * 8, 0.5, 0, MF1
    parts: tuple[Part, ...] = ()

    def scores_and_parts(self, rows: bytes) -> tuple[NDArray[np.float32], None]:
        return np.full(len(rows) // MF1.row_bytes, 0.75, dtype=np.float32), None


def begun(p: Plane, orders: Sequence[Order], allowed_seconds: float = 9.0) -> list[Waited]:
    """Orders of as many callers that came in one turn of the event loop."""
    now = p.clock()
    made = [p.dataplane.begin(order, now, now + allowed_seconds, in_company=True) for order in orders]
    assert all(isinstance(one, Promise) for one in made)
    return made  # type: ignore[return-value]


def held_commits(p: Plane, monkeypatch: pytest.MonkeyPatch) -> list[asyncio.Future[bool]]:
    """Has the test say when decisions are durable."""
    commits: list[asyncio.Future[bool]] = []

    def append(_batch: Any) -> asyncio.Future[bool]:
        commits.append(asyncio.get_running_loop().create_future())
        return commits[-1]

    monkeypatch.setattr(p.journal, "append_batch", append)
    return commits


async def turns(number: int = 3) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


def sizes(p: Plane) -> tuple[float, int]:
    """Orders in columns so far, and blocks."""
    counts, total = p.metrics.blocks.buckets()
    return total, int(counts[-1][1])


async def test_what_comes_while_a_batch_is_under_way_is_one_block_when_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    async with patient_plane(tmp_path, model) as p:
        commits = held_commits(p, monkeypatch)
        first, *later = (orders_of(Random(number), 5) for number in range(4))
        promises = begun(p, first)
        await turns()
        assert model.batches == [5]
        for burst in later:
            promises += begun(p, burst)
            await turns()
        assert len(p.dataplane._gathering) == 15
        model.may_answer.release()
        await until(lambda: commits and len(model.batches) > 1)
        assert model.batches == [5, 15]
        assert [commit.done() for commit in commits] == [False], "before the decisions of the first five are durable"
        model.may_answer.release()
        await until(lambda: len(commits) == 2)
        for commit in commits:
            commit.set_result(True)
        decided = await asyncio.gather(*promises)
        assert sizes(p) == (20, 2)
        assert all(isinstance(one, DecidedRow) for one in decided)


async def test_thirty_two_orders_wait_for_no_more(tmp_path: Path) -> None:
    model = Model()
    async with patient_plane(tmp_path, model) as p:
        promises = begun(p, orders_of(Random(1), 5))
        await turns()
        promises += begun(p, orders_of(Random(2), 31))
        await turns()
        assert len(p.dataplane._gathering) == 31
        promises += begun(p, orders_of(Random(3), 1))
        await turns()
        assert len(p.dataplane._gathering) == 0
        assert p.primary.batcher.queued == 32
        for _ in range(2):
            model.may_answer.release()
        await asyncio.gather(*promises)


async def test_no_order_waits_longer_than_its_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_PATIENCE_SECONDS", 0.002)
    model = Model()
    async with patient_plane(tmp_path, model) as p:
        promises = begun(p, orders_of(Random(1), 5))
        await turns()
        promises += begun(p, orders_of(Random(2), 6))
        await until(lambda: p.primary.batcher.queued == 6)
        assert model.batches == [5], "which is still under way"
        for _ in range(2):
            model.may_answer.release()
        await asyncio.gather(*promises)


async def test_orders_wait_for_nobody_where_the_model_is_free(tmp_path: Path) -> None:
    async with patient_plane(tmp_path, answers(0.75)) as p:
        promises = begun(p, orders_of(Random(1), 2))
        await asyncio.sleep(0)
        assert p.primary.batcher.queued == 2
        await asyncio.gather(*promises)


async def test_an_order_that_has_little_time_waits_for_nobody_and_takes_the_others_along(tmp_path: Path) -> None:
    model = Model()
    async with patient_plane(tmp_path, model) as p:
        promises = begun(p, orders_of(Random(1), 5))
        await turns()
        others = begun(p, orders_of(Random(2), 4))
        await turns()
        assert len(p.dataplane._gathering) == 4
        hurried = begun(p, orders_of(Random(3), 1), allowed_seconds=0.009)
        await turns()
        assert len(p.dataplane._gathering) == 0
        for _ in range(2):
            model.may_answer.release()
        await asyncio.gather(*promises, *others)
        await asyncio.gather(*hurried, return_exceptions=True)


async def test_a_caller_that_leaves_while_its_order_waits_gives_its_place_back(tmp_path: Path) -> None:
    model = Model()
    async with patient_plane(tmp_path, model) as p:
        promises = begun(p, orders_of(Random(1), 5))
        await turns()
        leaver, *others = begun(p, orders_of(Random(2), 5))
        await turns()
        p.dataplane.give_up(leaver)
        await turns()
        assert (p.admission.in_flight, p.metrics.cancelled) == (9, 1)
        for _ in range(2):
            model.may_answer.release()
        await asyncio.gather(*promises, *others)
        assert model.batches == [5, 4]
        assert p.admission.in_flight == 0


async def test_with_the_embedded_model_first_orders_wait_for_the_commit_that_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with patient_plane(tmp_path, answers(0.75), first_stage="embedded") as p:
        p.embedded.scorer = Embedded()
        commits = held_commits(p, monkeypatch)
        promises = begun(p, orders_of(Random(1), 5))
        await turns()
        assert len(commits) == 1
        for number in (2, 3):
            promises += begun(p, orders_of(Random(number), 5))
            await turns()
        assert (len(p.dataplane._gathering), len(commits)) == (10, 1)
        commits[0].set_result(True)
        await turns(6)
        assert len(commits) == 2
        commits[1].set_result(True)
        decided = await asyncio.gather(*promises)
        assert sizes(p) == (15, 2)
        assert {one.source for one in decided} == {pb.SOURCE_EMBEDDED}
