"""What `pretrade status` shows of features: those of `mf1`, and those of the other feature sets that models take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from feature_cache.store.codec import BookState
from feature_cache.store.l1 import CachedFeatures, FeatureCache
from feature_cache.store.report import InstrumentReport, ReportReader
from pretrade.admin.v1 import admin_pb2 as pb
from server.decision.other_sets import OtherSets
from server.rpc.steering import duration

BOOKS: Final = {
    BookState.UNKNOWN: pb.BOOK_STATE_UNKNOWN,
    BookState.VALID: pb.BOOK_STATE_VALID,
    BookState.LOCKED: pb.BOOK_STATE_LOCKED,
}


def problem_of(entry: CachedFeatures | None, now: float, max_age_seconds: float) -> str:
    """Why no decision could use these features at a monotonic instant; empty where one could."""
    if entry is None:
        return "no features"
    if entry.snapshot.state is BookState.UNKNOWN:
        return "book unknown"
    return "stale" if entry.age_seconds(now) > max_age_seconds else ""


@dataclass(frozen=True, slots=True)
class MarketParts:
    """What is known of the market."""

    feature_cache: FeatureCache
    reports: ReportReader
    instruments: tuple[str, ...]
    max_feature_age_seconds: float
    other_sets: OtherSets


class FeatureStatuses:
    """Says which features decisions could use now.

    Args:
        market: What is known of the market.
        clock: Monotonic seconds.
    """

    def __init__(self, market: MarketParts, clock: Callable[[], float]) -> None:
        self._market = market
        self._clock = clock

    async def of_mf1(self, with_reports: bool) -> list[pb.FeatureStatus]:
        """One for each instrument, with what its worker reports."""
        market = self._market
        reports = await market.reports.read(market.instruments) if with_reports else {}
        return [self._of_instrument(instrument, reports.get(instrument)) for instrument in market.instruments]

    def of_sets(self) -> Iterator[pb.FeatureSetStatus]:
        """One for each set besides `mf1` that a model takes."""
        others = self._market.other_sets
        for feature_set, models in others.taken.items():
            found = pb.FeatureSetStatus(feature_set=feature_set.version, models=models)
            for (set_id, part), orders in others.missing.items():
                if set_id == feature_set.id:
                    found.missing.add(part=part, orders=orders)
            for cache in others.computed(feature_set):
                for instrument in self._market.instruments:
                    status = found.computed.add(instrument=instrument, vector_version=cache.feature_set.version)
                    self._add_newest(status, cache)
            yield found

    def _of_instrument(self, instrument: str, report: InstrumentReport | None) -> pb.FeatureStatus:
        status = pb.FeatureStatus(instrument=instrument)
        if report is not None:
            status.book = BOOKS[report.state]
            status.book_reason = report.unknown_because
            status.vector_version = report.vector_version
            status.worker = report.worker
            status.book_losses = report.losses
            if report.lag_records is not None:
                status.lag_records = report.lag_records
        self._add_newest(status, self._market.feature_cache)
        return status

    def _add_newest(self, status: pb.FeatureStatus, cache: FeatureCache) -> None:
        """Adds what the newest vector says of the instrument; its own state is newer than the report."""
        entry, now = cache.get(status.instrument), self._clock()
        status.problem = problem_of(entry, now, self._market.max_feature_age_seconds)
        status.usable = not status.problem
        if entry is None:
            return
        status.book = BOOKS[entry.snapshot.state]
        status.vector_version = cache.feature_set.version  # every vector of another version is refused
        status.sequence = entry.snapshot.sequence
        status.age.CopyFrom(duration(entry.age_seconds(now)))
        if entry.snapshot.state is not BookState.UNKNOWN:
            status.book_reason = ""
