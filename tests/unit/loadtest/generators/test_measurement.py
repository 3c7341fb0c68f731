"""The percentile that the benchmark shows."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loadtest.generators.measurement import percentile

SHARES = st.sampled_from([0.01, 0.5, 0.9, 0.99, 0.999, 1.0])
VALUES = st.lists(st.floats(0, 10, allow_nan=False), min_size=1, max_size=300)


@given(VALUES, SHARES)
def test_it_is_the_nearest_rank_of_numpy(values: list[float], share: float) -> None:
    assert percentile(values, share) == np.percentile(values, 100 * share, method="inverted_cdf")


def test_of_100_values_the_99th_percentile_is_the_99th() -> None:
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile(range(1, 101), 0.5) == 50
