"""Rows of other sets are put together of what mf1, the worker and the caller say."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from support.cases import Clock, new_case
from support.guest_sets import MIXED, REGISTERED, know

from fallback.order import Brought, Case
from feature_cache.feature_set import CALLER, ROW, Feature, FeatureSet
from feature_cache.feature_sets import Registered
from feature_cache.features import MF1
from feature_cache.store.codec import BookState, FeatureSnapshot
from feature_cache.store.l1 import CachedFeatures, FeatureCache, FeatureCacheSettings
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.other_sets import OtherSets
from server.inference.model_names import DEFAULT

NAME = "BTCUSDT.BINANCE"
AGED = FeatureSet(
    "aged",
    (
        Feature("book_age_ms", "ms", "Copied.", lowest=0.0, is_age=True, source="mf1"),
        Feature("trades", "", "Of another guest.", lowest=0.0, source="mixed"),
        Feature("urgency", "", "Must be brought.", 0.0, 1.0, source=CALLER, may_be_undefined=False),
    ),
)


class Desk:
    """What the worker says, by set, and the sets that models take."""

    def __init__(self, *in_use: FeatureSet) -> None:
        self.clock = Clock()
        self.in_use = list(in_use)
        self.followed: list[str] = []
        self.others = OtherSets(lambda: {DEFAULT: self.in_use}, self._follow, max_age_seconds=1.0, clock=self.clock)
        self.others.look()

    def _follow(self, feature_set: FeatureSet) -> FeatureCache:
        self.followed.append(feature_set.id)
        settings = FeatureCacheSettings()
        return FeatureCache("redis://unused", settings, [NAME], feature_set, monotonic=self.clock, wall_ns=lambda: 0)

    def says(
        self, values: Sequence[float], *, state: BookState = BookState.VALID, feature_set: FeatureSet = MIXED
    ) -> None:
        """The worker's newest vector of a set, of this moment."""
        vector = np.array(values, dtype=np.float32)
        snapshot = FeatureSnapshot(NAME, 1, 0, 0, 0, 0, 0, 99.0, 101.0, state, vector, feature_set)
        entry = cast(CachedFeatures, SimpleNamespace(snapshot=snapshot, age_seconds=self._since(self.clock.now)))
        cast(Any, self.others.caches[feature_set.id])._entries[NAME] = entry

    @staticmethod
    def _since(then: float) -> Any:
        return lambda now: now - then

    def row(self, case: Case, feature_set: FeatureSet = MIXED) -> list[float] | None:
        self.others.fill_in([case], self.clock.now)
        row = case.row_of(feature_set)
        return None if row is None else np.frombuffer(row, ROW).tolist()


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    know(monkeypatch, REGISTERED, Registered(AGED, None, "the tests"))


def case_of(*, side: pb.Side.ValueType = pb.SIDE_BUY, urgency: float | None = 0.5, of: FeatureSet = MIXED) -> Case:
    case = new_case(side=side, sequence=1)
    assert case.snapshot is not None
    case.snapshot_age_seconds = 0.25
    case.snapshot.values[MF1.index["weighted_mid_bps"]] = 3.0
    case.snapshot.values[MF1.index["book_age_ms"]] = 10.0
    if urgency is not None:
        values = np.full(len(of), np.nan, dtype=np.float32)
        values[of.index["urgency"]] = urgency
        case.order.brought = Brought(of, values)
    return case


def test_a_row_has_a_part_of_mf1_one_of_the_worker_and_one_of_the_caller() -> None:
    desk = Desk(MIXED)
    desk.says([np.nan, 7.0, np.nan])
    assert desk.row(case_of()) == [3.0, 7.0, 0.5]
    assert desk.row(case_of(side=pb.SIDE_SELL)) == [-3.0, 7.0, 0.5]


def test_what_the_caller_does_not_bring_is_undefined_where_the_set_allows_that() -> None:
    desk = Desk(MIXED)
    desk.says([np.nan, 7.0, np.nan])
    row = desk.row(case_of(urgency=None))
    assert row is not None
    assert (row[:2], np.isnan(row[2])) == ([3.0, 7.0], True)


def test_what_the_caller_brings_of_other_features_takes_the_place_of_the_servers() -> None:
    desk = Desk(MIXED)
    case = case_of()
    case.order.brought = Brought(MIXED, np.array([np.nan, 9.0, 1.0], dtype=np.float32))
    assert desk.row(case) == [3.0, 9.0, 1.0], "without a vector of the worker, which nobody needs then"


def test_there_is_no_row_while_a_part_is_missing_stale_or_of_an_unknown_book() -> None:
    desk = Desk(MIXED)
    case = case_of()
    assert desk.row(case) is None
    assert case.others == {}, "it is the server that lacks it"
    desk.says([np.nan, 7.0, np.nan], state=BookState.UNKNOWN)
    assert desk.row(case_of()) is None
    desk.says([np.nan, 7.0, np.nan])
    desk.clock.now += 1.0
    assert desk.row(case_of()) is not None
    desk.clock.now += 0.001
    assert desk.row(case_of()) is None


def test_without_features_of_mf1_that_may_decide_no_set_has_a_row() -> None:
    desk = Desk(MIXED)
    desk.says([np.nan, 7.0, np.nan])
    case = case_of()
    case.features = None
    desk.others.fill_in([case], desk.clock.now)
    assert case.others is None


