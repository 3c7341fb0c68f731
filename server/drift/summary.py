"""What recorded decisions say of drift: features and score against the model's reference, and what is missing.

A comparison is of one model version, with the inputs that this version scored. A champion that replaced another one has
learnt from other data, so the inputs of its predecessor say nothing about it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fallback.order import CHAMPION_SOURCES, MODEL_SOURCES
from feature_cache import feature_sets
from feature_cache.feature_set import ROW
from feature_cache.features import MF1
from feature_cache.har import Forecast
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.drift.psi import (
    Reference,
    Shares,
    independent_values,
    limit,
    psi,
    references_of,
    rounded_size,
    rounded_weights,
)
from server.drift.regimes import Regime, by_regime
from server.errors import ModelUnknownError
from server.inference.model_names import DEFAULT

SCORE: Final = "score"
FALSE_ALARMS: Final = 0.01
"""Probability that any feature of a report without drift is called drifted."""
FEWEST: Final = 30
"""Independent values below which nothing is said."""
AN_AGE: Final = "holds the time from the exchange to the server, which training knows nothing of"
"""Why ages are shown beside their reference, and never called drifted.

A sample is made at an instant at which everything has arrived. A server decides on a vector that was published,
batched, stored and delivered, and adds the time that this took to both ages. On a local stack, whose publisher collects
events for 50 ms, the book of an order is 30 ms old at least, and 8 ms in the median of the samples: PSI is about 6.
That time is a property of the deployment and not of the market. It is watched where it is measured: a vector that is
too old is not decided on, and `pretrade_feature_age_seconds` has its own alert.
"""
_WINDOWS: Final = 12


@dataclass(frozen=True, slots=True)
class Drift:
    """One feature, or the score, of the decisions against the reference."""

    name: str
    psi: float
    limit: float | None
    """PSI that is exceeded without drift only once in a hundred reports; None where there are too few values to say, or
    the feature is not judged."""
    independent: int
    """Values, less those that only repeat others."""
    reference_independent: int
    """The same in the reference, for this mixture of instruments."""
    undefined: float
    """Share of NaN."""
    undefined_before: float
    """The same in the reference."""
    not_judged: str = ""
    """Why the feature is never called drifted; empty when it is judged."""

    @property
    def drifted(self) -> bool:
        """True when chance hardly explains it."""
        return self.limit is not None and self.psi > self.limit

    @property
    def too_few(self) -> bool:
        """True when there are too few values to say."""
        return self.limit is None and not self.not_judged


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
    """All that were looked at."""
    rows: int
    """Different states of the market, by side and by what the caller brought, that the model scored: what decisions say
    more than once counts once."""
    since_ns: int
    until_ns: int
    model_version: str = ""
    """The version that is compared; empty where there is none."""
    others: Mapping[str, int] = field(default_factory=dict)
    """Decisions by other model versions, which are left out, by version."""
    problem: str = ""
    """Why there is no comparison; empty when there is one."""
    drifts: tuple[Drift, ...] = ()
    """By feature in the order of the feature set, the score last."""
    windows: tuple[Window, ...] = ()
    """The same over time."""
    regimes: tuple[Regime, ...] = ()
    """How the model did in calm and in restless markets; none where it says nothing of volatility."""
    missing: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Share of undefined values by instrument and feature. Those of `mf1` are of all decisions; without features all of
    them are undefined. Further ones of a model of another set are of what it scored."""

    @property
    def drifted(self) -> tuple[Drift, ...]:
        """What has drifted, the worst first."""
        found = (one for one in self.drifts if one.drifted)
        return tuple(sorted(found, key=lambda one: one.psi / (one.limit or 1.0), reverse=True))


@dataclass(slots=True)
class _Rows:
    times: list[int] = field(default_factory=list)
    """When it was decided, ns."""
    market_times: list[int] = field(default_factory=list)
    """The instant of the market that was decided on, ns of event time."""
    instruments: list[str] = field(default_factory=list)
    values: list[bytes] = field(default_factory=list)
    """Vectors of `mf1`."""
    scored: list[bytes] = field(default_factory=list)
    """What the model scored: the same, or a vector of another set."""
    scores: list[float] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    traded: list[bool] = field(default_factory=list)


