"""Who waits when a server has more orders than it can decide."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.request_path import PATIENT, order, request_path
from support.waiting import until

from pretrade.decision.v1 import decision_pb2 as pb
from server.decision import admission
from server.errors import OverloadedError


async def test_an_order_without_a_deadline_waits_for_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "PATIENCE_SECONDS", 60.0)
    async with request_path(tmp_path, PATIENT) as p:
        p.admission._limit = 2.0
        p.gate.open = asyncio.Semaphore(0)
        tasks = [asyncio.create_task(p.decide(order("first")))]
        await until(lambda: p.admission.in_flight == 1)
        tasks.append(asyncio.create_task(p.decide(order("waits"))))
        await until(lambda: p.admission.waiting == 1)
        tasks.append(asyncio.create_task(p.decide(order("with a deadline"), timeout_seconds=60.0)))
        await until(lambda: p.admission.in_flight == 2)
        own = order("with a deadline of its own")
        own.timeout.FromSeconds(60)
        reducing = order("reduces", reduce_only=True)
        for message, timeout_seconds in ((order("late"), 60.0), (own, None), (reducing, None)):
            with pytest.raises(OverloadedError):
                await p.decide(message, timeout_seconds)
        assert p.admission.waiting == 1
        for _ in tasks:
            p.gate.open.release()
        decisions = await asyncio.gather(*tasks)
    assert [decision.order_ref for decision in decisions] == ["first", "waits", "with a deadline"]


@pytest.mark.parametrize(("orders", "weight"), [(1, 1), (3, 3), (200, 64)])
async def test_a_batch_weighs_as_much_as_its_orders_that_are_decided_at_once(
    tmp_path: Path, orders: int, weight: int
) -> None:
    async with request_path(tmp_path, PATIENT) as p:
        call = p.call()
        assert call.orders == 1
        reply = await p.servicer.DecideBatch(
            pb.DecideBatchRequest(orders=[order(f"{number}") for number in range(orders)]), call
        )
        p.servicer.sent(reply)
        assert call.orders == weight
