"""The request path on its real parts, but for the model server, which is the test's. No socket is opened."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cases import new_case
from support.planes import (
    NO_LIMITS,
    PATIENT,
    Plane,
    market,
    notes_in,
    packets_in,
    plane,
)
from support.scripted_replica import answers, fails, hangs

from fallback.budget import BudgetSettings
from fallback.guards import GuardSettings
from fallback.model_limits import LimitGuards, ModelLimits, limits_of
from feature_cache import features
from feature_cache.store.codec import BookState, FeatureSnapshot, encode
from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.canary.burn import Objective, SloSettings
from server.decision.shared_keys import PLACES, make_memory
from server.errors import DeadlineError, KeyReusedError, OverloadedError
from server.inference.outcome import Outcome
from server.inference.wire import ModelIdentity, ScoreBatch


def ledger(decision: pb.Decision) -> list[tuple[pb.Stage.ValueType, pb.Degradation.ValueType]]:
    """(stage, why it was passed over)."""
    return [(use.stage, use.skipped) for use in decision.budget.stages]


async def test_the_ledger_is_in_the_reply_the_audit_row_and_the_metrics(tmp_path: Path) -> None:
    async with plane(tmp_path, fails(Outcome.TRANSPORT), answers(0.75)) as p:
        decision = await p.decide()
        assert (decision.action, decision.source) == (pb.ACTION_TRADE, pb.SOURCE_SECONDARY)
        stages = [
            pb.STAGE_ADMISSION,
            pb.STAGE_FEATURES,
            pb.STAGE_PRIMARY,
            pb.STAGE_SECONDARY,
            pb.STAGE_GUARDS,
            pb.STAGE_AUDIT,
        ]
        assert ledger(decision) == [(stage, pb.DEGRADATION_UNSPECIFIED) for stage in stages]
        assert all(use.used_us < use.allowed_us for use in decision.budget.stages)
        assert sum(use.used_us for use in decision.budget.stages) <= decision.budget.used_us
        (packet,) = packets_in(tmp_path)
        assert list(packet.decision.budget.stages) == list(decision.budget.stages)[:-1], "all but its own cost"
        for stage in stages:
            for histogram in (p.metrics.stages[stage], p.metrics.allowances[stage]):
                buckets, _ = histogram.buckets()
                assert buckets[-1] == ("+Inf", 1.0)
        _, allowed = p.metrics.allowances[pb.STAGE_AUDIT].buckets()
        assert allowed <= PATIENT.cap_seconds - PATIENT.reply_reserve_seconds, "the reply's reserve is not lent"


async def test_a_slow_audit_leaves_the_models_less_of_the_time_but_never_less_than_half(tmp_path: Path) -> None:
    budget = BudgetSettings(cap_seconds=10, audit_reserve_seconds=0.002, reply_reserve_seconds=0.001)
    async with plane(tmp_path, fails(Outcome.TRANSPORT), answers(0.75), budget) as p:
        first = await p.decide(4.0)
        assert allowed_to(first, pb.STAGE_SECONDARY) > 3.0
        for audit_seconds, least, most in ((1.0, 2.0, 3.0), (60.0, 1.5, 2.0)):
            for _ in range(500):
                p.dataplane._recorder.times.add(audit_seconds)
            decision = await p.decide(4.0)
            assert least < allowed_to(decision, pb.STAGE_SECONDARY) < most


async def test_a_late_event_loop_leaves_the_audit_less_of_the_time_but_not_less_than_three_quarters(
    tmp_path: Path,
) -> None:
    budget = BudgetSettings(cap_seconds=10, audit_reserve_seconds=0.002, reply_reserve_seconds=0.001)
    async with plane(tmp_path, answers(0.75), answers(0.75), budget) as p:
        for late_seconds, least, most in ((0.0, 3.5, 4.0), (0.5, 3.2, 3.5), (60.0, 2.7, 3.0)):
            p.loop_lag.p95 = late_seconds
            assert least < allowed_to(await p.decide(4.0), pb.STAGE_AUDIT) <= most


async def test_a_lone_order_meets_the_audit_as_slow_as_it_was_some_seconds_ago(tmp_path: Path) -> None:
    budget = BudgetSettings(cap_seconds=10, audit_reserve_seconds=0.002, reply_reserve_seconds=0.001)
    async with plane(tmp_path, fails(Outcome.TRANSPORT), answers(0.75), budget) as p:
        times, loop = p.dataplane._recorder.times, asyncio.get_running_loop()
        times._clock = lambda: loop.time() - 8
        times.add(1.0)
        times._clock = loop.time
        assert 2.0 < allowed_to(await p.decide(4.0), pb.STAGE_SECONDARY) < 3.0


async def test_a_model_attempt_leaves_what_its_own_end_may_be_late_by(tmp_path: Path) -> None:
    budget = BudgetSettings(cap_seconds=10, audit_reserve_seconds=0.002, reply_reserve_seconds=0.001)
    async with plane(tmp_path, fails(Outcome.TRANSPORT), answers(0.75), budget) as p:
        for late_seconds, least, most in ((0.0, 3.5, 4.0), (1.0, 2.5, 3.0), (60.0, 1.5, 2.0)):
            p.loop_lag.p99 = late_seconds
            assert least < allowed_to(await p.decide(4.0), pb.STAGE_SECONDARY) <= most


def allowed_to(decision: pb.Decision, stage: pb.Stage.ValueType) -> float:
    return next(use.allowed_us for use in decision.budget.stages if use.stage == stage) / 1e6


async def test_a_stage_skipped_for_lack_of_time_says_so_everywhere(tmp_path: Path) -> None:
    async with plane(tmp_path, answers(0.75), answers(0.75)) as p:
        for replica in (p.primary, p.secondary):
            for _ in range(3):
                replica.latency.add(9.0)
        decision = await p.decide(timeout_seconds=5)
        assert decision.source == pb.SOURCE_RULES
        no_time = pb.DEGRADATION_NO_TIME_FOR_MODEL
        assert ledger(decision)[2:4] == [(pb.STAGE_PRIMARY, no_time), (pb.STAGE_SECONDARY, no_time)]
        assert list(decision.degradations).count(no_time) == 1
        (packet,) = packets_in(tmp_path)
        assert ledger(packet.decision) == ledger(decision)[:-1]
        assert p.metrics.skips == {(pb.STAGE_PRIMARY, no_time): 1, (pb.STAGE_SECONDARY, no_time): 1}
        assert (p.primary.calls, p.secondary.calls) == (0, 0)


async def test_an_order_beyond_the_limit_is_refused_and_one_that_reduces_is_not(tmp_path: Path) -> None:
    async with plane(tmp_path, hangs, hangs) as p:
        first = asyncio.create_task(p.decide())
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await p.decide()
        second = asyncio.create_task(p.decide(reduce_only=True))
        await asyncio.sleep(0)
        assert (p.admission.in_flight, p.admission.shed) == (2, 1)
        first.cancel()
        second.cancel()
        await asyncio.wait((first, second))
        assert p.admission.in_flight == 0
        assert p.metrics.cancelled == 2


async def test_orders_that_no_model_could_score_in_time_lower_the_limit(tmp_path: Path) -> None:
    async with plane(tmp_path, answers(0.75), answers(0.75)) as p:
        for _ in range(30):
            await p.decide()
        assert p.admission.limit == 2
        for replica in (p.primary, p.secondary):
            for _ in range(200):
                replica.latency.add(9.0)
        async with asyncio.timeout(10):
            while p.admission.limit == 2:
                assert (await p.decide(timeout_seconds=5)).source == pb.SOURCE_RULES


async def test_an_order_too_late_on_arrival_is_not_decided(tmp_path: Path) -> None:
    async with plane(tmp_path, answers(0.75), answers(0.75)) as p:
        with pytest.raises(DeadlineError):
            await p.decide(timeout_seconds=0)
        assert (p.metrics.late, p.primary.calls, packets_in(tmp_path)) == (1, 0, [])


@pytest.mark.parametrize(
    ("late_seconds", "degradation"),
    [
        (-1.27, None),
        (0.1, None),
        (4.0, pb.DEGRADATION_FEATURES_STALE),
        (60.0, pb.DEGRADATION_FEATURES_MISSING),
    ],
)
@pytest.mark.fault("C7", "A feed is late all the time", "ABSTAIN with FEATURES_STALE, then with FEATURES_MISSING.")
async def test_a_feed_that_is_late_beyond_the_clocks_offset_decides_nothing_and_the_decision_says_so(
    tmp_path: Path, late_seconds: float, degradation: pb.Degradation.ValueType | None
) -> None:
    async with plane(tmp_path, answers(0.75), answers(0.75)) as p:
        assert p.feature_cache.accept(encode(market(late_seconds))) == (late_seconds < 10)
        decision = await p.decide(own_features=False)
        assert list(decision.degradations)[:1] == ([degradation] if degradation else [])
        assert (decision.action == pb.ACTION_TRADE) == (degradation is None)


@pytest.mark.parametrize("own_book_age_ms", [1_001.0, 3_600_000.0, math.nan])
async def test_features_that_the_caller_brought_too_late_decide_nothing(tmp_path: Path, own_book_age_ms: float) -> None:
    async with plane(tmp_path, answers(0.75), answers(0.75)) as p:
        p.feature_cache.accept(encode(market(0.1)))
        assert (await p.decide()).action == pb.ACTION_TRADE
        stale = await p.decide(own_book_age_ms=own_book_age_ms)
        assert (stale.action, stale.source) == (pb.ACTION_ABSTAIN, pb.SOURCE_NONE)
        assert stale.reasons == [pb.REASON_CODE_NO_SOURCE, pb.REASON_CODE_FEATURES_STALE]
        assert pb.DEGRADATION_FEATURES_STALE in stale.degradations


async def test_only_calls_that_give_a_model_a_fair_chance_count_towards_the_objective(tmp_path: Path) -> None:
    async with plane(tmp_path, answers(0.75), answers(0.75)) as p:

        async def counted(**asked: Any) -> tuple[int, int]:
            before = p.objective.met, p.objective.missed
            with contextlib.suppress(DeadlineError):
                await p.decide(**asked)
            return p.objective.met - before[0], p.objective.missed - before[1]

        assert await counted(own_features=False) == (0, 0), "the server has no features of the instrument"
        p.feature_cache.accept(encode(market(0.1)))
        assert await counted(own_features=False) == (1, 0)
        assert await counted(own_features=True) == (0, 0)
        p.primary.script = p.secondary.script = fails(Outcome.TRANSPORT)
        assert await counted(own_features=False) == (0, 1)
        assert await counted(own_features=True) == (0, 0)
        for too_little in (0.0, 1e-9, 0.019):
            assert await counted(own_features=False, timeout_seconds=too_little) == (0, 0)


@pytest.mark.parametrize(("cap_seconds", "counts"), [(0.05, False), (0.01, True), (0.3, False)])
def test_a_call_that_allows_all_that_the_server_grants_counts(cap_seconds: float, counts: bool) -> None:
    objective = Objective(SloSettings(min_allowed_seconds=0.02), cap_seconds)
    for arrived in (0.1, 1_234.567, 98_765.4321):
        assert objective.counts(new_case(arrived=arrived, timeout_seconds=cap_seconds))
        assert objective.counts(new_case(arrived=arrived, timeout_seconds=0.01)) == counts


async def test_features_of_the_callers_own_need_none_of_the_servers(tmp_path: Path) -> None:
    async with plane(tmp_path, answers(0.75), answers(0.75)) as p:
        decision = await p.decide(own_book_age_ms=999.0)
        assert (decision.action, list(decision.degradations)) == (
            pb.ACTION_TRADE,
            [pb.DEGRADATION_FEATURES_MISSING],
        )


@pytest.mark.parametrize("book_age_ms", [math.nan, -1e9, -math.inf, math.inf])
async def test_a_vector_whose_books_age_is_impossible_decides_nothing(tmp_path: Path, book_age_ms: float) -> None:
    sound = market(0.1)
    values = sound.values.copy()
    values[features.INDEX["book_age_ms"]] = book_age_ms
    async with plane(tmp_path, answers(0.75), answers(0.75)) as p:
        assert p.feature_cache.accept(encode(dataclasses.replace(sound, values=values)))
        decision = await p.decide(own_features=False)
        assert (decision.action, decision.source) == (pb.ACTION_ABSTAIN, pb.SOURCE_NONE)
        assert decision.reasons[-1] == pb.REASON_CODE_FEATURES_STALE


async def test_a_score_whose_decision_is_not_in_the_audit_is_not_used_again(tmp_path: Path) -> None:
    async with plane(tmp_path, answers(0.75), fails(Outcome.TRANSPORT), journal_mebibytes=1) as p:
        p.feature_cache.accept(encode(market(0.1)))
        note = packet_pb2.ReplyUnconfirmed(decision_id="a" * 2**20)
        await p.journal.append(packet_pb2.JournalEntry(reply_unconfirmed=note).SerializeToString())
        unaudited = await p.decide(own_features=False)
        assert (unaudited.action, unaudited.reasons[-1]) == (pb.ACTION_ABSTAIN, pb.REASON_CODE_AUDIT_UNAVAILABLE)
        p.journal.trim(p.journal.position)
        await p.journal.flush()
        p.primary.script = fails(Outcome.TRANSPORT)
        assert (await p.decide(own_features=False)).source == pb.SOURCE_NONE
        p.primary.script = answers(0.75)
        audited = await p.decide(own_features=False)
        assert audited.source == pb.SOURCE_PRIMARY
        p.primary.script = fails(Outcome.TRANSPORT)
        again = await p.decide(own_features=False)
        assert again.source == pb.SOURCE_CACHED_SCORE
    (packet,) = [one for one in packets_in(tmp_path) if one.decision.decision_id == again.decision_id]
    assert packet.cached_from_decision_id == audited.decision_id


def seen(most_bps: float) -> ModelLimits:
    """Those of a model that looks at the spread, and has seen up to so much of it."""
    described = {
        "features": ["spread_bps"],
        "patterns": [0],
        "low": [-1.0],
        "high": [most_bps],
        "values": [[0.0, 1.0]],
        "scores": [[-1.0, 1.0]],
        "whitening": [[1.0]],
        "distance": 30.0,
        "most_same": [10],
        "most_turned": [40.0],
    }
    return limits_of({"domain": described})


def wide(bps: float) -> FeatureSnapshot:
    sound = market(0.1)
    values = sound.values.copy()
    values[features.INDEX["spread_bps"]] = bps
    return dataclasses.replace(sound, values=values)


async def test_a_score_of_features_that_the_model_has_not_seen_is_not_used_again(tmp_path: Path) -> None:
    async with plane(tmp_path, answers(0.75), fails(Outcome.TRANSPORT)) as p:
        p.limits = seen(40.0)
        p.feature_cache.accept(encode(wide(41.0)))
        outside = await p.decide(own_features=False)
        assert (outside.action, outside.reasons[-1]) == (pb.ACTION_ABSTAIN, pb.REASON_CODE_OUT_OF_DOMAIN)
        p.primary.script = fails(Outcome.TRANSPORT)
        assert (await p.decide(own_features=False)).source == pb.SOURCE_NONE
        p.primary.script = answers(0.75)
        p.feature_cache.accept(encode(wide(39.0)))
        assert (await p.decide(own_features=False)).action == pb.ACTION_TRADE
        p.primary.script = fails(Outcome.TRANSPORT)
        assert (await p.decide(own_features=False)).source == pb.SOURCE_CACHED_SCORE


async def test_a_bug_in_looking_at_a_models_limits_costs_no_answer_and_the_decision_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise ZeroDivisionError

    async with plane(tmp_path, answers(0.75), answers(0.75), max_in_flight=8) as p:
        first = await p.decide(key="k")
        monkeypatch.setattr(LimitGuards, "objections", breaks)
        for decision in await asyncio.gather(p.decide(), p.decide()):
            assert decision.action == pb.ACTION_TRADE
            assert decision.degradations[-1] == pb.DEGRADATION_MODEL_LIMITS_UNKNOWN
        assert await p.decide(key="k") == first
    told = [one.decision.degradations[-1] for one in packets_in(tmp_path)[1:]]
    assert told == [pb.DEGRADATION_MODEL_LIMITS_UNKNOWN] * 2


def stripped(decision: pb.Decision) -> pb.Decision:
    """A decision as far as a repeat may hear it otherwise: without action, reasons and control version."""
    copy = pb.Decision()
    copy.CopyFrom(decision)
    for field in ("action", "reasons", "control_version"):
        copy.ClearField(field)
    return copy


async def test_a_repeat_hears_the_same_decision_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    async with plane(tmp_path, answers(0.75), answers(0.75)) as p:
        p.guards.configure(NO_LIMITS.model_copy(update={"max_decisions_per_second": 1.0}))
        first = await p.decide(key="k")
        assert first.action == pb.ACTION_TRADE
        assert [await p.decide(key="k") for _ in range(5)] == [first] * 5, "a repeat counts for no rate"
        assert (await p.decide(key="another")).reasons[-1] == pb.REASON_CODE_STRATEGY_RATE
        assert (p.idempotency.repeated, p.idempotency.withdrawn, p.primary.calls) == (5, 0, 2)
        assert sum(p.metrics.decisions.values()) == 2
    assert len(packets_in(tmp_path)) == 2
    assert notes_in(tmp_path) == []


@pytest.mark.fault(
    "D5",
    "Trading is halted between a call and its repeat, then resumed",
    "The repeat gets NO_TRADE, and so does every later one.",
)
async def test_after_a_halt_no_repeat_hears_trade_and_after_that_none_ever_does(tmp_path: Path) -> None:
    memory = make_memory(1)
    one = plane(tmp_path / "one", answers(0.75), answers(0.75), keys=memory)
    other = plane(tmp_path / "other", answers(0.75), answers(0.75), keys=memory)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    async with one as p, other as q:
        first = await p.decide(key="k")
        assert first.action == pb.ACTION_TRADE
        q.state = admin_pb2.TRADING_STATE_HALTED
        halted = await q.decide(key="k")
        assert halted.action == pb.ACTION_NO_TRADE
        assert list(halted.reasons) == [*first.reasons, pb.REASON_CODE_TRADING_HALTED]
        assert stripped(halted) == stripped(first)
        q.state = admin_pb2.TRADING_STATE_ACTIVE
        for process in (q, p, q, p):
            assert await process.decide(key="k") == halted, "an answer only gets safer, in every process"
        assert (p.idempotency.withdrawn, q.idempotency.withdrawn) == (2, 3)
        assert (await q.decide(key="another")).action == pb.ACTION_TRADE
    os.close(memory)
    assert [packet.decision.decision_id for packet in packets_in(tmp_path / "one")] == [first.decision_id]
    assert [packet.order.idempotency_key for packet in packets_in(tmp_path / "other")] == ["another"]
    (note,) = notes_in(tmp_path / "other")
    assert (note.decision_id, note.cause) == (first.decision_id, "withdrawn")
    assert (note.heard_action, list(note.heard_reasons)) == (halted.action, list(halted.reasons))
    assert notes_in(tmp_path / "one") == []


OBJECTIONS: dict[str, tuple[Callable[[Plane], object], pb.Action.ValueType, pb.ReasonCode.ValueType]] = {
    "reducing": (
        lambda p: setattr(p, "state", admin_pb2.TRADING_STATE_REDUCING),
        pb.ACTION_NO_TRADE,
        pb.REASON_CODE_TRADING_REDUCING,
    ),
    "collar": (
        lambda p: p.feature_cache.accept(encode(dataclasses.replace(market(0.0), bid=90.0, ask=91.0))),
        pb.ACTION_NO_TRADE,
        pb.REASON_CODE_PRICE_COLLAR,
    ),
    "limit": (
        lambda p: p.guards.configure(GuardSettings(price_collar_bps=None, max_notional=1.0)),
        pb.ACTION_NO_TRADE,
        pb.REASON_CODE_NOTIONAL_LIMIT,
    ),
    "expired model": (
        lambda p: p.feature_cache.accept(
            encode(dataclasses.replace(market(0.0), event_time_ns=2_000_000_000_000_000_000))
        ),
        pb.ACTION_ABSTAIN,
        pb.REASON_CODE_MODEL_EXPIRED,
    ),
    "uncertain": (
        lambda p: setattr(p, "limits", ModelLimits(low=0.7, high=0.8)),
        pb.ACTION_ABSTAIN,
        pb.REASON_CODE_UNCERTAIN,
    ),
    "out of domain": (
        lambda p: setattr(p, "limits", seen(-0.5)),
        pb.ACTION_ABSTAIN,
        pb.REASON_CODE_OUT_OF_DOMAIN,
    ),
    "book unknown": (
        lambda p: p.feature_cache.accept(encode(dataclasses.replace(market(0.0), state=BookState.UNKNOWN))),
        pb.ACTION_ABSTAIN,
        pb.REASON_CODE_BOOK_UNKNOWN,
    ),
}


@pytest.mark.parametrize("objection", OBJECTIONS)
async def test_every_guard_runs_again_on_a_repeat(tmp_path: Path, objection: str) -> None:
    change, action, reason = OBJECTIONS[objection]

    async def expiring(rows: list[bytes]) -> ScoreBatch:
        model = ModelIdentity("champion", "aa" * 8, 0.5, 1_900_000_000)
        return ScoreBatch(model, np.full(len(rows), 0.75, dtype=np.float32))

    async with plane(tmp_path, expiring, expiring) as p:
        p.guards.configure(GuardSettings(price_collar_bps=100.0, max_notional=None))
        p.feature_cache.accept(encode(market(0.1)))
        first = await p.decide(key="k", own_features=False)
        assert first.action == pb.ACTION_TRADE
        assert await p.decide(key="k", own_features=False) == first
        change(p)
        repeat = await p.decide(key="k", own_features=False)
        assert (repeat.action, list(repeat.reasons)) == (action, [*first.reasons, reason])


async def test_an_answer_that_is_no_trade_stays_as_it_is(tmp_path: Path) -> None:
    async with plane(tmp_path, answers(0.25), answers(0.25)) as p:
        first = await p.decide(key="k")
        p.state = admin_pb2.TRADING_STATE_HALTED
        assert first.action == pb.ACTION_NO_TRADE
        assert await p.decide(key="k") == first
    assert notes_in(tmp_path) == []


async def test_what_a_repeat_is_told_instead_is_durable_first_or_it_abstains(tmp_path: Path) -> None:
    async with plane(tmp_path, answers(0.75), answers(0.75)) as p:
        first = await p.decide(key="k")
        p.state = admin_pb2.TRADING_STATE_HALTED
        p.journal.writable = False
        unnoted = await p.decide(key="k")
        assert unnoted.action == pb.ACTION_ABSTAIN
        assert unnoted.reasons[-2:] == [pb.REASON_CODE_TRADING_HALTED, pb.REASON_CODE_AUDIT_UNAVAILABLE]
        p.journal.writable = True
        p.state = admin_pb2.TRADING_STATE_ACTIVE
        halted = await p.decide(key="k")
        assert (halted.action, halted.reasons[-1]) == (pb.ACTION_NO_TRADE, pb.REASON_CODE_TRADING_HALTED)
        assert await p.decide(key="k") == halted
    (note,) = notes_in(tmp_path)
    assert (note.decision_id, note.heard_action) == (first.decision_id, pb.ACTION_NO_TRADE)


async def test_callers_are_told_apart_by_who_they_are(tmp_path: Path) -> None:
    async with plane(tmp_path, answers(0.75), answers(0.75)) as p:

        async def ask(name: str, quantity: float) -> str:
            return (await p.decide(key="1", quantity=quantity, caller=name)).decision_id

        one, other, again = [await ask(*desk) for desk in (("a", 1.0), ("b", 2.0), ("a", 1.0))]
        assert one == again != other
        with pytest.raises(KeyReusedError):
            await ask("a", 2.0)


async def test_an_order_whose_key_cannot_be_remembered_is_counted_as_shed(tmp_path: Path) -> None:
    async with plane(tmp_path, answers(0.75), answers(0.75)) as p:
        p.guards.configure(NO_LIMITS)
        for number in range(PLACES):
            await p.decide(key=f"{number}")
        assert (p.admission.shed, p.idempotency.refused) == (0, 0)
        with pytest.raises(OverloadedError):
            await p.decide(key="one more")
        assert (p.admission.shed, p.idempotency.refused, p.admission.in_flight) == (1, 1, 0)


async def test_a_process_that_stood_still_while_another_decided_tells_nobody_its_own_decision(tmp_path: Path) -> None:
    memory = make_memory(1)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one = plane(tmp_path / "one", answers(0.75), answers(0.75), keys=memory)
    other = plane(tmp_path / "other", answers(0.25), answers(0.25), keys=memory)
    async with one as stopped, other as q:
        heard: list[pb.Decision] = []

        async def stands_still(rows: list[bytes]) -> ScoreBatch:
            stopped.stood_still_seconds = q.stood_still_seconds = 5.0
            heard.append(await q.decide(key="k"))
            return await answers(0.75)(rows)

        stopped.primary.script = stands_still
        with pytest.raises(DeadlineError):
            await stopped.decide(timeout_seconds=2.0, key="k")
        assert stopped.idempotency.lost == 1
        repeat = await stopped.decide(key="k")
    os.close(memory)
    (decision,) = heard
    assert repeat == decision
    (packet,) = packets_in(tmp_path / "one")
    assert packet.decision.decision_id != decision.decision_id
    superseded, repeated = notes_in(tmp_path / "one")
    assert (superseded.decision_id, superseded.cause) == (packet.decision.decision_id, "superseded")
    assert (repeated.decision_id, repeated.cause) == (decision.decision_id, "repeated")
