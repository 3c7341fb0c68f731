"""A vector is inside or outside by itself, whatever others are looked at with it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.twins import compiled_here

from feature_cache import features
from feature_cache.domain import LOOK_NS, Domain, Watch
from feature_cache.feature_set import CALLER, Feature, FeatureSet

NAMES = ["imbalance_l1", "ofi_1s", "rv_5s_bps"]


def described(**changes: Any) -> dict[str, Any]:
    """Three features, of which the first two lean the same way."""
    correlation = np.array([[1.0, 0.8, 0.0], [0.8, 1.0, 0.0], [0.0, 0.0, 1.0]])
    return {
        "features": NAMES,
        "patterns": [0, 4],
        "low": [-1.0, -50.0, 0.0],
        "high": [1.0, 50.0, 40.0],
        "values": [[-1.0, 0.0, 1.0], [-10.0, 0.0, 10.0], [0.0, 1.0, 5.0]],
        "scores": [[-2.0, 0.0, 2.0], [-2.0, 0.0, 2.0], [-2.0, 0.0, 2.0]],
        "whitening": np.linalg.cholesky(np.linalg.inv(correlation)).tolist(),
        "distance": 12.0,
        "most_same": [10, 10, 10],
        "most_turned": [20.0, 20.0, 20.0],
        **changes,
    }


def row(imbalance: float = 0.1, ofi: float = 1.0, volatility: float = 1.0) -> np.ndarray[Any, np.dtype[np.float32]]:
    values = np.zeros(features.N_FEATURES, np.float32)
    values[[features.INDEX[name] for name in NAMES]] = imbalance, ofi, volatility
    return values


@pytest.mark.parametrize(
    ("values", "is_outside"),
    [
        (row(), False),
        (row(volatility=-0.1), True),
        (row(volatility=39.9), False),
        (row(volatility=40.1), True),
        (row(ofi=math.inf), True),
        (row(imbalance=1.0, ofi=10.0), False),
        (row(imbalance=1.0, ofi=-10.0), True),
        (row(volatility=math.nan), False),
        (row(ofi=math.nan), True),
        (row(ofi=math.nan, volatility=math.nan), True),
    ],
)
def test_ranges_patterns_and_what_goes_together(values: Any, is_outside: bool) -> None:
    assert Domain(described()).outside(values[None]).tolist() == [is_outside]


def test_where_all_was_never_defined_a_whole_vector_is_outside() -> None:
    assert Domain(described(patterns=[4])).outside(np.stack([row()])).tolist() == [True]


def test_a_vector_has_the_same_distance_alone_and_among_others() -> None:
    random = np.random.default_rng(1)
    for d in (1, 3, 9, 25):
        names = list(features.NAMES[:d])
        factor = random.normal(size=(d, d))
        domain = Domain(
            described(
                features=names,
                patterns=[0],
                low=[-9.0] * d,
                high=[9.0] * d,
                values=[sorted(random.normal(size=7).tolist()) for _ in names],
                scores=[sorted(random.normal(size=7).tolist()) for _ in names],
                whitening=np.linalg.cholesky(factor @ factor.T + np.eye(d)).tolist(),
                most_same=[1] * d,
                most_turned=[1.0] * d,
            )
        )
        rows = random.normal(size=(67, features.N_FEATURES)).astype(np.float32)
        together = domain.distances(rows)
        for n in (1, 2, 31):
            parts = [domain.distances(rows[first : first + n]) for first in range(0, len(rows), n)]
            assert np.concatenate(parts).tobytes() == together.tobytes()


def test_the_distance_is_that_of_mahalanobis() -> None:
    domain = Domain(described())
    rows = np.stack([row(0.5, -3.0, 2.0), row(-1.0, 4.0, 9.0), row(0.2, math.nan, 1.0)])
    scores = domain.normal_scores(rows)
    assert scores[0] == pytest.approx([1.0, -0.6, 0.5])
    assert (scores[1, 2], scores[2, 1]) == (2.0, 0.0), "beyond what was seen is at its end; undefined in the middle"
    whitening = np.array(described()["whitening"])
    expected = [one @ whitening @ whitening.T @ one for one in scores]
    assert domain.distances(rows) == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"low": [0.0]},
        {"whitening": [[1.0]]},
        {"values": [[1.0]] * 3},
        {"scores": [[], [], []], "values": [[], [], []]},
        {"features": ["imbalance_l1", "ofi_1s", "no_such_feature"]},
        {"distance": None},
        {"distance": math.nan},
        {"high": [1.0, math.nan, 40.0]},
        {"whitening": [[math.nan] * 3] * 3},
        {"values": [[-1.0, math.nan, 1.0]] * 3},
        {"values": [[-1.0, 1.0, 0.0]] * 3},
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        Domain(described(**changes))


def test_a_feature_is_stuck_after_more_looks_than_ever_and_only_while_others_change() -> None:
    random = np.random.default_rng(1)
    watch = Watch(Domain(described()))
    found = []
    for look in range(20):
        lean = float(random.normal())
        found.append(watch.see(row(0.2, lean, 1.0 + look), look * LOOK_NS + 1))
    assert found.index(True) == 11
    assert not watch.see(row(0.3, 0.1, 30.0), 20 * LOOK_NS + 1), "it moves again"


def test_vectors_that_come_too_soon_are_not_counted_and_time_may_begin_anew() -> None:
    watch = Watch(Domain(described()))
    for time_ns in range(0, LOOK_NS, LOOK_NS // 100):
        assert not watch.see(row(0.2, time_ns / LOOK_NS, time_ns / LOOK_NS), time_ns + 10**18)
    assert watch.same.max() == 0
    watch.see(row(0.2, 5.0, 5.0), 1)
    assert watch.same.tolist() == [1, 0, 0]


def test_a_turned_sign_adds_up_and_is_forgotten_again() -> None:
    random = np.random.default_rng(2)
    watch = Watch(Domain(described()))

    def look(number: int, sign: float) -> bool:
        lean = float(random.uniform(-0.9, 0.9))
        return watch.see(row(sign * lean, 9 * lean, 1.0 + number % 7), number * LOOK_NS + 1)

    assert not any(look(number, 1.0) for number in range(100))
    turned = [look(number, -1.0) for number in range(100, 200)]
    assert 3 < turned.index(True) < 40
    assert turned[-1]
    assert watch.turned[2] == 0.0, "volatility has no direction"
    right = [look(number, 1.0) for number in range(200, 300)]
    assert not right[60:][0]


def test_a_quiet_market_that_is_looked_at_again_is_neither_stuck_nor_turned() -> None:
    watch = Watch(Domain(described()))
    for look in range(3):
        watch.see(row(0.9, -9.0, 1.0 + look), look * LOOK_NS + 1)
    before = watch.turned.copy()
    assert before.max() > 0
    for look in range(3, 100):
        assert not watch.see(row(0.9, -9.0, 3.0), look * LOOK_NS + 1)
    assert watch.turned.tolist() == before.tolist()
    assert watch.same.max() <= 2


def edges(d: int) -> st.SearchStrategy[list[list[float]]]:
    """Vectors of d features with values at the ends and in the middle of what was seen, beyond it, and undefined."""
    value = st.sampled_from([-9.5, -9.0, -1.5, -1.0, 0.0, 0.3, 1.0, 9.0, 9.5, math.nan, math.inf]) | st.floats(
        -2, 2, width=32
    )
    return st.lists(st.lists(value, min_size=d, max_size=d), min_size=1, max_size=12)


def random_domain(d: int, seed: int, feature_set: FeatureSet = features.MF1) -> dict[str, Any]:
    """A model of d features, of which one has had a single value."""
    random = np.random.default_rng(seed)
    factor = random.normal(size=(d, d))
    lengths = [1, *random.integers(2, 9, d - 1)]
    return described(
        features=list(feature_set.names[:d]),
        patterns=[0, 1, *random.integers(0, 2 ** min(d, 60), 4).tolist()],
        low=[-9.0] * d,
        high=[9.0] * d,
        values=[sorted(random.normal(size=n).tolist()) for n in lengths],
        scores=[sorted(random.normal(size=n).tolist()) for n in lengths],
        whitening=np.linalg.cholesky(factor @ factor.T + np.eye(d)).tolist(),
        distance=3.0 * d,
        most_same=[2] * d,
        most_turned=[2.0] * d,
    )


@given(st.sampled_from([1, 3, 9, 25]).flatmap(lambda d: st.tuples(st.just(d), edges(d))), st.integers(0, 3))
def test_the_compiled_twin_says_of_every_vector_what_numpy_says(seen: tuple[int, list[list[float]]], seed: int) -> None:
    (d, vectors), domain = seen, Domain(random_domain(seen[0], seed))
    domain.seen = compiled_here("feature_cache.domain_c").Seen(domain)
    rows = np.zeros((len(vectors), features.N_FEATURES), features.ROW)
    rows[:, :d] = vectors
    alone = [domain.outside(row[None]).item() for row in rows]
    assert domain.are_outside([row.tobytes() for row in rows]) == alone
    compiled, plain = Watch(domain), Watch(domain)
    for row in rows:
        assert compiled._take_compiled(row) == plain._take(row)
        assert (compiled.same.tolist(), compiled.turned.tolist()) == (plain.same.tolist(), plain.turned.tolist())


WIDE = FeatureSet(
    "wide",
    tuple(
        Feature(f"f{i}", "", "Of a guest.", signed=i % 2 == 0, source=CALLER if i in (3, 70) else "")
        for i in range(150)
    ),
)


def test_more_features_than_a_number_has_bits_have_their_patterns_and_the_callers_are_not_watched() -> None:
    patterns = [0, 1 << 149 | 1, 1 << 64]
    domain = Domain(random_domain(150, 4, WIDE) | {"patterns": patterns, "distance": 1e9}, WIDE)
    domain.seen = compiled_here("feature_cache.domain_c").Seen(domain)
    rows = np.zeros((6, 150), features.ROW)
    undefined: list[list[int]] = [[], [0, 149], [64], [0], [149], [0, 64]]
    for row, places in zip(rows, undefined, strict=True):
        row[places] = math.nan
    expected = [False, False, False, True, True, True]
    assert domain.outside(rows).tolist() == expected
    assert domain.are_outside([row.tobytes() for row in rows]) == expected
    random = np.random.default_rng(5)
    compiled, plain = Watch(domain), Watch(domain)
    stuck = random.normal(size=150).astype(np.float32)
    for look in range(30):
        row = random.normal(size=150).astype(np.float32)
        row[[3, 5, 70]] = stuck[[3, 5, 70]]
        row[::7] = math.nan if look % 5 else 0.0
        assert compiled._take_compiled(row) == plain._take(row)
        assert (compiled.same.tolist(), compiled.turned.tolist()) == (plain.same.tolist(), plain.turned.tolist())
    assert plain.same[[3, 5, 70]].tolist() == [0, 29, 0]
    assert plain.turned[5] == 0 < plain.turned[4], "it has no direction, and the next one has"
    assert plain.turned[70] == 0


@pytest.mark.parametrize("pattern", [-1, 8, 1 << 70])
def test_a_pattern_of_other_features_is_refused(pattern: int) -> None:
    with pytest.raises(ValueError, match="not of its features"):
        Domain(described(patterns=[0, pattern]))


def test_the_compiled_twin_refuses_what_is_no_row() -> None:
    domain = Domain(described())
    domain.seen = compiled_here("feature_cache.domain_c").Seen(domain)
    with pytest.raises(ValueError, match="no row"):
        domain.are_outside([b"short"])
