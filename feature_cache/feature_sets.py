"""The feature sets that this process knows: `mf1`, those of installed packages, and those of a file of the operator's.

A package names its sets as entry points of the group `pretrade.features`, a file in its list `FEATURE_SETS`. Each is a
`FeatureSet` whose features all come from elsewhere, or a `ComputedSet`, which says how its own features are computed::

    [project.entry-points."pretrade.features"]
    numbers = "my_package:NUMBERS"

A model, a vector and a message name their set by fingerprint or by id, so both are unique here. A package that cannot
be imported is logged and left out, because nobody may need its sets. A file that cannot be read is an error.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from importlib.metadata import entry_points
from pathlib import Path
from types import CodeType
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from feature_cache.feature_set import CALLER, FeatureSet, FeatureSetError
from feature_cache.features import MF1
from pretrade.market.v1 import market_pb2 as pb

GROUP: Final = "pretrade.features"
"""Of the entry points."""
FILE_VARIABLE: Final = "PRETRADE_FEATURES__FILE"
"""Names the file for whatever has no settings of its own, such as training and the `pretrade` command."""
LIST: Final = "FEATURE_SETS"
"""What a file calls the list of its sets."""
_OURS: Final = "pretrade"


class Computer(Protocol):
    """Computes a set's own features for one instrument."""

    def on_event(self, event: pb.MarketEvent) -> None:
        """Takes one event of the instrument, in the order of the log and after the engine of `mf1` has accepted it."""
        ...

    def values(self) -> NDArray[np.float32]:
        """The set's own features as of the newest event: float32, in the set's order without those that have a source.

        NaN where a value is undefined. Nothing but the events may decide it, and above all no clock: so that a
        recording gives the same values again.
        """
        ...


Make = Callable[[str], Computer]
"""Makes the computer of an instrument, `SYMBOL.VENUE`."""


@dataclass(frozen=True, slots=True)
class ComputedSet:
    """A set with features of its own."""

    feature_set: FeatureSet
    make: Make
    """Makes a computer that knows nothing but the events that it is shown."""
    resume: Make | None = None
    """The same in a worker that takes an instrument over: it may look up what was stored of the instrument's past, so
    that its values are those of a worker that was never away. None: `make`."""


class ImpossibleValuesError(ValueError):
    """A computer gave what its set's definition excludes; the message names feature and rule."""


