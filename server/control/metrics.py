"""The metrics of the control state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from feature_cache.features import MF1
from feature_cache.metrics import Counter, Gauge, declared
from feature_cache.store.codec import BookState
from pretrade.admin.v1 import admin_pb2
from pretrade.client.enum_names import enum_name
from server.control.flags import FLAGS

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from feature_cache.store.l1 import FeatureCache
    from server.control.alert_rules import UserAlerts
    from server.control.state import ControlState

CONTROL_VERSION: Final = Gauge("pretrade_control_version", "Version of the control state in force.")
CONTROL_RELOADS: Final = Counter(
    "pretrade_control_reloads", "Changes of the control state by other processes and servers."
)
CONTROL_STALE: Final = Gauge("pretrade_control_stale", "1 while other servers' changes may be unknown: no Redis.")
CONTROL_PENDING: Final = Gauge("pretrade_control_pending", "Changes in force on this server alone: no Redis.")
CONTROL_UNRECORDED: Final = Gauge(
    "pretrade_control_unrecorded", "Changes that were made and are not known to be in the audit yet."
)
CONTROL_DOUBTS: Final = Counter(
    "pretrade_control_doubts", "Changes of which it was not known in time whether they were made: Redis did not answer."
)
CONTROL_OUTAGES: Final = Counter("pretrade_control_outages", "Times the control state was not shared any more.")
CONTROL_WRITE_FAILURES: Final = Counter(
    "pretrade_control_write_failures", "Changes that could not be written; tried again every second."
)
TRADING_STATE: Final = Gauge("pretrade_trading_state", "1 for the state in force, 0 for the others.", ("state",))
FLAG: Final = Gauge("pretrade_flag", "1 while the flag is on.", ("flag",))
ALERT_RULES: Final = Gauge("pretrade_alert_rules", "Alert rules that users set.")
FEATURE_VALUE: Final = Gauge(
    "pretrade_feature_value",
    "Values of those features that an alert rule of a user names; none while it is undefined.",
    ("instrument", "feature"),
)

METRICS: Final = declared(globals())
"""Every metric of this folder, in the order of the page that explains them."""


def of_control(control: ControlState) -> Iterator[Metric]:
    """One scrape."""
    yield CONTROL_VERSION.family(control.version)
    states = TRADING_STATE.family()
    for state in admin_pb2.TradingState.values():
        if state:
            states.add_metric((enum_name(admin_pb2.TradingState, state),), state == control.trading_state)
    yield states
    flags = FLAG.family()
    for name in FLAGS:
        flags.add_metric((name,), getattr(control, name))
    yield flags
    store = control.store
    yield CONTROL_RELOADS.family(store.reloads)
    yield CONTROL_WRITE_FAILURES.family(store.write_failures)
    yield CONTROL_STALE.family(store.stale)
    yield CONTROL_PENDING.family(store.pending)
    yield CONTROL_UNRECORDED.family(len(store.unrecorded()))
    yield CONTROL_DOUBTS.family(store.doubts)
    yield CONTROL_OUTAGES.family(store.shared.outages if store.shared is not None else 0)


def of_alerts(alerts: UserAlerts, cache: FeatureCache, instruments: Sequence[str]) -> Iterator[Metric]:
    """One scrape of what the users' alert rules ask for.

    Args:
        alerts: The rules in force.
        cache: Holds the features.
        instruments: Those that may have features.
    """
    yield ALERT_RULES.family(len(alerts.rules))
    values, features = FEATURE_VALUE.family(), alerts.features
    for instrument in instruments if features else ():
        entry = cache.get(instrument)
        if entry is None or entry.snapshot.state is BookState.UNKNOWN:
            continue
        for name in features:
            value = float(entry.snapshot.values[MF1.index[name]])
            if not math.isnan(value):
                values.add_metric((instrument, name), value)
    yield values
