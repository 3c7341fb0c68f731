"""How the limits that a model states for itself do on samples after all that it was made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feature_cache.domain import Domain
from torchserve.conformal import Band
from torchserve.dataset import Samples
from torchserve.domain import Alarms, domain_of, false_alarms
from torchserve.training import CalibratedModel, Split, TrainingSettings, band_of


@dataclass(frozen=True, slots=True)
class LimitsReport:
    """A band and a domain on a block; None where a share is of nothing."""

    band: Band
    threshold: float | None
    """None for several blocks together."""
    samples: int
    ineligible: int
    counts: tuple[int, int, int, int, int]
    """Samples that trade without the band and with it; ineligible ones among both; and all in the band."""
    alarms: Alarms
    """Of the domain; shares of `samples`."""

    @property
    def error_without(self) -> float | None:
        """Share of the ineligible samples that trade without the band."""
        return _share(self.counts[2], self.ineligible)

    @property
    def error(self) -> float | None:
        """Share of the ineligible samples that trade with the band."""
        return _share(self.counts[3], self.ineligible)

    @property
    def traded(self) -> float | None:
        """Share of the samples that trade without the band."""
        return _share(self.counts[0], self.samples)

    @property
    def abstains(self) -> float | None:
        """Share of the samples that trade without the band and not with it."""
        return _share(self.counts[0] - self.counts[1], self.samples)

    @property
    def in_band(self) -> float | None:
        """Share of the samples that are in the band."""
        return _share(self.counts[4], self.samples)

    @property
    def precision_without(self) -> float | None:
        """Share of eligible samples among those that trade without the band."""
        return _share(self.counts[0] - self.counts[2], self.counts[0])

    @property
    def precision(self) -> float | None:
        """Share of eligible samples among those that trade with the band."""
        return _share(self.counts[1] - self.counts[3], self.counts[1])

    @property
    def described(self) -> dict[str, Any]:
        """For JSON."""
        shares = ("error", "error_without", "traded", "abstains", "in_band", "precision", "precision_without")
        return {
            "band": self.band.described,
            "samples": self.samples,
            **{name: getattr(self, name) for name in shares},
            "false_alarms": asdict(self.alarms),
        }


def limits_report(
    model: CalibratedModel, samples: Samples, split: Split, scores: NDArray[np.float32], settings: TrainingSettings
) -> LimitsReport:
    """Makes the limits of a model from its history, and measures them on the block after it.

    Args:
        model: Made from the first four parts of the split.
        samples: All.
        split: The history and the block.
        scores: float32[n] of the block's samples.
        settings: How the model was made.
    """
    block = samples.take(split.test)
    band = band_of(model.scores(samples.rows[split.threshold]), samples, split, model.cut, settings)
    trade = scores >= np.float32(model.cut.threshold)
    held = band.holds(scores)
    kept = trade & ~held
    counts = (part.sum() for part in (trade, kept, trade & ~block.eligible, kept & ~block.eligible, held))
    described = domain_of(model.fitted, samples.take(split.train), samples.take(split.between))
    return LimitsReport(
        band=band,
        threshold=model.cut.threshold,
        samples=len(scores),
        ineligible=int((~block.eligible).sum()),
        counts=tuple(int(count) for count in counts),  # type: ignore[arg-type]
        alarms=Alarms(0.0, 0.0) if described is None else false_alarms(Domain(described, samples.feature_set), block),
    )


def joined(reports: Sequence[LimitsReport]) -> LimitsReport:
    """Several blocks together."""
    samples = sum(one.samples for one in reports)

    def mean(name: str) -> float:
        return math.fsum(getattr(one.alarms, name) * one.samples for one in reports) / samples

    return LimitsReport(
        band=reports[0].band,
        threshold=None,
        samples=samples,
        ineligible=sum(one.ineligible for one in reports),
        counts=tuple(map(sum, zip(*(one.counts for one in reports), strict=True))),  # type: ignore[arg-type]
        alarms=Alarms(mean("at_once"), mean("watched")),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
