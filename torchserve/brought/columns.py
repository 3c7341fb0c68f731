"""Whether a model's columns are those of a feature set."""

from __future__ import annotations

from collections.abc import Sequence

from feature_cache.feature_set import FeatureSet
from torchserve.brought.errors import BroughtError


def check_names(names: Sequence[str] | None, feature_set: FeatureSet) -> None:
    """Holds the names of a model's columns, where it has any, against the set's.

    Raises:
        BroughtError: One is another.
    """
    for place, (name, wanted) in enumerate(zip(names or (), feature_set.names, strict=False)):
        if name != wanted:
            raise BroughtError(
                f"the model's column {place + 1} is {name!r}, that of {feature_set.id} is {wanted!r}: train it with the"
                " columns in the order of the set (`pretrade features show` prints it)"
            )


def check_width(width: int, feature_set: FeatureSet) -> None:
    """Raises BroughtError where a model takes another number of features than the set has."""
    if width != len(feature_set):
        raise BroughtError(
            f"the model takes {width} features, {feature_set.version} has {len(feature_set)}: train it on all columns"
            " of the set in their order, or name another set with --features"
        )
