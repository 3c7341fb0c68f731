"""Orders of several models in one call: a block for each model, and each order as if it had come by itself."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.guest_sets import MIXED, REGISTERED, know
from support.plain_orders import PARTS, busy_plane, meaning, orders_of, parts_of, scores, some_scores
from support.planes import INSTRUMENTS, Plane, Second, market, notes_in, packets_in
from support.scripted_replica import answers, fails, hangs

from fallback.chain import ForBlocks, StageName
from fallback.guards import GuardSettings
from fallback.model_limits import ModelLimits, limits_of
from fallback.order import Order, Part
from feature_cache.feature_set import FeatureSet
from feature_cache.features import MF1
from feature_cache.store.codec import encode
from pretrade.decision.v1 import decision_pb2 as pb
from server.inference import model_sets
from server.inference.outcome import Outcome

UP_TO_SEVEN_TRADES = {
    "features": ["weighted_mid_bps", "trades"],
    "patterns": [0],
    "low": [-1e9, 0.0],
    "high": [1e9, 7.0],
    "values": [[float(one) for one in range(-18, 18)]] * 2,
    "scores": [[one / 6 for one in range(-18, 18)]] * 2,
    "whitening": np.eye(2).tolist(),
    "distance": 1e9,
    "most_same": [2**60] * 2,
    "most_turned": [1e18] * 2,
}
"""What a model of the set `mixed` has seen."""


@dataclass
class Chance:
    """A model in the server's process that gives scores by chance."""

    random: Random
    version: str
    feature_set: FeatureSet
    least: float
    name: str = "champion"
    threshold: float = 0.5
    expires_at: int = 0
    parts: tuple[Part, ...] = PARTS

    def scores_and_parts(self, rows: bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        scores = some_scores(self.random, len(rows) // self.feature_set.row_bytes, self.least)
        return scores, parts_of(scores)


async def _decided(p: Plane, orders: Sequence[Order]) -> tuple[list[pb.Decision], list[int]]:
    """The decision of each order, begun together; how many of each block stayed in columns."""
    arrived = p.clock()
    begun = p.dataplane.begin_together(orders, arrived, arrived + 9.0)
    assert begun is not None
    await begun.ended()
    wires = [one if isinstance(one, bytes) else one.result().wire for one in begun.outcomes()]
    stayed = [block.in_block for block in begun.blocks]
    p.dataplane.heard(begun.take_decided())
    return [pb.Decision.FromString(wire) for wire in wires], stayed


@pytest.mark.parametrize("first", ["model", "embedded"])
@pytest.mark.parametrize("number", range(6))
async def test_orders_of_two_models_are_decided_in_blocks_as_they_are_alone(
    number: int, first: StageName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(monkeypatch, REGISTERED)
    monkeypatch.setattr(model_sets, "_known", {"bb" * 8: MIXED})
    found: dict[str, tuple[list[Any], list[Any]]] = {}
    stayed: dict[str, list[int]] = {}
    for way in ("columns", "alone"):
        random, ours, theirs = (Random(f"{number}/{what}") for what in ("orders", "first", "second"))
        known = INSTRUMENTS[: 1 + number % 3]
        strategies = ("twap", "vwap", "gone")[: 2 + number % 2]
        orders = orders_of(random, 8 + 8 * number, INSTRUMENTS[:2], strategies)
        failing = number == 5
        second = Second(
            MIXED,
            fails(Outcome.TRANSPORT) if failing else scores(theirs, "bb" * 8, MIXED),
            answers(0.75, version="bb" * 8, feature_set=MIXED),
        )
        path = tmp_path / way
        async with busy_plane(path, scores(ours), answers(0.75), second=second, first_stage=first) as p:
            p.control.shadow = number % 2 == 0
            p.embedded.scorer = Chance(ours, "aa" * 8, MF1, 0.2)
            p.second_embedded.scorer = Chance(theirs, "bb" * 8, MIXED, math.nan if failing else 0.2)
            snapshot = market(0.1)
            for name in known:
                p.feature_cache.accept(encode(replace(snapshot, instrument=name)))
            for place, name in enumerate(known[: 2 if number in {2, 5} else 1]):
                own = np.array([math.nan, 7.0 + place, math.nan], dtype=np.float32)
                guest = replace(snapshot, instrument=name, values=own, feature_set=MIXED)
                p.second_features.accept(encode(guest))
            p.guards.configure(GuardSettings(price_collar_bps=50.0, max_notional=100_000.0))
            if number == 3:
                p.limits = ModelLimits(0.44, 0.46, has_band=True)
            if number == 2:  # the second instrument is like nothing that the second model has seen
                p.limits_of["bb" * 8] = limits_of({"domain": UP_TO_SEVEN_TRADES}, MIXED)
            if way == "alone":
                monkeypatch.setattr(p.chain, "for_blocks", lambda: ForBlocks(None, (), ()))
            decisions, stayed[way] = await _decided(p, orders)
            embedded = sum(one.source == pb.SOURCE_EMBEDDED for one in decisions)
            shadows, checks = (p.shadow, p.second_shadow), (p.check, p.second_check)
            async with asyncio.timeout(10):
                while (  # noqa: ASYNC110 - plain counts
                    p.admission.in_flight  # places are given back together, a turn of the event loop later
                    or sum(sum(one.fates.values()) for one in checks) < embedded
                    or any(sum(one.fates().values()) < one.offered for one in shadows)
                ):
                    await asyncio.sleep(0.001)
            counted = (
                dict(p.metrics.decisions),
                dict(p.metrics.reasons),
                dict(p.metrics.degradations),
                [dict(one.attempts) for one in (p.champion, p.second_champion)],
                dict(p.chain.broken),
                [(one.met, one.missed) for one in (p.objective, p.second_objective)],
                [one.fates() for one in shadows],
                [dict(one.fates) for one in checks],
                p.admission.in_flight,
                {stage: one.buckets()[0][-1] for stage, one in p.metrics.stages.items()},
            )
            await p.journal.flush()
        packets = sorted((meaning(one) for one in packets_in(path)), key=lambda one: str(one["order"]["order_ref"]))
        found[way] = ([meaning(one) for one in decisions] + [counted], packets)
        assert [one.order_ref for one in decisions] == [one.order_ref for one in orders], "in the caller's order"
        for order, packet in zip(sorted(orders, key=lambda one: one.order_ref), packets, strict=True):
            chosen = {"vwap": "second", "gone": "elsewhere"}.get(order.strategy)
            assert packet.get("chosen_model") == chosen
    assert not stayed["alone"]
    assert len(stayed["columns"]) == (1 if number in {1, 4} else 2), "where no row of an instrument is missing"
    assert found["columns"][0] == found["alone"][0]
    for one, other in zip(found["columns"][1], found["alone"][1], strict=True):
        assert one == other
    if number == 2:
        assert any("REASON_CODE_OUT_OF_DOMAIN" in one["reasons"] for one in found["columns"][0][:-1])
    assert sum(stayed["columns"]) > 0


async def test_an_order_that_leaves_its_block_keeps_its_model_whatever_becomes_of_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(monkeypatch, REGISTERED)
    monkeypatch.setattr(model_sets, "_known", {"bb" * 8: MIXED})
    second = Second(MIXED, fails(Outcome.TRANSPORT), answers(0.75, version="bb" * 8, feature_set=MIXED))
    async with busy_plane(tmp_path, answers(0.75), answers(0.75), second=second) as p:
        own = np.array([math.nan, 7.0, math.nan], dtype=np.float32)
        p.second_features.accept(encode(replace(market(0.1), values=own, feature_set=MIXED)))
        begun = p.dataplane.begin_together(orders_of(Random(1), 2, strategies=("vwap",)), p.clock(), None)
        assert begun is not None
        assert len(begun.blocks) == 1
        assert p.model_map is not None
        p.model_map.set(())
        await begun.ended()
        await p.journal.flush()
    for packet in packets_in(tmp_path):
        assert (packet.chosen_model, packet.decision.source) == ("second", pb.SOURCE_SECONDARY)
        assert [one.replica for one in packet.attempts] == ["second/primary", "second/secondary"]


async def _begun_and_left(p: Plane, orders: Sequence[Order], when: str) -> None:
    """Begins orders of two models; their caller leaves."""
    begun = p.dataplane.begin_together(orders, p.clock(), None)
    assert begun is not None
    assert (len(begun.blocks), len(begun.alone)) == (1, 4), (
        "the second model's rows are missing, and one model is not here"
    )
    if when == "decided":
        await begun.ended()
    else:
        async with asyncio.timeout(10):
            while when == "recorded" and not p.replies.owed:  # noqa: ASYNC110 - a plain attribute
                await asyncio.sleep(0)
    p.dataplane.give_up_together(begun)
    async with asyncio.timeout(10):
        while p.replies.owed or p.replies.waiting:  # noqa: ASYNC110 - plain attributes
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("when", ["asked", "recorded", "decided"])
async def test_a_caller_that_leaves_takes_the_orders_of_all_models_along_and_has_heard_none(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(monkeypatch, REGISTERED)
    script = hangs if when == "asked" else answers(0.75)
    second = Second(MIXED, hangs, hangs)
    async with busy_plane(tmp_path, script, answers(0.75), second=second) as p:
        named = [*orders_of(Random(1), 5, strategies=("twap",)), *orders_of(Random(2), 2, strategies=("vwap",))]
        orders = [*named, *orders_of(Random(3), 2, strategies=("gone",))]
        await _begun_and_left(p, orders, when)
        await asyncio.sleep(0)
        assert (p.admission.in_flight, p.metrics.cancelled) == (0, 9)
    ids = [packet.decision.decision_id for packet in packets_in(tmp_path)]
    assert sorted(note.decision_id for note in notes_in(tmp_path)) == sorted(ids)
    assert len(ids) == {"asked": 0, "recorded": len(ids), "decided": 9}[when]
