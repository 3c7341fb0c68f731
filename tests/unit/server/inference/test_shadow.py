"""Shadow rows: compared where they are scored, counted where they are not, never waited for."""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import Any

import numpy as np
import pytest
from support.cases import new_case
from support.scripted_replica import Script, ScriptedReplica, answers, fails, hangs

from fallback.block import Block, Scores, View
from fallback.budget import Budget
from fallback.order import Answer, Attempt
from feature_cache import features
from feature_cache.features import MF1
from pretrade.decision.v1 import decision_pb2 as pb
from server.inference.batcher import BatcherSettings
from server.inference.breaker import Mode
from server.inference.outcome import Outcome
from server.inference.rows import Scored
from server.inference.shadow import Pair, Pairs, Shadow
from server.inference.wire import ModelIdentity, ScoreBatch

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


class Decided(Block):
    """Decisions of one model in columns, with these scores."""

    def __init__(self, scores: list[float], source: pb.Source.ValueType = pb.SOURCE_PRIMARY) -> None:
        cases = [new_case(sequence=7, side=pb.SIDE_SELL if place % 2 else pb.SIDE_BUY) for place in range(len(scores))]
        views = []
        for case in cases:
            assert case.snapshot is not None
            assert case.features is not None
            views.append(View(case.snapshot, 0.0, case.mid, case.features, case.row()))
        super().__init__([case.order for case in cases], views, Budget(0.0, 1.0))
        identity = ModelIdentity("champion", CANARY if source == pb.SOURCE_CANARY else CHAMPION, 0.5, 0, MF1)
        self.put_all(Scores(scores, identity, len(scores), 0, None, lambda place: Scored(scores[place], identity)))
        self.answered(source, identity, 0.001)

    def complete(self) -> None:
        """Nothing: they are decided."""

    def is_left(self) -> bool:
        return True

    def is_gone(self, place: int) -> bool:
        return True

    def put_failure(self, place: int, result: Any) -> None:
        raise AssertionError


@pytest.mark.parametrize("source", [pb.SOURCE_PRIMARY, pb.SOURCE_CANARY])
async def test_decisions_in_columns_are_compared_as_each_by_itself(source: pb.Source.ValueType) -> None:
    scores = [0.1, 0.5, 0.9, 0.3]
    found: dict[str, tuple[list[Pair], dict[str, int], list[str]]] = {}
    by_canary = source == pb.SOURCE_CANARY
    for way in ("columns", "alone"):
        other = answers(0.7, threshold=0.6, version=CHAMPION if by_canary else CANARY)
        challenger = ScriptedReplica("the other one", other)
        pairs: list[Pair] = []
        together: list[Pairs] = []
        of_canary: list[str] = []
        shadow = Shadow(
            [] if by_canary else [challenger],
            [challenger] if by_canary else [],
            sample_share=0.0 if by_canary else 1.0,  # a canary's own always are
            observe=pairs.append,
            observe_together=together.append,
            observe_decision=of_canary.append,
        )
        block = Decided(scores, source)
        ids = [f"{number}" for number in range(len(scores))]
        if way == "columns":
            shadow.mirror_block(block, ids)
        else:
            shadow.mirror([(*one, decision_id) for one, decision_id in zip(block.each(), ids, strict=True)])
        await asyncio.sleep(0.5)
        assert (challenger.calls, bool(pairs)) == (1, way == "alone")
        pairs += [pair for some in together for pair in some.each()]
        found[way] = pairs, shadow.fates(), of_canary
        await challenger.batcher.close()
    pairs, fates, of_canary = found["columns"]
    assert found["columns"] == found["alone"]
    assert (len(of_canary), {pair.challenger_decided for pair in pairs}) == (4 * by_canary, {by_canary})
    assert {pair.champion.version for pair in pairs} == {CHAMPION}
    assert fates == {"agreed": 2, "disagreed": 2, "uncompared": 0, "failed": 0, "shed": 0, "refused": 0}
    assert [pair.sequence for pair in pairs] == [7] * 4
    assert not any(math.isnan(pair.mid) for pair in pairs)


