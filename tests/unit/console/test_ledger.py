"""A decision's ledger as a picture."""

from __future__ import annotations

import struct

from pretrade.console.ledger import WIDTH, named_vector, waterfall
from pretrade.decision.v1 import decision_pb2 as pb


def test_each_stage_begins_where_the_one_before_ended() -> None:
    budget = pb.Budget(used_us=1_000)
    budget.stages.add(stage=pb.STAGE_FEATURES, used_us=100)
    budget.stages.add(stage=pb.STAGE_PRIMARY, used_us=700)
    budget.stages.add(stage=pb.STAGE_RULES, skipped=pb.DEGRADATION_NO_TIME_FOR_MODEL)
    budget.stages.add(stage=pb.STAGE_AUDIT, used_us=200)
    found = waterfall(budget)
    assert [(bar.left, bar.width) for bar in found] == [(0.0, 100.0), (100.0, 700.0), (800.0, 0.0), (800.0, 200.0)]
    assert sum(bar.width for bar in found) == WIDTH


def test_a_stage_that_took_no_time_can_be_seen_and_stays_in_the_picture() -> None:
    budget = pb.Budget(used_us=1_000_000)
    budget.stages.add(stage=pb.STAGE_PRIMARY, used_us=1_000_000)
    budget.stages.add(stage=pb.STAGE_GUARDS, used_us=0)
    last = waterfall(budget)[-1]
    assert last.width > 0
    assert last.left + last.width <= WIDTH


def test_a_decision_without_a_ledger_has_an_empty_one() -> None:
    assert waterfall(pb.Budget()) == []


def test_features_are_little_endian_floats_with_their_names() -> None:
    packed = struct.pack("<2f", 0.5, -2.0)
    assert named_vector(packed + b"\x00", ["spread_bps", "imbalance_l1"]) == [
        ("spread_bps", 0.5),
        ("imbalance_l1", -2.0),
    ]
    assert named_vector(packed, []) == [("number 0", 0.5), ("number 1", -2.0)], "of a set that the server does not know"
    assert named_vector(b"", ["spread_bps"]) == []
