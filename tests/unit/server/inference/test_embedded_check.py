"""Decisions of the embedded model that the primary scores too: compared, counted, and logged now and then."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs
from support.cases import Clock, new_case
from support.scripted_replica import Script, ScriptedReplica, answers, fails

from fallback.order import Answer
from pretrade.decision.v1 import decision_pb2 as pb
from server.inference.batcher import BatcherSettings
from server.inference.breaker import Mode
from server.inference.embedded_check import EmbeddedCheck, EmbeddedSettings, Fate
from server.inference.outcome import Outcome

VERSION = "aa" * 8


def decided(score: float = 0.75, source: pb.Source.ValueType = pb.SOURCE_EMBEDDED) -> Answer:
    reason = pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD
    return Answer(pb.ACTION_TRADE, source, reason, score, 0.5, "champion", VERSION)


def check_of(primary: ScriptedReplica, clock: Clock | None = None, share: float = 1.0) -> EmbeddedCheck:
    return EmbeddedCheck(primary, EmbeddedSettings(check_share=share), lambda: 0.5, clock or Clock())


def counts(check: EmbeddedCheck) -> dict[Fate, int]:
    return {fate: count for fate, count in check.fates.items() if count}


@pytest.mark.parametrize(
    ("script", "fate"),
    [
        (answers(0.75), "agreed"),
        (answers(0.75 + 1e-4), "disagreed"),
        (answers(0.75, threshold=0.9), "disagreed"),
        (answers(0.25, version="bb" * 8), "other_version"),
        (fails(Outcome.MODEL_ERROR), "failed"),
    ],
)
async def test_a_decision_is_compared_with_the_primarys_score(script: Script, fate: Fate) -> None:
    primary = ScriptedReplica("primary", script)
    check = check_of(primary)
    check.sample(new_case(), decided(), "one")
    await asyncio.sleep(0.5)
    assert counts(check) == {fate: 1}
    await primary.batcher.close()


async def test_disagreements_are_logged_at_most_once_a_minute() -> None:
    primary, clock = ScriptedReplica("primary", answers(0.25)), Clock()
    check = check_of(primary, clock)
    with capture_logs() as logs:
        for seconds in (0.0, 30.0, 31.0):
            clock.now += seconds
            check.sample(new_case(), decided(), f"after {seconds}")
            await asyncio.sleep(0.5)
    assert [(line["decision_id"], line["times"]) for line in logs if "disagree" in line["event"]] == [
        ("after 0.0", 1),
        ("after 31.0", 3),
    ]
    await primary.batcher.close()


async def test_only_decisions_that_no_replica_was_asked_for_are_compared() -> None:
    primary = ScriptedReplica("primary", answers(0.75))
    check = check_of(primary)
    for stage in (pb.STAGE_PRIMARY, pb.STAGE_SECONDARY):
        case = new_case()
        case.budget.skip(stage, 0.0, pb.DEGRADATION_PRIMARY_BREAKER_OPEN)
        check.sample(case, decided(), "after the replicas")
    check.sample(new_case(), decided(source=pb.SOURCE_PRIMARY), "the primary's own")
    check_of(primary, share=0.5).sample(new_case(), decided(), "not in the sample")
    await asyncio.sleep(0.5)
    assert (counts(check), primary.calls) == ({}, 0)
    await primary.batcher.close()


async def test_a_primary_that_is_not_to_be_asked_or_is_full_costs_nothing() -> None:
    primary = ScriptedReplica("primary", answers(0.75), BatcherSettings(max_queued_shadow_rows=1))
    check = check_of(primary)
    check.sample(new_case(), decided(), "queued")
    check.sample(new_case(), decided(), "shed")
    primary.breaker.force(Mode.FORCED_OPEN, None)
    check.sample(new_case(), decided(), "refused")
    assert counts(check) == {"shed": 1, "refused": 1}
    await primary.batcher.close()