class Part(NamedTuple):
    """The features of a set that have one source."""

    source: str
    """The id of a set, this one's own among them."""
    places: NDArray[np.intp]
    """In the set."""
    in_source: NDArray[np.intp]
    """The same features in their source."""
    ages: NDArray[np.float32]
    """1 for an age, to which that of the source's vector is added; else 0."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A set that this process knows."""

    feature_set: FeatureSet
    make: Make | None
    """None for `mf1`, which the engine computes, and for a set whose features all come from elsewhere."""
    origin: str
    """Where it was found, for people."""
    resume: Make | None = None
    """See `ComputedSet`."""
    own: tuple[int, ...] = field(init=False)
    """Places of the features that it computes itself."""
    _places: NDArray[np.intp] = field(init=False, compare=False, repr=False)
    _lowest: NDArray[np.float32] = field(init=False, compare=False, repr=False)
    _highest: NDArray[np.float32] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        own = self.feature_set.from_source("")
        places = np.array(own, dtype=np.intp)
        object.__setattr__(self, "own", own)
        object.__setattr__(self, "_places", places)
        object.__setattr__(self, "_lowest", self.feature_set.lowest[places])
        object.__setattr__(self, "_highest", self.feature_set.highest[places])

    def row(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """A whole row with a computer's values in their places, and NaN where a feature comes from elsewhere.

        Raises:
            ImpossibleValuesError: They are another number of values, infinite, or outside of their ranges.
        """
        own = np.asarray(values, dtype=np.float32)
        if own.shape != self._places.shape:
            raise ImpossibleValuesError(f"values() has the shape {own.shape}, not ({len(self.own)},)")
        wrong = np.isinf(own) | (own < self._lowest) | (own > self._highest)
        if wrong.any():
            place = int(np.argmax(wrong))
            feature = self.feature_set.features[self.own[place]]
            raise ImpossibleValuesError(
                f"{feature.name} is {own[place]:g}, not finite and from {feature.lowest:g} to {feature.highest:g}"
            )
        row = np.full(len(self.feature_set), np.nan, dtype=np.float32)
        row[self._places] = own
        return row


class FeatureSets:
    """Sets by id and by fingerprint.

    Args:
        found: All but `mf1`, which is always there.

    Raises:
        FeatureSetError: Two have one id or one fingerprint, a feature has no source and no computer, or its source has
            no such feature.
    """

    def __init__(self, found: Iterable[Registered] = ()) -> None:
        self._by_id: dict[str, Registered] = {}
        self._by_fingerprint: dict[int, Registered] = {}
        for one in (Registered(MF1, None, _OURS), *found):
            self._add(one)
        for one in self:
            self._check(one)

    def __iter__(self) -> Iterator[Registered]:
        return iter(self._by_id.values())

    def by_id(self, set_id: str) -> Registered | None:
        """The set of this id; None if there is none."""
        return self._by_id.get(set_id)

    def by_fingerprint(self, fingerprint: int) -> Registered | None:
        """The set of this fingerprint; None if there is none."""
        return self._by_fingerprint.get(fingerprint)

    def _add(self, one: Registered) -> None:
        feature_set = one.feature_set
        same = self._by_id.get(feature_set.id) or self._by_fingerprint.get(feature_set.fingerprint)
        if same is not None:
            raise FeatureSetError(
                f"{feature_set.version} of {one.origin}: {same.origin} has {same.feature_set.version} already, and an "
                "id or fingerprint names one set only; give it another id"
            )
        self._by_id[feature_set.id] = self._by_fingerprint[feature_set.fingerprint] = one

    def _check(self, one: Registered) -> None:
        feature_set = one.feature_set
        if feature_set is MF1:
            return
        if one.own and one.make is None:
            name = feature_set.names[one.own[0]]
            raise FeatureSetError(
                f"{feature_set.id}.{name} of {one.origin}: has no source; name one, or make the set a ComputedSet"
            )
        if one.make is not None and not one.own:
            raise FeatureSetError(f"{feature_set.id} of {one.origin}: all its features have a source, so it has no own")
        for feature in feature_set.features:
            if feature.source in ("", CALLER):
                continue
            where, source = f"{feature_set.id}.{feature.name} of {one.origin}", self._by_id.get(feature.source)
            if source is None:
                known = ", ".join((*self._by_id, CALLER))
                raise FeatureSetError(f"{where}: its source {feature.source!r} is no set known here: {known}")
            place = source.feature_set.index.get(feature.name)
            if place is None or source.feature_set.features[place].source:
                raise FeatureSetError(f"{where}: {feature.source} does not compute a feature of this name")
            original = source.feature_set.features[place]
            for rule in ("signed", "is_age", "swapped_with"):
                if getattr(feature, rule) != getattr(original, rule):
                    raise FeatureSetError(
                        f"{where}: `{rule}` must be {getattr(original, rule)!r}, as in {feature.source}"
                    )


def of_packages() -> list[Registered]:
    """The sets of all packages that can be imported."""
    found = []
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        origin = f"{entry.dist.name if entry.dist else 'a package'} ({entry.value})"
        try:
            found.append(_registered(entry.load(), origin))
        except Exception as error:  # guests' code: whatever it raises must not end a process that does not need it
            import structlog  # noqa: PLC0415  the readiness check of a model server reads this file, in an image without it

            structlog.get_logger(__name__).warning("feature_sets.left_out", origin=origin, error=repr(error))
    return found


class _Source(SourceFileLoader):
    """Runs what a file holds now. Bytecode is told by the size and the second of its source, which may be the same."""

    def get_code(self, fullname: str) -> CodeType:
        """Compiles it."""
        return self.source_to_code(self.get_data(self.path), self.path)


def of_file(path: Path) -> list[Registered]:
    """The sets of a file.

    Raises:
        FeatureSetError: It cannot be read or run, or has no list of sets.
    """
    name = f"pretrade_feature_sets_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_Source(name, str(path)))
    if path.suffix != ".py" or spec is None or spec.loader is None:
        raise FeatureSetError(f"{path}: must be a Python file, and end with .py")
    if not path.is_file():
        raise FeatureSetError(f"{path}: there is no such file ({path.absolute()})")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except FeatureSetError as error:
        raise FeatureSetError(f"{path}: {error}") from error
    except Exception as error:
        raise FeatureSetError(f"{path}: cannot be run: {error!r}") from error
    sets = getattr(module, LIST, None)
    if not isinstance(sets, Sequence) or not sets:
        raise FeatureSetError(f"{path}: must have a list {LIST} of at least one FeatureSet or ComputedSet")
    return [_registered(one, str(path)) for one in sets]


def _registered(found: Any, origin: str) -> Registered:
    feature_set = found if isinstance(found, FeatureSet) else getattr(found, "feature_set", None)
    make, resume = getattr(found, "make", None), getattr(found, "resume", None)
    is_sound = all(one is None or callable(one) for one in (make, resume))
    if not isinstance(feature_set, FeatureSet) or not is_sound:
        raise FeatureSetError(
            f"{origin}: is {found!r:.80}, not a FeatureSet or an object with `feature_set` and `make`"
        )
    return Registered(feature_set, make, origin, resume)


_loaded: dict[Path | None, FeatureSets] = {}
"""The sets of this process by the file that was asked for, the last one at the end: a file is run once only."""


def load(file: Path | None) -> FeatureSets:
    """All sets: `mf1`, those of packages, and those of a file. This process knows them from now on.

    Raises:
        FeatureSetError: See `of_file` and `FeatureSets`.
    """
    sets = _loaded.pop(file, None)
    if sets is None:
        sets = FeatureSets([*of_packages(), *(of_file(file) if file is not None else ())])
    _loaded[file] = sets
    return sets


def known() -> FeatureSets:
    """The sets that this process has loaded; if it has loaded none, those of packages and of `FILE_VARIABLE`.

    Raises:
        FeatureSetError: As `load`, if it is the first to ask.
    """
    if not _loaded:
        file = os.environ.get(FILE_VARIABLE)
        return load(Path(file) if file else None)
    return _loaded[next(reversed(_loaded))]


def by_id(set_id: str) -> FeatureSet | None:
    """The set of this id that this process knows; None if there is none. Raises as `known`."""
    if set_id == MF1.id:
        return MF1
    found = known().by_id(set_id)
    return None if found is None else found.feature_set


def by_fingerprint(fingerprint: int) -> FeatureSet | None:
    """The set of this fingerprint that this process knows; None if there is none. Raises as `known`."""
    if fingerprint == MF1.fingerprint:
        return MF1
    found = known().by_fingerprint(fingerprint)
    return None if found is None else found.feature_set


def by_version(version: str) -> FeatureSet | None:
    """The set that `FeatureSet.version` names so; None if this process knows another one or none. Raises as `known`."""
    found = by_id(version.partition("/")[0]) if version else None
    return found if found is not None and found.version == version else None


def parts_of(feature_set: FeatureSet) -> tuple[Part, ...]:
    """What a vector of a known set is put together of, one for each source that is not the caller."""
    sources = dict.fromkeys(one.source for one in feature_set.features)
    return tuple(_part(feature_set, source) for source in sources if source != CALLER)


def _part(feature_set: FeatureSet, source: str) -> Part:
    places = feature_set.from_source(source)
    origin = feature_set if not source else by_id(source)
    assert origin is not None, "a set is known only with its sources"
    names = [feature_set.names[place] for place in places]
    return Part(
        origin.id,
        np.array(places, dtype=np.intp),
        np.array([origin.index[name] for name in names], dtype=np.intp),
        np.array([1.0 if feature_set.features[place].is_age else 0.0 for place in places], dtype=np.float32),
    )


def names() -> str:
    """What this process knows, for messages: `mf1/d953e411, numbers/6044231b`."""
    return ", ".join(one.feature_set.version for one in known())


def vector_of(given: Mapping[str, float], set_id: str = "") -> tuple[str, list[float]]:
    """What an order brings, as the contract has it: the id of a set, and a value for each of its features.

    Args:
        given: Values by the names of features. What is not there is NaN, which leaves it to the server.
        set_id: The set; empty for the one whose callers bring features of these names.

    Raises:
        FeatureSetError: No set has them, or more than one; or as `known`.
    """
    sets = [one.feature_set for one in known()]
    asked = ", ".join(given)
    if set_id:
        found = [one for one in sets if one.id == set_id]
        if not found:
            raise FeatureSetError(f"{set_id!r} is no set known here: {names()}")
        if lacking := [name for name in given if name not in found[0].index]:
            raise FeatureSetError(f"{set_id} has no feature {', '.join(lacking)}: it has {', '.join(found[0].names)}")
    else:
        brought = [{one.features[place].name for place in one.from_source(CALLER)} for one in sets]
        found = [one for one, bring in zip(sets, brought, strict=True) if bring.issuperset(given)]
    if not found:
        raise FeatureSetError(f"no set known here has callers bring {asked}: {names()}")
    if len(found) > 1:
        raise FeatureSetError(f"callers bring {asked} for {', '.join(one.id for one in found)}: name the set")
    (feature_set,) = found
    return feature_set.id, [given.get(name, math.nan) for name in feature_set.names]