def test_ages_grow_and_a_set_may_copy_from_a_guest_and_want_the_caller_to_bring_his_part() -> None:
    desk = Desk(AGED)
    assert desk.followed == ["mixed"]
    desk.says([np.nan, 7.0, np.nan])
    assert desk.row(case_of(of=AGED), AGED) == [260.0, 7.0, 0.5]
    not_brought = case_of(urgency=None)
    assert desk.row(not_brought, AGED) is None
    assert not_brought.others == {AGED: None}, "the caller has to bring it"


def test_orders_without_a_row_are_counted_once_by_set_and_by_the_part_that_was_missing() -> None:
    desk = Desk(MIXED, AGED)
    cases = [case_of(of=AGED), case_of(urgency=None)]
    desk.others.fill_in(cases, desk.clock())
    assert desk.others.missing == {("mixed", "mixed"): 2, ("aged", "mixed"): 1, ("aged", "caller"): 1}
    desk.says([np.nan, 7.0, np.nan])
    desk.others.fill_in(cases, desk.clock())
    assert desk.others.missing.total() == 5, "one of them has still not brought its part"
    desk.others.rows(DEFAULT, cases[1].order, None, desk.clock(), {})
    assert desk.others.missing.total() == 5, "a look before orders are taken up together is no order"


def test_only_sets_that_a_model_takes_now_cost_anything() -> None:
    desk = Desk(MF1)
    assert (desk.others.wanted, desk.followed) == (False, [])
    desk.in_use.append(MIXED)
    assert [cache.feature_set for cache in desk.others.look()] == [MIXED]
    assert (desk.others.wanted, desk.others.look(), desk.followed) == (True, [], ["mixed"])
    desk.in_use.remove(MIXED)
    assert (desk.others.look(), desk.others.wanted) == ([], False)


def test_an_order_gets_rows_of_the_sets_that_its_own_model_takes_and_no_others() -> None:
    desk, in_use = Desk(), {DEFAULT: [MF1], "guest": [MIXED], "both": [MIXED, AGED, MF1]}
    desk.others = OtherSets(lambda: in_use, desk._follow, 1.0, desk.clock, lambda case: case.order.strategy)
    desk.others.look()
    assert desk.followed == ["mixed"]
    desk.says([np.nan, 7.0, np.nan])
    cases = {name: case_of(of=AGED) for name in in_use}
    for name, case in cases.items():
        case.order.strategy = name
    desk.others.fill_in(list(cases.values()), desk.clock())
    assert cases[DEFAULT].others is None
    assert {name: set(case.others or ()) for name, case in cases.items()} == {
        DEFAULT: set(),
        "guest": {MIXED},
        "both": {MIXED, AGED},
    }


def test_a_callers_vector_of_another_set_is_no_part_of_this_one() -> None:
    desk = Desk(MIXED)
    desk.says([np.nan, 7.0, np.nan])
    row = desk.row(case_of(of=AGED))
    assert row is not None
    assert np.isnan(row[2])


def test_orders_that_bring_nothing_share_a_row_until_a_part_of_it_is_another() -> None:
    desk = Desk(MIXED)
    desk.says([np.nan, 7.0, np.nan])
    first = case_of(urgency=None)
    desk.row(first)
    assert first.snapshot is not None

    def later(**changes: Any) -> bytes | None:
        case = case_of(urgency=None, **changes)
        case.snapshot = first.snapshot
        desk.row(case)
        return case.row_of(MIXED)

    desk.clock.now += 0.5  # MIXED has no ages
    assert later() is first.row_of(MIXED)
    sold = later(side=pb.SIDE_SELL)
    assert sold is not None
    assert np.frombuffer(sold, ROW)[0] == -3.0
    assert desk.row(case_of()) == [3.0, 7.0, 0.5], "one that brings something has its own"
    assert later() is first.row_of(MIXED)
    desk.says([np.nan, 8.0, np.nan])
    newer = later()
    assert newer is not None
    assert np.frombuffer(newer, ROW)[1] == 8.0
    assert first.snapshot is not None
    first.snapshot = case_of().snapshot
    assert first.snapshot is not None
    first.snapshot.values[MF1.index["weighted_mid_bps"]] = 4.0
    moved = later()
    assert moved is not None
    assert np.frombuffer(moved, ROW)[0] == 4.0


def test_a_shared_row_with_ages_is_made_anew_when_time_goes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    aging = FeatureSet("aging", (Feature("book_age_ms", "ms", "Copied.", lowest=0.0, is_age=True, source="mf1"),))
    know(monkeypatch, Registered(aging, None, "the tests"))
    desk, case = Desk(aging), case_of(urgency=None)
    assert desk.row(case, aging) == [260.0]
    case.snapshot_age_seconds = 0.5
    assert desk.row(case, aging) == [510.0]


def test_an_order_with_its_own_mf1_never_gets_the_row_of_another() -> None:
    desk = Desk(MIXED)
    desk.says([np.nan, 7.0, np.nan])
    case = case_of(urgency=None)
    desk.row(case)
    own = case_of(urgency=None)
    own.snapshot = case.snapshot
    own.order.caller_features = np.full(len(MF1), 0.5, dtype=np.float32)
    row = desk.row(own)
    assert row is not None
    assert row[:2] == [0.5, 7.0]
