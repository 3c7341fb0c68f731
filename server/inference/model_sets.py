"""Which feature set a model takes, as far as that is known.

A version is the hash of its content, its feature set included, so what is once known of it is true for good and in the
whole process. It is learnt from the answers of model servers, which carry the set's fingerprint, from archives, and
from a model server that refuses a row and names the set that it wants. A version of which nothing is known is taken to
want `mf1`: if that is wrong, the first probe or batch is refused, and teaches.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from feature_cache import feature_sets
from feature_cache.feature_set import FeatureSet, SetRow
from feature_cache.features import MF1

if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST_KNOWN: Final = 1024
"""Versions of other sets than `mf1`; the oldest is forgotten first."""
_WANTED: Final = re.compile(r"this model's is ([0-9a-f]{8})\b")
"""What `torchserve/handler.py` says of a row of another set."""
_known: dict[str, FeatureSet] = {}


def of(version: str) -> FeatureSet:
    """The set that a model version takes."""
    return _known.get(version, MF1)


def learn(version: str, feature_set: FeatureSet) -> None:
    """Keeps the set that a version takes."""
    if feature_set is of(version):
        return
    _known[version] = feature_set
    if len(_known) > _MOST_KNOWN:
        del _known[next(iter(_known))]
    import structlog  # noqa: PLC0415  the readiness check of a model server reads this file, in an image without it

    structlog.get_logger(__name__).info("a model takes its own feature set", version=version, set=feature_set.version)


def learn_from_refusal(version: str, message: str) -> None:
    """Keeps the set that a model server says it wants instead of the one that it got, if it says so."""
    fingerprint = wanted_in(message)
    feature_set = None if fingerprint is None else feature_sets.by_fingerprint(fingerprint)
    if feature_set is not None:
        learn(version, feature_set)


def wanted_in(message: str) -> int | None:
    """Fingerprint of the set that a model server says it wants instead of the one it got; None if it does not say."""
    found = _WANTED.search(message)
    return None if found is None else int(found[1], 16)


def set_of(rows: Sequence[bytes]) -> FeatureSet | None:
    """The set that all these rows are of; None if they are of several."""
    if set(map(type, rows)) == {bytes}:
        return MF1
    sets = {getattr(row, "feature_set", MF1) for row in rows}
    return sets.pop() if len(sets) == 1 else None


def row_of(feature_set: FeatureSet, values: bytes) -> bytes:
    """A row that says which set it is of, from little-endian float32."""
    return values if feature_set is MF1 else SetRow.of(feature_set, values)
