"""Shadow rows: compared where they are scored, counted where they are not, never waited for."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest
from support.cases import new_case
from support.scripted_replica import ScriptedReplica, answers, fails, hangs

from fallback.order import Answer, Attempt
from feature_cache import features
from pretrade.decision.v1 import decision_pb2 as pb
from server.inference.batcher import BatcherSettings
from server.inference.breaker import Mode
from server.inference.outcome import Outcome
from server.inference.shadow import Pair, Shadow

CHAMPION, CANARY = "aa" * 8, "bb" * 8


def decided(score: float, source: pb.Source.ValueType = pb.SOURCE_PRIMARY) -> Answer:
    version = CANARY if source == pb.SOURCE_CANARY else CHAMPION
    reason = pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD
    return Answer(pb.ACTION_TRADE, source, reason, score, 0.5, "champion", version)


NOBODY = Answer(pb.ACTION_ABSTAIN, pb.SOURCE_NONE, pb.REASON_CODE_NO_SOURCE)


async def test_the_challenger_agrees_where_both_fall_on_the_same_side() -> None:
    challenger = ScriptedReplica("challenger", answers(0.7, threshold=0.6, version=CANARY))
    pairs: list[Pair] = []
    shadow = Shadow([challenger], observe=pairs.append)
    for name, answer in (("one", decided(0.9)), ("two", decided(0.1)), ("three", NOBODY)):
        shadow.mirror([(new_case(), answer, name)])
    await asyncio.sleep(0.5)
    assert shadow.fates() == {"agreed": 1, "disagreed": 1, "uncompared": 1, "failed": 0, "shed": 0, "refused": 0}
    assert challenger.calls == 1, "one batch"
    assert [pair.decision_id for pair in pairs] == ["one", "two"], "the third has no champion's score"
    first = pairs[0]
    assert (first.champion.version, first.champion.score, first.champion.trades) == (CHAMPION, 0.9, True)
    assert (first.challenger.version, round(first.challenger.score, 6)) == (CANARY, 0.7)
    assert not first.challenger_decided
    assert first.challenger_seconds == pytest.approx(0.001)
    await challenger.batcher.close()


async def test_every_challenger_gets_the_row() -> None:
    challengers = [ScriptedReplica(f"challenger-{number}", answers(0.7)) for number in range(3)]
    shadow = Shadow(challengers)
    shadow.mirror([(new_case(), decided(0.9), "one")])
    await asyncio.sleep(0.5)
    assert [challenger.calls for challenger in challengers] == [1, 1, 1]
    assert shadow.agreed == 3
    for challenger in challengers:
        await challenger.batcher.close()


async def test_what_a_canary_decided_goes_to_the_champion_and_only_there() -> None:
    primary = ScriptedReplica("primary", answers(0.2))
    secondary = ScriptedReplica("secondary", answers(0.2))
    challenger = ScriptedReplica("challenger", answers(0.7))
    pairs: list[Pair] = []
    shadow = Shadow([challenger], (primary, secondary), sample_share=0.0, observe=pairs.append)
    case = new_case()
    case.attempts.append(Attempt("challenger", "success", 0.004, CANARY))
    shadow.mirror([(case, decided(0.9, pb.SOURCE_CANARY), "one")])  # whatever the sample
    primary.breaker.force(Mode.FORCED_OPEN)
    shadow.mirror([(case, decided(0.9, pb.SOURCE_CANARY), "two")])
    secondary.breaker.force(Mode.FORCED_OPEN)
    shadow.mirror([(case, decided(0.9, pb.SOURCE_CANARY), "three")])
    await asyncio.sleep(0.5)
    assert (primary.calls, secondary.calls, challenger.calls) == (1, 1, 0)
    assert {pair.decision_id for pair in pairs} == {"one", "two"}
    assert all(pair.challenger_decided and pair.challenger.version == CANARY for pair in pairs)
    assert {pair.challenger_seconds for pair in pairs} == {0.004}
    assert (shadow.disagreed, shadow.refused) == (2, 1)
    for replica in (primary, secondary, challenger):
        await replica.batcher.close()


async def test_a_row_that_a_caller_brought_does_not_go_where_a_version_is_on_trial() -> None:
    serving, other = (ScriptedReplica(name, answers(0.7, version=CANARY)) for name in ("challenger", "challenger-2"))
    pairs: list[Pair] = []
    on_trial = {serving}
    shadow = Shadow([serving, other], on_trial=lambda replica: replica in on_trial, observe=pairs.append)
    own = np.zeros(features.N_FEATURES, dtype=np.float32)
    shadow.mirror([(new_case(caller_features=own, sequence=7), decided(0.9), "brought")])
    shadow.mirror([(new_case(sequence=7), decided(0.9), "the server's own")])
    await asyncio.sleep(0.5)
    assert sorted(pair.decision_id for pair in pairs) == ["brought", "the server's own", "the server's own"]
    assert {pair.decision_id: pair.sequence for pair in pairs} == {"brought": None, "the server's own": 7}
    on_trial.clear()
    shadow.mirror([(new_case(caller_features=own), decided(0.9), "brought, and nothing is on trial")])
    await asyncio.sleep(0.5)
    assert [pair.decision_id for pair in pairs[3:]] == ["brought, and nothing is on trial"] * 2
    for replica in (serving, other):
        await replica.batcher.close()


async def test_a_sample_is_a_sample() -> None:
    challenger = ScriptedReplica("challenger", answers(0.7))
    dice = itertools.cycle([0.1, 0.3, 0.6, 0.9])
    shadow = Shadow([challenger], sample_share=0.5, random=lambda: next(dice))
    for number in range(100):
        shadow.mirror([(new_case(), decided(0.9), str(number))])
    await asyncio.sleep(0.5)
    assert shadow.offered == shadow.agreed == 50
    await challenger.batcher.close()


async def test_a_failing_challenger_is_counted() -> None:
    challenger = ScriptedReplica("challenger", fails(Outcome.MODEL_ERROR))
    shadow = Shadow([challenger])
    shadow.mirror([(new_case(), decided(0.9), "one")])
    await asyncio.sleep(0.5)
    assert shadow.failed == 1
    await challenger.batcher.close()


async def test_a_hanging_challenger_holds_a_bounded_number_of_rows() -> None:
    challenger = ScriptedReplica("challenger", hangs, BatcherSettings(max_queued_shadow_rows=10))
    shadow = Shadow([challenger])
    for _ in range(50):
        for _ in range(20):
            shadow.mirror([(new_case(), decided(0.9), "one")])
        await asyncio.sleep(0.1)
    assert shadow.offered == 1_000
    assert challenger.batcher.queued <= 10
    assert challenger.batcher.in_flight <= 8
    # Once its breaker is open it is not even asked.
    assert shadow.refused > 0
    assert shadow.refused + shadow.failed + shadow.shed + challenger.batcher.queued == 1_000
    await challenger.batcher.close()


async def test_a_challenger_whose_breaker_is_open_is_not_asked() -> None:
    challenger = ScriptedReplica("challenger", answers(0.7))
    challenger.breaker.force(Mode.FORCED_OPEN)
    shadow = Shadow([challenger])
    shadow.mirror([(new_case(), decided(0.9), "one")])
    assert (shadow.refused, challenger.batcher.queued) == (1, 0)
