"""A feature set is a value that refuses to contradict itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from feature_cache.feature_set import CALLER, Feature, FeatureSet, FeatureSetError
from feature_cache.features import MF1

BID = Feature("bid", "", "Size bid.", lowest=0.0, swapped_with="ask")
ASK = Feature("ask", "", "Size asked.", lowest=0.0, swapped_with="bid")
DRIFT = Feature("drift", "bps", "Where the price goes.", signed=True)
MINE = Feature("mine", "", "The caller's own view.", source=CALLER)
AGE = Feature("age", "ms", "Since the last event.", lowest=0.0, is_age=True)
SMALL = FeatureSet("small", (BID, ASK, DRIFT, MINE, AGE))


def test_a_set_knows_its_names_places_and_bounds() -> None:
    assert SMALL.names == ("bid", "ask", "drift", "mine", "age")
    assert SMALL.index["drift"] == 2
    assert len(SMALL) == 5
    assert SMALL.row_bytes == 20
    assert SMALL.lowest.tolist() == [0.0, 0.0, -np.inf, -np.inf, 0.0]
    assert SMALL.signed == ("drift",)
    assert SMALL.ages == (4,)
    assert SMALL.from_source(CALLER) == (3,)
    assert SMALL.version == f"small/{SMALL.fingerprint:08x}"


def test_a_sell_negates_what_carries_a_direction_and_swaps_the_sides_of_the_book() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0], dtype=np.float32)
    assert SMALL.for_sell(values).tolist() == [2.0, 1.0, -3.0, 4.0, 5.0]
    assert np.array_equal(SMALL.for_sell(SMALL.for_sell(values)), values)


def test_equal_sets_are_one_set_and_can_be_keys() -> None:
    again = FeatureSet("small", (BID, ASK, DRIFT, MINE, AGE))
    assert again == SMALL
    assert {SMALL: 1}[again] == 1


@pytest.mark.parametrize(
    "other",
    [
        FeatureSet("tiny", SMALL.features),
        FeatureSet("small", SMALL.features[::-1]),
        FeatureSet("small", (BID, ASK, replace(DRIFT, name="shift"), MINE, AGE)),
        FeatureSet("small", (BID, ASK, replace(DRIFT, signed=False), MINE, AGE)),
        FeatureSet("small", (BID, ASK, DRIFT, replace(MINE, source="mf1"), AGE)),
        FeatureSet("small", (replace(BID, swapped_with=""), replace(ASK, swapped_with=""), DRIFT, MINE, AGE)),
        FeatureSet("small", (BID, ASK, DRIFT, MINE, replace(AGE, is_age=False))),
    ],
    ids=["id", "order", "name", "sign", "source", "swap", "age"],
)
def test_the_fingerprint_changes_with_all_that_a_value_means(other: FeatureSet) -> None:
    assert other.fingerprint != SMALL.fingerprint


def test_what_is_only_for_people_leaves_the_fingerprint_alone() -> None:
    other = FeatureSet("small", (replace(BID, doc="Bid size.", unit="coins"), ASK, DRIFT, MINE, AGE))
    assert other.fingerprint == SMALL.fingerprint


@pytest.mark.parametrize(
    ("set_id", "features", "message"),
    [
        ("Small", (DRIFT,), "id: 'Small' must be"),
        (CALLER, (DRIFT,), "id: 'caller' must be"),
        ("small", (), "1 to 512 features, not 0"),
        ("small", (DRIFT, DRIFT), "small.drift: is in the set twice"),
        ("small", (replace(DRIFT, name="a b"),), "small.a b: a name must be"),
        ("small", (replace(DRIFT, lowest=2.0, highest=1.0),), "small.drift: lowest 2 is above highest 1"),
        ("small", (replace(DRIFT, lowest=float("nan")),), "small.drift: lowest nan"),
        ("small", (replace(DRIFT, source="small"),), "small.drift: a set cannot be its own source"),
        ("small", (BID, DRIFT), "small.bid: is swapped with 'ask'"),
        ("small", (replace(BID, swapped_with="bid"),), "small.bid: is swapped with 'bid'"),
    ],
)
def test_a_contradiction_is_refused_with_the_feature_and_the_rule(
    set_id: str, features: tuple[Feature, ...], message: str
) -> None:
    with pytest.raises(FeatureSetError, match=message):
        FeatureSet(set_id, features)


def test_what_is_swapped_for_a_sell_has_the_same_bounds_and_sign_on_both_sides() -> None:
    for one in MF1.features:
        if one.swapped_with:
            partner = MF1.features[MF1.index[one.swapped_with]]
            assert (one.lowest, one.highest, one.signed) == (partner.lowest, partner.highest, partner.signed)
