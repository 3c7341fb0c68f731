"""What `ta1` and `ta1_long` are. A process that only takes their vectors needs this file, and no TA-Lib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from feature_cache.feature_set import Feature, FeatureSet
from feature_cache.ta1.indicators import FEATURES

INTERVALS: Final = ("1s", "10s")
"""Of the bars of `ta1`."""
LONG_INTERVALS: Final = ("1m", "5m")
"""Of those of `ta1_long`: hours of events pass before they say anything, unless bars were stored."""
CORRELATION_SECONDS: Final = 30

CROSS: Final = (
    Feature("partner_ret_1s_bps", "bps", "Log return of the partner's mid, last bar of 1 s.", signed=True),
    Feature("partner_ret_10s_bps", "bps", "The same, last ten of them.", signed=True),
    Feature("partner_lead_5s_bps", "bps", "Its return less our own, last five of them.", signed=True),
    Feature("partner_corr_30s", "", "Correlation of its returns and ours, 30 bars of 1 s.", -1.0, 1.0),
    Feature("partner_lead_corr_30s", "", "Correlation of our returns with its a bar before.", -1.0, 1.0),
)
"""What the partner that `PRETRADE_TA1_PARTNERS` names says; undefined without one."""


def _of_interval(feature: Feature, interval: str) -> Feature:
    swapped_with = feature.swapped_with and f"{feature.swapped_with}_{interval}"
    doc = f"{feature.doc[:-1]}; bars of {interval[:-1]} {interval[-1]}."
    return replace(feature, name=f"{feature.name}_{interval}", doc=doc, swapped_with=swapped_with)


def _over(intervals: Sequence[str]) -> tuple[Feature, ...]:
    return tuple(_of_interval(feature, interval) for interval in intervals for feature in FEATURES)


TA1: Final = FeatureSet("ta1", (*_over(INTERVALS), *CROSS))
TA1_LONG: Final = FeatureSet("ta1_long", _over(LONG_INTERVALS))
