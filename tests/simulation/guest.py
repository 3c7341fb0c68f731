"""The feature set of a simulated server's second model, half of `mf1`'s features and half computed by the worker.

A file of feature sets like a user's own: `feature_cache.feature_sets.load` reads it.
"""

from __future__ import annotations

from typing import Any, Final

from feature_cache.feature_set import Feature, FeatureSet
from feature_cache.feature_sets import ComputedSet

MODEL: Final = "second"
"""What the second model is called."""
GUEST: Final = FeatureSet(
    "guest",
    (
        Feature("weighted_mid_bps", "bps", "Copied.", signed=True, source="mf1"),
        Feature("flow", "", "Computed.", -1.0, 1.0, signed=True),
    ),
)
_nobody: Any = object  # the simulated market computes it
FEATURE_SETS: Final = [ComputedSet(GUEST, _nobody)]
