"""The metrics say how many orders were decided in columns, and of each other order why it was not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, get_args

import numpy as np
import pytest
from support.plain_orders import busy_plane, orders_of
from support.planes import Plane
from support.scripted_replica import answers, fails

from fallback.model_limits import UNKNOWN
from fallback.order import CallContext, Order
from feature_cache.features import MF1
from server.decision.metrics import Alone, DecisionMetrics, of_decisions
from server.errors import JournalError
from server.inference.outcome import Outcome

_COUNT = 12


def _unchanged(order: Order) -> None:
    """As a batch or a burst brings it."""


def _with_key(order: Order) -> None:
    message = order.message
    order.idempotency_key = message.idempotency_key = order.order_ref
    order.wire = message.SerializeToString()


def _with_features(order: Order) -> None:
    order.caller_features = np.zeros(len(MF1), dtype=np.float32)


def _with_trace(order: Order) -> None:
    order.context = CallContext(trace_id="ab" * 16)


def _raises(*_: object) -> Any:
    raise JournalError("it is full")


def _usual(p: Plane, patch: pytest.MonkeyPatch) -> None:
    """Nothing is unusual."""


def _mixed(p: Plane, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(p.champion, "settle_block", lambda _: False)


def _guarded(p: Plane, patch: pytest.MonkeyPatch) -> None:
    p.limits = UNKNOWN


def _with_bug(p: Plane, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(p.guards, "settle_block", _raises)


def _unwritten(p: Plane, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(p.journal, "append_batch", _raises)


async def _decide(p: Plane, orders: list[Order], in_company: bool = True) -> None:
    now = p.clock()
    begun = [p.dataplane.begin(order, now, now + 9.0, in_company=in_company) for order in orders]
    await asyncio.gather(*begun, return_exceptions=True)


@pytest.mark.parametrize(
    ("why", "change", "prepare"),
    [
        ("key", _with_key, _usual),
        ("features", _with_features, _usual),
        ("trace", _with_trace, _usual),
        ("mixed", _unchanged, _mixed),
        ("guards", _unchanged, _guarded),
        ("bug", _unchanged, _with_bug),
        ("audit", _unchanged, _unwritten),
    ],
)
async def test_an_order_that_is_decided_alone_is_counted_with_the_cause(
    why: Alone,
    change: Callable[[Order], None],
    prepare: Callable[[Plane, pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        orders = [replace(order, limit_price=100.0) for order in orders_of(Random(1), _COUNT)]
        for order in orders:
            change(order)
        prepare(p, monkeypatch)
        await _decide(p, orders)
        assert +p.metrics.alone == {why: _COUNT}
        assert p.metrics.blocks.buckets()[1] == 0


async def test_orders_without_a_score_leave_their_block(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, fails(Outcome.TRANSPORT), answers(0.75)) as p:
        await _decide(p, orders_of(Random(1), _COUNT))
        assert +p.metrics.alone == {"no_score": _COUNT}


async def test_orders_that_come_by_themselves_are_too_few_for_columns(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        lone, *few = orders_of(Random(1), 4)
        await _decide(p, [lone], in_company=False)
        await _decide(p, few)
        assert +p.metrics.alone == {"lone": 1, "few": 3}


async def test_the_orders_of_a_block_are_its_size(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        await _decide(p, orders_of(Random(1), _COUNT))
        await _decide(p, orders_of(Random(2), 20))
        assert not +p.metrics.alone
        families = {family.name: family.samples for family in of_decisions(p.metrics)}
    values = {(sample.name, *sample.labels.values()): sample.value for sample in families["pretrade_block_orders"]}
    assert values["pretrade_block_orders_count",] == 2
    assert values["pretrade_block_orders_sum",] == _COUNT + 20
    assert values["pretrade_block_orders_bucket", "16.0"] == 1
    assert values["pretrade_block_orders_bucket", "32.0"] == 2


def test_every_cause_is_there_from_the_start() -> None:
    families = {family.name: family.samples for family in of_decisions(DecisionMetrics())}
    counted = {sample.labels["why"]: sample.value for sample in families["pretrade_orders_alone"]}
    assert counted == dict.fromkeys(get_args(Alone), 0)
