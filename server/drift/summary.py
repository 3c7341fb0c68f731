"""What recorded decisions say of drift: features and score against the model's reference, and what is missing."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fallback.order import CHAMPION_SOURCES
from feature_cache import features
from pretrade.audit.v1 import packet_pb2
from server.drift.psi import Reference, correlation_time, limit, psi, references_of
from server.errors import ModelUnknownError

SCORE: Final = "score"
FALSE_ALARMS: Final = 0.01
"""Probability that any feature of a report without drift is called drifted."""
FEWEST: Final = 30
"""Independent values below which nothing is said."""
_WINDOWS: Final = 12


@dataclass(frozen=True, slots=True)
class Drift:
    """One feature, or the score, of the decisions against the reference."""

    name: str
    psi: float
    limit: float | None
    """PSI that is exceeded without drift only once in a hundred reports; None where there are too few values to say."""
    independent: int
    """Values, less those that only repeat others."""
    undefined: float
    """Share of NaN."""
    undefined_before: float
    """The same in the reference."""

    @property
    def drifted(self) -> bool:
        """True when chance hardly explains it."""
        return self.limit is not None and self.psi > self.limit


@dataclass(frozen=True, slots=True)
class Window:
    """A part of the time that a report covers."""

    since_ns: int
    rows: int
    psi: Mapping[str, float]
    """By feature, and the score."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A report on recorded decisions."""

    decisions: int
    rows: int
    """Different states of the market among them, by side: what decisions say more than once counts once."""
    since_ns: int
    until_ns: int
    model_version: str = ""
    """The version most of them were scored by, whose reference it is; empty where there is none."""
    problem: str = ""
    """Why there is no comparison; empty when there is one."""
    drifts: tuple[Drift, ...] = ()
    """By feature in the order of the feature set, the score last."""
    windows: tuple[Window, ...] = ()
    """The same over time."""
    missing: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Share of undefined values by instrument and feature; without features all of them are."""

    @property
    def drifted(self) -> tuple[Drift, ...]:
        """What has drifted, the worst first."""
        found = (one for one in self.drifts if one.drifted)
        return tuple(sorted(found, key=lambda one: one.psi / (one.limit or 1.0), reverse=True))


@dataclass(slots=True)
class _Rows:
    times: list[int] = field(default_factory=list)
    instruments: list[str] = field(default_factory=list)
    values: list[bytes] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


def summarise(packets: Iterable[packet_pb2.DecisionPacket], metadata: Callable[[str], Mapping[str, Any]]) -> Summary:
    """Compares decisions, in any order, with what their model learnt from.

    Args:
        packets: Of the decisions.
        metadata: A model version's; raises `ModelUnknownError` where there is none.
    """
    found = sorted(packets, key=lambda packet: packet.decision.decision_id)
    versions = Counter(one.decision.model_version for one in found if one.decision.source in CHAMPION_SOURCES)
    rows, missing = _Rows(), _Missing()
    seen: set[tuple[str, int, int]] = set()
    version = versions.most_common(1)[0][0] if versions else ""
    for packet in found:
        instrument = packet.order.instrument
        if packet.feature_set_id != features.FEATURE_SET_ID or len(packet.model_input) != 4 * features.N_FEATURES:
            missing.add_nothing(instrument)
            continue
        state = (instrument, packet.order.side, packet.features.sequence)
        if packet.features.sequence and state in seen:
            continue
        seen.add(state)
        missing.add(instrument, packet.model_input)
        rows.times.append(_decided_at(packet))
        rows.instruments.append(instrument)
        rows.values.append(packet.model_input)
        scored = packet.decision.source in CHAMPION_SOURCES and packet.decision.model_version == version
        rows.scores.append(packet.decision.score if scored and packet.decision.HasField("score") else np.nan)
    times = [_decided_at(packet) for packet in found]
    summary = Summary(
        decisions=len(found),
        rows=len(rows.times),
        since_ns=min(times, default=0),
        until_ns=max(times, default=0),
        model_version=version,
        missing=missing.shares(),
    )
    if not version:
        return replace(summary, problem="no decision was scored by a model")
    try:
        references = references_of(metadata(version))
    except ModelUnknownError as error:
        return replace(summary, problem=str(error))
    matrix = np.frombuffer(b"".join(rows.values), dtype=features.ROW).reshape(-1, features.N_FEATURES)
    columns = {name: matrix[:, i] for name, i in features.INDEX.items()}
    columns[SCORE] = np.array(rows.scores, dtype=np.float64)
    columns = {name: values for name, values in columns.items() if name in references}
    groups = _groups(rows.instruments)
    alpha = FALSE_ALARMS / max(1, len(columns))
    drifts = tuple(_drift(name, references[name], _known(name, columns[name]), groups, alpha) for name in columns)
    return replace(summary, drifts=drifts, windows=_over_time(rows.times, columns, references))


def metadata_of(files: Mapping[str, bytes]) -> Mapping[str, Any]:
    """The metadata among an archive's files."""
    found: Mapping[str, Any] = json.loads(files["metadata.json"])
    return found


