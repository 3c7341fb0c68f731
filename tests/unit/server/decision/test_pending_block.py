"""Orders that are decided in columns get what each of them would have got by itself, whatever is met on the way."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.plain_orders import busy_plane, orders_of, scores
from support.planes import Plane, notes_in, packets_in
from support.scripted_replica import answers, hangs

from fallback.budget import BudgetSettings
from fallback.model_limits import limits_of
from fallback.order import Order
from feature_cache.compiled import compiled
from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.decided_block import DecidedBlock
from server.decision.pending_block import OneCall
from server.decision.record import Decided
from server.errors import DeadlineError
from server.inference.outcome import Outcome

_NARROW_SPREADS = {
    "features": ["spread_bps"],
    "patterns": [0],
    "low": [-1.0],
    "high": [1.0],
    "values": [[0.0, 1.0]],
    "scores": [[-1.0, 1.0]],
    "whitening": [[1.0]],
    "distance": 30.0,
    "most_same": [10],
    "most_turned": [40.0],
}
"""What a model has seen that knows less than the market here brings."""


async def in_columns(p: Plane, orders: Sequence[Order], seconds: float = 9.0) -> OneCall:
    arrived = p.clock()
    begun = p.dataplane.begin_together(orders, arrived, arrived + seconds)
    assert begun is not None
    await begun.ended()
    (block,) = begun.blocks
    assert not begun.alone, "they are decided in columns"
    return block


async def results(block: OneCall) -> list[pb.Decision]:
    """The decision of each order, in the order of the call."""
    found = []
    for outcome in block.outcomes():
        wire = outcome if isinstance(outcome, bytes) else outcome.result().wire
        found.append(pb.Decision.FromString(wire))
    return found


async def test_the_entry_of_a_block_is_the_same_compiled_and_plain(tmp_path: Path) -> None:
    module = compiled("server.decision.entry_wire_c")
    if module is None:
        pytest.skip("nothing is compiled here")
    random = Random(1)
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        block = await in_columns(p, orders_of(random, 5))
        assert block.decided is not None
        batch = p.packets.batch()
        batch.add_block(block.decided)
        compiled_entry = batch.entry()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("server.decision.packets._compiled", None)
            assert batch.entry() == compiled_entry


async def test_a_block_that_has_lost_orders_does_not_disturb_the_next_ones(tmp_path: Path) -> None:
    random = Random(4)
    async with busy_plane(tmp_path, scores(random), answers(0.75)) as p:
        for _ in range(5):
            block = await in_columns(p, orders_of(random, 20))
            assert 0 < block.in_block < 20
            assert all(one.exception() is None for one in block.apart.values())
        assert (p.chain.broken.total(), p.admission.in_flight) == (0, 0)


async def test_a_caller_that_leaves_while_the_model_is_asked_takes_its_orders_along(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, hangs, hangs) as p:
        arrived = p.clock()
        begun = p.dataplane.begin_together(orders_of(Random(1), 8), arrived, None)
        await asyncio.sleep(0)
        assert p.admission.in_flight == 8
        assert begun is not None
        assert begun.blocks
        p.dataplane.give_up_together(begun)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (p.admission.in_flight, p.metrics.cancelled) == (0, 8)


async def test_a_caller_that_leaves_when_its_orders_have_just_failed_gives_their_places_back_once(
    tmp_path: Path,
) -> None:
    async with busy_plane(tmp_path, hangs, hangs) as p:
        begun = p.dataplane.begin_together(orders_of(Random(1), 8), p.clock(), None)
        assert begun is not None
        (block,) = begun.blocks
        await asyncio.sleep(0)
        for place in range(6):
            block.put_failure(place, Outcome.TIMEOUT)
        assert block.in_block == 2
        p.dataplane.give_up_together(begun)
        for _ in range(5):
            await asyncio.sleep(0)
        assert (p.admission.in_flight, p.metrics.cancelled) == (0, 8)


async def test_a_caller_that_leaves_before_the_audit_is_done_has_heard_none_of_it(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        arrived = p.clock()
        begun = p.dataplane.begin_together(orders_of(Random(1), 8), arrived, None)
        assert begun is not None
        assert begun.blocks
        async with asyncio.timeout(10):
            while not p.replies.owed:  # noqa: ASYNC110 - a plain attribute
                await asyncio.sleep(0)
        p.dataplane.give_up_together(begun)
        async with asyncio.timeout(10):
            while p.replies.owed or p.replies.waiting:  # noqa: ASYNC110 - plain attributes
                await asyncio.sleep(0.001)
        assert (p.admission.in_flight, p.metrics.cancelled) == (0, 8)
    ids = {packet.decision.decision_id for packet in packets_in(tmp_path)}
    assert {note.decision_id for note in notes_in(tmp_path)} == ids
    assert len(ids) == 8


async def test_what_the_caller_of_a_block_has_heard_is_noted_nowhere_and_what_it_has_not_is(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        heard = await in_columns(p, orders_of(Random(1), 4))
        unheard = await in_columns(p, orders_of(Random(2), 4))
        assert p.replies.owed == 8
        p.dataplane.heard(list(heard.decisions()))
        assert p.replies.owed == 4
        assert unheard.decided is not None
        p.dataplane.unheard(unheard.decided.apart()[0], "deadline")
        async with asyncio.timeout(10):
            while p.replies.waiting:  # noqa: ASYNC110 - a plain attribute
                await asyncio.sleep(0.001)
        assert p.replies.owed == 4, "they are held until all of them are settled"
        for decided in unheard.decided.apart()[1:]:
            p.dataplane.unheard(decided, "deadline")
        async with asyncio.timeout(10):
            while p.replies.owed or p.replies.waiting:  # noqa: ASYNC110 - plain attributes
                await asyncio.sleep(0.001)
        assert p.metrics.late == 4
    assert sorted(note.decision_id for note in notes_in(tmp_path)) == sorted(unheard.decided.ids)


async def test_no_order_of_a_block_trades_when_the_audit_cannot_take_it(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75), journal_mebibytes=1) as p:
        note = packet_pb2.ReplyUnconfirmed(decision_id="a" * 2**20)
        await p.journal.append(packet_pb2.JournalEntry(reply_unconfirmed=note).SerializeToString())
        decisions = await results(await in_columns(p, orders_of(Random(3), 6)))
        assert {decision.action for decision in decisions} == {pb.ACTION_ABSTAIN}
        assert {decision.reasons[-1] for decision in decisions} == {pb.REASON_CODE_AUDIT_UNAVAILABLE}
        await asyncio.sleep(0)
        assert (p.replies.owed, p.admission.in_flight) == (0, 0)


async def test_no_order_of_a_block_trades_when_the_audit_is_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = BudgetSettings(cap_seconds=0.5, audit_reserve_seconds=0.1, reply_reserve_seconds=0.05)
    async with busy_plane(tmp_path, answers(0.75), answers(0.75), budget=budget) as p:
        never: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        monkeypatch.setattr(p.journal, "append_batch", lambda batch: never)
        block = await in_columns(p, orders_of(Random(3), 6))
        outcomes = [one.exception() or one.result() for one in block.apart.values()]
        assert len(outcomes) == 6
        assert all(isinstance(one, DeadlineError) or (isinstance(one, Decided) and one.abstained) for one in outcomes)
        assert any(isinstance(one, Decided) and one.action == pb.ACTION_ABSTAIN for one in outcomes)
        never.set_result(True)
        await asyncio.sleep(0)
        assert p.admission.in_flight == 0


async def test_what_the_guards_object_to_stays_in_columns(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        p.state = admin_pb2.TRADING_STATE_HALTED
        block = await in_columns(p, orders_of(Random(1), 3))
        decisions = await results(block)
        assert block.in_block == 3
        assert {one.action for one in decisions} == {pb.ACTION_NO_TRADE}
        assert {tuple(one.reasons)[:2] for one in decisions} == {
            (pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD, pb.REASON_CODE_TRADING_HALTED)
        }
        assert p.metrics.reasons[pb.REASON_CODE_TRADING_HALTED] == 3
        assert p.admission.in_flight == 0
        await p.journal.flush()
    assert [list(packet.decision.reasons) for packet in packets_in(tmp_path)] == [
        list(one.reasons) for one in decisions
    ]


async def test_a_score_that_no_model_should_have_given_is_not_used_again(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        p.limits = limits_of({"domain": _NARROW_SPREADS})
        block = await in_columns(p, orders_of(Random(1), 6))
        assert block.in_block == 6
        assert all(pb.REASON_CODE_OUT_OF_DOMAIN in one.reasons for one in await results(block))
        cached: Any = p.dataplane._following._cached_scores
        assert not cached._scores


async def test_orders_stay_in_columns_when_the_chain_is_changed_while_the_server_runs(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        p.chain.ask_in_order(("model", "rules"))
        block = await in_columns(p, orders_of(Random(1), 3))
        assert block.in_block == 3
        p.chain.ask_in_order(("model", "cached_score", "rules"))
        await in_columns(p, orders_of(Random(1), 1))
        await p.journal.flush()
    *changed, usual = packets_in(tmp_path)
    assert [list(packet.chain_stages) for packet in changed] == [["model", "rules"]] * 3
    assert not usual.chain_stages


@pytest.mark.parametrize("why", ["stages", "stale", "hedge", "no features"])
async def test_what_is_not_the_usual_case_is_not_begun_in_columns(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        if why == "stages":
            p.chain.ask_in_order(("rules", "model"))
        elif why == "stale":
            monkeypatch.setattr(type(p.control), "stale", True)
        elif why == "hedge":
            monkeypatch.setattr(p.champion, "_hedge", True)
        else:
            p.feature_cache._entries.clear()
        arrived = p.clock()
        begun = p.dataplane.begin_together(orders_of(Random(1), 3), arrived, arrived + 9)
        assert begun is not None
        assert not begun.blocks
        assert len([await one for one in begun.alone.values()]) == 3
        assert p.admission.in_flight == 0


async def test_a_bug_that_one_order_meets_after_its_decision_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        orders = orders_of(Random(1), 6)
        remember = p.dataplane._following._cached_scores.remember

        def broken(case: Any, answer: Any, decision_id: str) -> None:
            if case.order is orders[-1]:
                raise RuntimeError("a bug")
            remember(case, answer, decision_id)

        def all_broken(_block: Any, _ids: Any) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(p.dataplane._following._cached_scores, "remember", broken)
        monkeypatch.setattr(p.dataplane._following._cached_scores, "remember_block", all_broken)
        block = await in_columns(p, orders)
        ended = list(block.apart.values())
        assert [type(one.exception()) for one in ended] == [type(None)] * 5 + [RuntimeError]
        stages = [use.stage for use in pb.Decision.FromString(ended[0].result().wire).budget.stages]
        assert stages.count(pb.STAGE_AUDIT) == 1
        await asyncio.sleep(0)
        assert (p.objective.met, p.admission.in_flight, p.replies.owed) == (5, 0, 6)


async def test_a_bug_that_a_block_meets_after_its_decisions_mirrors_none_of_them_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:

        def broken(*_: Any) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(p.control, "shadow", True)
        monkeypatch.setattr(p.dataplane._following._reports, "decided_block", broken)
        block = await in_columns(p, orders_of(Random(1), 6))
        assert len(block.apart) == 6
        assert p.shadow.offered == 6


async def test_a_block_that_was_answered_leaves_the_collector_nothing(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                block = await in_columns(p, orders_of(Random(1), 6))
                (decided,) = block.decisions()
                p.dataplane.heard([decided])
                block.decided = None  # as the servicer does once it has written the reply
            del block, decided
            await p.journal.flush()
            await asyncio.sleep(0)
            left = [one for one in gc.get_objects() if type(one) in (OneCall, DecidedBlock)]
        finally:
            gc.enable()
        assert len(left) <= 2, "the last one, which deadlines may still know"