def summarise(
    packets: Iterable[packet_pb2.DecisionPacket],
    metadata: Callable[[str], Mapping[str, Any]],
    model_version: str = "",
    eligible: Mapping[str, bool] = MappingProxyType({}),
    rest: Callable[[], object] = lambda: None,
) -> Summary:
    """Compares decisions, in any order, with what their model learnt from.

    Args:
        packets: Of the decisions.
        metadata: A model version's; raises `ModelUnknownError` where there is none.
        model_version: The version to compare; empty for the champion of the newest decision.
        eligible: Decision id → the market's own label, where it is known.
        rest: Called before each feature, and before each part of the time.
    """
    found = sorted(packets, key=lambda packet: packet.decision.decision_id)
    versions = Counter(one.decision.model_version for one in found if one.decision.source in MODEL_SOURCES)
    version = model_version or newest_champion(found)
    rows, missing = _Rows(), _Missing()
    seen: set[tuple[str, int, int, bytes]] = set()
    for packet in found:
        instrument = packet.order.instrument
        if packet.feature_set_id != MF1.id or len(packet.model_input) != MF1.row_bytes:
            missing.add_nothing(instrument)
            continue
        missing.add(instrument, packet.model_input)
        if packet.decision.source not in MODEL_SOURCES or packet.decision.model_version != version:
            continue
        # What callers bring differs from order to order. Rows of one state of the market are of one instant, so that
        # many of them say no more about drift than one.
        brought = packet.order.features.SerializeToString()
        state = (instrument, packet.order.side, packet.features.sequence, brought)
        if packet.features.sequence and state in seen:
            continue
        seen.add(state)
        rows.times.append(_decided_at(packet))
        rows.market_times.append(packet.features.event_time_ns or _decided_at(packet))
        rows.instruments.append(instrument)
        rows.values.append(packet.model_input)
        rows.scored.append(packet.scored_input or packet.model_input)
        rows.ids.append(packet.decision.decision_id)
        rows.traded.append(packet.decision.action == pb.ACTION_TRADE)
        rows.scores.append(packet.decision.score if packet.decision.HasField("score") else np.nan)
    times = [_decided_at(packet) for packet in found]
    summary = Summary(
        decisions=len(found),
        rows=len(rows.times),
        since_ns=min(times, default=0),
        until_ns=max(times, default=0),
        model_version=version,
        others={one: count for one, count in versions.items() if one != version},
        missing=missing.shares(),
    )
    if not rows.times:
        return replace(summary, problem=f"no decision was scored by {f'model {version}' if version else 'a model'}")
    try:
        described = metadata(version)
        references, forecast = references_of(described), Forecast.of(described)
    except ModelUnknownError as error:
        return replace(summary, problem=str(error))
    except (KeyError, TypeError, ValueError):
        return replace(summary, problem=f"model {version} says nothing of what it learnt from that can be compared")
    matrix = np.frombuffer(b"".join(rows.values), dtype=ROW).reshape(-1, len(MF1))
    # By the archive, which says what its model takes whether or not this process knows the set.
    taken = described.get("feature_names", MF1.names)
    if any(len(row) != ROW.itemsize * len(taken) for row in rows.scored):
        return replace(summary, problem=f"model {version} takes other features than its decisions say")
    scored = np.frombuffer(b"".join(rows.scored), dtype=ROW).reshape(-1, len(taken))
    columns: dict[str, NDArray[Any]] = {name: scored[:, i] for i, name in enumerate(taken)}
    columns[SCORE] = np.array(rows.scores, dtype=np.float64)
    names = np.array(rows.instruments)
    seconds = np.array(rows.market_times, dtype=np.float64) / 1e9
    ages = _ages_of(described)
    alpha = FALSE_ALARMS / max(1, len(columns.keys() & references.keys() - ages))
    compared = {
        name: Column(name, references[name], values, names, AN_AGE if name in ages else "")
        for name, values in columns.items()
        if name in references
    }
    drifts = []
    for one in compared.values():
        rest()
        drifts.append(one.drift(seconds, alpha))
    return replace(
        summary,
        drifts=tuple(drifts),
        windows=_over_time(rows.times, compared, rest),
        regimes=() if forecast is None else by_regime(forecast, matrix, rows.traded, rows.ids, eligible),
        missing=_with_scored(summary.missing, taken, scored, names),
    )


def of_model(packets: Iterable[packet_pb2.DecisionPacket], name: str) -> list[packet_pb2.DecisionPacket]:
    """The decisions of orders that the model map gave to a model, whoever answered."""
    return [one for one in packets if (one.chosen_model or DEFAULT) == name]


def metadata_of(files: Mapping[str, bytes]) -> Mapping[str, Any]:
    """The metadata among an archive's files."""
    found: Mapping[str, Any] = json.loads(files["metadata.json"])
    return found


def _ages_of(described: Mapping[str, Any]) -> frozenset[str]:
    """The ages among the features that a model takes; those of `mf1` where its set is not known here."""
    feature_set = feature_sets.by_fingerprint(int(described.get("feature_set_fingerprint", MF1.fingerprint))) or MF1
    return frozenset(feature_set.names[place] for place in feature_set.ages)


def _with_scored(
    missing: Mapping[str, Mapping[str, float]],
    taken: Sequence[str],
    scored: NDArray[np.float32],
    instruments: NDArray[np.str_],
) -> dict[str, dict[str, float]]:
    """What is missing, and of a model's features those that `mf1` has not."""
    others = [(place, name) for place, name in enumerate(taken) if name not in MF1.index]
    undefined = np.isnan(scored)
    found = {instrument: dict(shares) for instrument, shares in missing.items()}
    for instrument in np.unique(instruments).tolist():
        of_instrument = undefined[instruments == instrument]
        found[instrument] |= {name: float(of_instrument[:, place].mean()) for place, name in others}
    return found


