"""Numbers for people."""

from __future__ import annotations

import math

import pytest

from pretrade.client.figures import figure


@pytest.mark.parametrize(
    ("value", "spec", "shown"), [(0.25, ".1%", "25.0%"), (1234.5, ",.2f", "1,234.50"), (math.nan, "+.3f", "–")]
)
def test_a_number_that_is_none_is_a_dash(value: float, spec: str, shown: str) -> None:
    assert figure(value, spec) == shown
