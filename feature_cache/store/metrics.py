"""The metrics of a server's feature cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from feature_cache.metrics import Counter, Gauge, declared
from feature_cache.store.codec import BookState

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from feature_cache.store.l1 import FeatureCache

FEATURE_AGE_SECONDS: Final = Gauge(
    "pretrade_feature_age_seconds", "Age of the features from exchange event time.", ("instrument",)
)
FEATURES_PRESENT: Final = Gauge(
    "pretrade_features_present", "1 while there are features within their TTL.", ("instrument",)
)
FEATURES_BOOK_KNOWN: Final = Gauge(
    "pretrade_features_book_known", "1 while there are features, and of a book that is known.", ("instrument",)
)
FEATURES_TAKEN: Final = Counter("pretrade_features_taken", "Vectors taken over from Redis.")
FEATURES_REJECTED: Final = Counter("pretrade_features_rejected", "Values in Redis that were no vector of ours.")
FEATURES_EXPIRED: Final = Counter("pretrade_features_expired", "Vectors dropped because of their age.")
FEATURES_AHEAD: Final = Counter(
    "pretrade_features_ahead",
    "Vectors refused because they were published after this host's clock: the clocks disagree.",
)
FEATURE_CACHE_DISCONNECTS: Final = Counter("pretrade_feature_cache_disconnects", "Times Redis was lost or not reached.")
FEATURE_CACHE_CONNECTED: Final = Gauge("pretrade_feature_cache_connected", "1 while Redis answers.")

METRICS: Final = declared(globals())
"""Every metric of this folder, in the order of the page that explains them."""


def of_features(cache: FeatureCache, instruments: Sequence[str], clock: Callable[[], float]) -> Iterator[Metric]:
    """One scrape.

    Args:
        cache: Its vectors are reported.
        instruments: Those that may have vectors.
        clock: Monotonic seconds, the cache's own.
    """
    age = FEATURE_AGE_SECONDS.family()
    present = FEATURES_PRESENT.family()
    known = FEATURES_BOOK_KNOWN.family()
    now = clock()
    for instrument in instruments:
        entry = cache.get(instrument)
        if entry is not None:
            age.add_metric((instrument,), entry.age_seconds(now))
        present.add_metric((instrument,), entry is not None)
        known.add_metric((instrument,), entry is not None and entry.snapshot.state is not BookState.UNKNOWN)
    yield from (age, present, known)
    yield FEATURES_TAKEN.family(cache.updates)
    yield FEATURES_REJECTED.family(cache.rejected)
    yield FEATURES_EXPIRED.family(cache.expired)
    yield FEATURES_AHEAD.family(cache.ahead)
    yield FEATURE_CACHE_DISCONNECTS.family(cache.disconnects)
    yield FEATURE_CACHE_CONNECTED.family(cache.connected)