@pytest.mark.parametrize(("share", "kept"), [(1.0, "abcd"), (0.5, "bd")])
async def test_of_decisions_in_columns_a_version_on_trial_gets_the_sample_that_tells_of_it(
    share: float, kept: str
) -> None:
    trial, other = (ScriptedReplica(name, answers(0.7, version=CANARY)) for name in ("trial", "other"))
    seen: dict[str, list[str]] = {"trial": [], "other": []}
    drawn = itertools.cycle((0.9, 0.1))
    shadow = Shadow(
        [trial, other],
        (),
        share,
        lambda: next(drawn),
        on_trial=lambda challenger: challenger is trial,
        tells=lambda order: order.side == pb.SIDE_BUY,
        observe_together=lambda pairs: seen["other" if len(pairs.decision_ids) == len(kept) else "trial"].extend(
            pairs.decision_ids
        ),
    )
    shadow.mirror_block(Decided([0.9] * 4), ["a", "b", "c", "d"])
    await asyncio.sleep(0.5)
    buys = [one for one in kept if one in "ac"]
    assert seen == {"trial": buys, "other": list(kept)}
    assert shadow.offered == len(kept) + len(buys)
    for replica in (trial, other):
        await replica.batcher.close()


async def test_columns_that_a_challenger_does_not_score_are_counted_one_by_one() -> None:
    limits = BatcherSettings(max_queued_shadow_rows=5, max_shadow_rows=2)
    challenger = ScriptedReplica("challenger", fails(Outcome.MODEL_ERROR), limits)
    shadow = Shadow([challenger])
    for first in (0, 4):
        shadow.mirror_block(Decided([0.9] * 4), [str(number) for number in range(first, first + 4)])
    assert (shadow.shed, challenger.batcher.queued) == (3, 5), "of the second, one row is taken"
    await asyncio.sleep(1)
    assert (shadow.failed, shadow.offered, challenger.batcher.queued) == (5, 8, 0)
    challenger.breaker.force(Mode.FORCED_OPEN)
    shadow.mirror_block(Decided([0.9] * 4), [str(number) for number in range(4)])
    assert shadow.refused == 4
    await challenger.batcher.close()


def odd(version: str) -> Script:
    """Gives no score to the first row."""

    async def script(rows: list[bytes]) -> ScoreBatch:
        scores = np.full(len(rows), 0.7, dtype=np.float32)
        scores[0] = math.nan
        return ScoreBatch(ModelIdentity("champion", version, 0.6, 0, MF1), scores)

    return script


async def test_of_a_canarys_columns_a_row_that_goes_on_alone_still_says_who_decided() -> None:
    champion = ScriptedReplica("primary", odd(CHAMPION))
    pairs: list[Pair] = []
    shadow = Shadow([], [champion], observe=pairs.append)
    shadow.mirror_block(Decided([0.1, 0.5, 0.9], pb.SOURCE_CANARY), ["a", "b", "c"])
    await asyncio.sleep(0.5)
    assert [(one.decision_id, one.challenger_decided, one.challenger.score) for one in pairs] == [
        ("b", True, 0.5),
        ("c", True, 0.9),
    ]
    assert {one.champion.version for one in pairs} == {CHAMPION}
    assert {one.challenger_seconds for one in pairs} == {0.001}
    await champion.batcher.close()


async def test_columns_are_compared_although_one_score_is_none() -> None:
    challenger = ScriptedReplica("challenger", odd(CANARY))
    pairs: list[Pair] = []
    shadow = Shadow([challenger], observe=pairs.append)
    shadow.mirror_block(Decided([0.1, 0.5, 0.9]), ["a", "b", "c"])
    await asyncio.sleep(0.5)
    assert [pair.decision_id for pair in pairs] == ["b", "c"]
    assert shadow.fates() == {"agreed": 2, "disagreed": 0, "uncompared": 0, "failed": 1, "shed": 0, "refused": 0}
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