def newest_champion(packets: Iterable[packet_pb2.DecisionPacket]) -> str:
    """The version of the newest decision by a champion; empty without one."""
    decisions = (one.decision for one in packets if one.decision.source in CHAMPION_SOURCES)
    newest = max(decisions, key=lambda one: one.decision_id, default=None)
    return "" if newest is None else newest.model_version


def _decided_at(packet: packet_pb2.DecisionPacket) -> int:
    return int(packet.decision.decided_at.ToNanoseconds())


class Column:
    """The values of one feature, or of the score, beside their reference."""

    def __init__(
        self, name: str, reference: Reference, values: NDArray[Any], instruments: NDArray[np.str_], not_judged: str = ""
    ) -> None:
        self._name = name
        self._not_judged = not_judged
        self._reference = reference
        self._values = values
        self._instruments = instruments
        # A decision without a score is not a decision with an undefined score.
        self._known = ~np.isnan(values) if name == SCORE else np.ones(len(values), np.bool_)

    def drift(self, seconds: NDArray[np.float64], alpha: float) -> Drift:
        """What the values say, which are of these instants of the market, when one in 1 / alpha may be wrong."""
        values = self._values[self._known]
        weights = self._weights(self._known)
        if not weights:
            return Drift(self._name, 0.0, None, 0, 0, 0.0, 0.0, self._not_judged)
        expected = self._reference.mixed(weights)
        independent = self._independent(seconds, weights)
        # Where the limits are simulated, mixtures and sizes are taken in steps.
        typical = self._reference.mixed(rounded_weights(weights))
        bound = limit(typical.shares, rounded_size(typical.independent), rounded_size(independent), alpha)
        return Drift(
            name=self._name,
            psi=_index(expected, self._reference.counts(values), independent),
            limit=bound if independent >= FEWEST and not self._not_judged else None,
            independent=round(independent),
            reference_independent=round(expected.independent),
            undefined=float(np.isnan(values).mean()),
            undefined_before=expected.shares[-1],
            not_judged=self._not_judged,
        )

    def index_of(self, inside: NDArray[np.bool_]) -> float:
        """PSI of some of the values."""
        chosen = self._known & inside
        weights = self._weights(chosen)
        if not weights:
            return 0.0
        return _index(self._reference.mixed(weights), self._reference.counts(self._values[chosen]), None)

    def _weights(self, chosen: NDArray[np.bool_]) -> dict[str, float]:
        counts = Counter(self._instruments[chosen].tolist())
        return {name: count / counts.total() for name, count in sorted(counts.items())}

    def _independent(self, seconds: NDArray[np.float64], weights: Mapping[str, float]) -> float:
        """Independent values in a sample of several instruments, of which none knows anything of another."""
        spread = 0.0
        for name, weight in weights.items():
            times = np.sort(seconds[self._known & (self._instruments == name)])
            spread += weight**2 / independent_values(times, self._reference.correlation_seconds)
        return 1 / spread


def _index(expected: Shares, counts: NDArray[np.int64], independent: float | None) -> float:
    """PSI of counts that say as much as so many independent values; None for all of them."""
    scaled = counts if independent is None else counts * (independent / counts.sum())
    return float(psi(expected.shares, expected.independent, scaled))


def _over_time(times: list[int], columns: Mapping[str, Column], rest: Callable[[], object]) -> tuple[Window, ...]:
    at = np.array(times, dtype=np.int64)
    edges = np.linspace(at.min(), at.max() + 1, _WINDOWS + 1)
    windows = []
    for since, until in pairwise(edges):
        inside = (at >= since) & (at < until)
        if inside.sum() < FEWEST:
            continue
        rest()
        found = {name: column.index_of(inside) for name, column in columns.items()}
        windows.append(Window(int(since), int(inside.sum()), found))
    return tuple(windows)


class _Missing:
    """Counts undefined values by instrument."""

    def __init__(self) -> None:
        self._undefined: dict[str, NDArray[np.int64]] = defaultdict(lambda: np.zeros(len(MF1), np.int64))
        self._rows: Counter[str] = Counter()

    def add(self, instrument: str, row: bytes) -> None:
        self._undefined[instrument] += np.isnan(np.frombuffer(row, dtype=ROW))
        self._rows[instrument] += 1

    def add_nothing(self, instrument: str) -> None:
        self._undefined[instrument] += 1
        self._rows[instrument] += 1

    def shares(self) -> dict[str, dict[str, float]]:
        return {
            instrument: {name: float(counts[i]) / self._rows[instrument] for name, i in MF1.index.items()}
            for instrument, counts in sorted(self._undefined.items())
        }
