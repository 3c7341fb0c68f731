"""A feature set: what a model, a store and a server must agree on before a vector means anything.

    NUMBERS = FeatureSet(
        "numbers",
        (
            Feature("spread_bps", "bps", "Copied from mf1.", source="mf1"),
            Feature("momentum", "bps", "Mine: price now against a second ago.", signed=True),
            Feature("urgency", "", "The caller's own view, 0 to 1.", lowest=0.0, highest=1.0, source=CALLER),
        ),
    )
    NUMBERS.version     # "numbers/1f0c83aa": its id and fingerprint
    NUMBERS.for_sell(values)

A set is a value: two sets with the same fingerprint are the same set. `features.MF1` is the one that this product
computes itself, and the one that rules, guards and freshness use whatever a model takes.

A vector is float32, one value for each feature in the order of the set. Undefined is NaN.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

CALLER: Final = "caller"
"""Source of a feature that the order brings."""
ROW: Final = np.dtype("<f4")
"""How a value is stored wherever a vector is bytes."""
_SET_ID: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_MOST_FEATURES: Final = 512


class FeatureSetError(ValueError):
    """A set contradicts itself; the message names the feature and the rule."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature, in market orientation: as it is for a buy."""

    name: str
    unit: str
    """For people: `bps`, `ms`, `1/s`; empty for a ratio."""
    doc: str
    """What it says, in a sentence."""
    lowest: float = -math.inf
    """The least that its definition leaves possible, included."""
    highest: float = math.inf
    """The most that its definition leaves possible, included."""
    signed: bool = False
    """Whether it carries a direction, and is therefore negated for a sell."""
    swapped_with: str = ""
    """Another feature of the set, of the other side of the book: the two change places for a sell."""
    is_age: bool = False
    """Whether it is an age in milliseconds, to which a server adds the age of the snapshot."""
    source: str = ""
    """Where its value comes from: empty for the set's own computation, `CALLER`, or the id of another set that has a
    feature of this name."""
    may_be_undefined: bool = True
    """Whether a caller may leave it out with NaN."""


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """Features in their order.

    Args:
        id: Its name; a lower-case word.
        features: At least one.

    Raises:
        FeatureSetError: A name is taken twice, a range is empty, a swap has no partner, or a word is not one.
    """

    id: str
    features: tuple[Feature, ...]
    names: tuple[str, ...] = field(init=False, compare=False)
    index: dict[str, int] = field(init=False, compare=False, repr=False)
    """Place of each feature by its name."""
    fingerprint: int = field(init=False, compare=False)
    """uint32 that changes with the id, and with name, place, source and turning of any feature; carried by every vector
    and every model answer."""
    lowest: NDArray[np.float32] = field(init=False, compare=False, repr=False)
    """float32[n]."""
    highest: NDArray[np.float32] = field(init=False, compare=False, repr=False)
    """float32[n]."""
    may_be_undefined: NDArray[np.bool_] = field(init=False, compare=False, repr=False)
    """bool[n]: which features a caller may leave out with NaN."""
    _sell_sign: NDArray[np.float32] = field(init=False, compare=False, repr=False)
    _sell_order: NDArray[np.intp] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check(self.id, self.features)
        names = tuple(one.name for one in self.features)
        index = {name: place for place, name in enumerate(names)}
        derived = {
            "names": names,
            "index": index,
            "fingerprint": zlib.crc32(_meaning(self.id, self.features).encode()),
            "lowest": np.array([one.lowest for one in self.features], dtype=np.float32),
            "highest": np.array([one.highest for one in self.features], dtype=np.float32),
            "may_be_undefined": np.array([one.may_be_undefined for one in self.features], dtype=np.bool_),
            "_sell_sign": np.array([-1.0 if one.signed else 1.0 for one in self.features], dtype=np.float32),
            "_sell_order": np.array([index[one.swapped_with or one.name] for one in self.features], dtype=np.intp),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.features)

    def __hash__(self) -> int:
        return self.fingerprint

    @property
    def version(self) -> str:
        """Id and fingerprint, for people."""
        return f"{self.id}/{self.fingerprint:08x}"

    @property
    def row_bytes(self) -> int:
        """How many bytes a vector takes."""
        return ROW.itemsize * len(self.features)

    @property
    def signed(self) -> tuple[str, ...]:
        """Features that carry a direction: negated for a sell."""
        return tuple(one.name for one in self.features if one.signed)

    @property
    def ages(self) -> tuple[int, ...]:
        """Places of the ages."""
        return tuple(place for place, one in enumerate(self.features) if one.is_age)

    def from_source(self, source: str) -> tuple[int, ...]:
        """Places of the features that have this source."""
        return tuple(place for place, one in enumerate(self.features) if one.source == source)

    def for_sell(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Turns market-oriented features into what a model sees for a sell.

        Sign-carrying features are negated and those of both sides swapped, so that one model serves both sides; for a
        buy the vector is used as it is. Turning twice gives the vector back.

        Args:
            values: float32[..., n] in market orientation.

        Returns:
            A new float32[..., n].
        """
        return values.take(self._sell_order, axis=-1) * self._sell_sign


class SetRow(bytes):
    """A vector of another set than `mf1` as a model gets it: bytes that say which set they are of.

    Those of `mf1` are plain bytes, so that they cost nothing more.
    """

    feature_set: FeatureSet

    @classmethod
    def of(cls, feature_set: FeatureSet, values: bytes) -> SetRow:
        """A vector of a set, little-endian float32."""
        row = cls(values)
        row.feature_set = feature_set
        return row


def _check(set_id: str, features: tuple[Feature, ...]) -> None:
    if not _SET_ID.fullmatch(set_id) or set_id == CALLER:
        raise FeatureSetError(f"id: {set_id!r} must be a lower-case word of at most 32 characters, and not {CALLER!r}")
    if not 1 <= len(features) <= _MOST_FEATURES:
        raise FeatureSetError(f"{set_id}: must have 1 to {_MOST_FEATURES} features, not {len(features)}")
    by_name: dict[str, Feature] = {}
    for one in features:
        where = f"{set_id}.{one.name}"
        if not _NAME.fullmatch(one.name):
            raise FeatureSetError(f"{where}: a name must be a lower-case word of at most 64 characters")
        if one.name in by_name:
            raise FeatureSetError(f"{where}: is in the set twice")
        if not one.lowest <= one.highest:
            raise FeatureSetError(f"{where}: lowest {one.lowest:g} is above highest {one.highest:g}")
        if one.source == set_id:
            raise FeatureSetError(f"{where}: a set cannot be its own source; leave `source` out")
        by_name[one.name] = one
    for one in features:
        partner = by_name.get(one.swapped_with)
        if one.swapped_with and (partner is None or partner.swapped_with != one.name or partner is one):
            raise FeatureSetError(f"{set_id}.{one.name}: is swapped with {one.swapped_with!r}, which must name it back")


def _meaning(set_id: str, features: tuple[Feature, ...]) -> str:
    """All that decides what a vector's values are, as text."""
    each = (f"{one.name}|{one.source}|{int(one.signed)}|{one.swapped_with}|{int(one.is_age)}" for one in features)
    return f"{set_id}:{','.join(each)}"