def _decided_at(packet: packet_pb2.DecisionPacket) -> int:
    return int(packet.decision.decided_at.ToNanoseconds())


def _known(name: str, values: NDArray[Any]) -> NDArray[Any]:
    """A decision without a score is not a decision with an undefined score."""
    return values[~np.isnan(values)] if name == SCORE else values


def _groups(instruments: list[str]) -> list[NDArray[np.intp]]:
    names = np.array(instruments)
    return [np.flatnonzero(names == name) for name in sorted(set(instruments))]


def _drift(
    name: str, reference: Reference, values: NDArray[Any], groups: list[NDArray[np.intp]], alpha: float
) -> Drift:
    places = reference.places(values).astype(np.float64)
    series = groups if name != SCORE else [np.arange(len(values))]
    times = [(len(one), correlation_time(places[one])) for one in series if len(one)]
    independent = round(sum(count / time for count, time in times))
    each = max(1.0, len(values) / max(1, independent))
    counts = reference.counts(values)
    found = float(psi(reference.shares, reference.samples, counts)) if len(values) else 0.0
    enough = independent >= FEWEST and reference.samples > 0
    bound = limit(reference.shares, max(2, round(reference.samples / each)), _rounded(independent), alpha)
    undefined = float(np.isnan(values).mean()) if len(values) else 0.0
    return Drift(name, found, bound if enough else None, independent, undefined, reference.shares[-1])


def _rounded(count: int) -> int:
    """To two digits, downwards: simulated limits are kept by it."""
    step = int(10 ** max(0, len(str(count)) - 2))
    return max(2, count // step * step)


def _over_time(
    times: list[int], columns: Mapping[str, NDArray[Any]], references: Mapping[str, Reference]
) -> tuple[Window, ...]:
    if not times:
        return ()
    at = np.array(times, dtype=np.int64)
    edges = np.linspace(at.min(), at.max() + 1, _WINDOWS + 1)
    windows = []
    for since, until in pairwise(edges):
        inside = (at >= since) & (at < until)
        if inside.sum() < FEWEST:
            continue
        found = {}
        for name, values in columns.items():
            counts = references[name].counts(_known(name, values[inside]))
            found[name] = float(psi(references[name].shares, references[name].samples, counts))
        windows.append(Window(int(since), int(inside.sum()), found))
    return tuple(windows)


class _Missing:
    """Counts undefined values by instrument."""

    def __init__(self) -> None:
        self._undefined: dict[str, NDArray[np.int64]] = defaultdict(lambda: np.zeros(features.N_FEATURES, np.int64))
        self._rows: Counter[str] = Counter()

    def add(self, instrument: str, row: bytes) -> None:
        self._undefined[instrument] += np.isnan(np.frombuffer(row, dtype=features.ROW))
        self._rows[instrument] += 1

    def add_nothing(self, instrument: str) -> None:
        self._undefined[instrument] += 1
        self._rows[instrument] += 1

    def shares(self) -> dict[str, dict[str, float]]:
        return {
            instrument: {name: float(counts[i]) / self._rows[instrument] for name, i in features.INDEX.items()}
            for instrument, counts in sorted(self._undefined.items())
        }
