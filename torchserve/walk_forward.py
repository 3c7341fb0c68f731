"""Walk-forward evaluation: models and baselines are measured on blocks of time after all the data they were made from.

The span after a first part is cut into blocks. For each block everything is repeated on the data before it, as it would
have been at that time: fit, early stopping, calibration, threshold. That history ends a gap before the block: what the
label looks ahead (purging: no label is made of the block's prices) and an embargo as long. Nothing is ever fitted on
what lies after a block, so no other embargo is needed. The decisions on all blocks together are what is reported::

    |---------- history ----------| gap |- block 1 -|
    |---------------- history ----------------| gap |- block 2 -|

Source of purging and embargo: M. López de Prado, Advances in Financial Machine Learning (2018), chapter 7.

The baselines are *always trade*, the *rules* that answer when no model can, and a *logistic regression* on the rules'
own five features, calibrated and cut alike. For any other model than the default champion, the trees on a few monotone
features, that champion is a baseline, too: what is bigger has to be better. All baselines look at `mf1`, whatever set
the model takes. A model *beats* a baseline when it is more precise at equal coverage. For a baseline with scores that
is the model's own coverage: the baseline's best-ranked samples, as many in each block. For always trading it is the
model's own as well, because that precision is the base rate at any coverage. For the rules it is the rules' coverage. A
model is published when the interval of every difference lies above zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from torchserve.dataset import STEP_NS, Samples, SamplesError
from torchserve.evaluation import Blocks, BootstrapSettings, Decided, Estimate, Figures, reliability, top_share
from torchserve.fitting import Labelled, fit_logistic
from torchserve.handler import calibrated
from torchserve.limits import LimitsReport, limits_report
from torchserve.sources import Report
from torchserve.threshold import Cut, independent, needed
from torchserve.training import (
    KINDS,
    Kind,
    Split,
    TrainingSettings,
    calibrate,
    check_labels,
    check_same_label,
    cut,
    fit,
)
from torchserve.volatility import fit_forecast, forecasts

ALWAYS: Final = "always trade"
RULES: Final = "rules"
LOGISTIC: Final = "logistic regression"
"""On `RULES_FEATURES`."""
CHAMPION: Final = KINDS["champion"]
"""The kind of model that any other has to beat."""
BASELINES: Final = (ALWAYS, RULES, LOGISTIC)
RULES_FEATURES: Final = ("spread_bps", "rv_5s_bps", "weighted_mid_bps", "imbalance_l5", "ofi_1s")
"""What the rules of `fallback/rules.py` look at."""

Rules = Callable[[NDArray[np.float32]], NDArray[np.bool_]]
"""float32[n, n_features] turned for the side → bool[n]: what the rules baseline would trade."""


class WalkForwardSettings(BaseModel):
    """How the walk is cut, and its figures are made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blocks: int = Field(default=5, ge=1, le=100)
    """Blocks of equal length."""
    first_fraction: float = Field(default=0.4, gt=0, lt=1)
    """Share of the time span that lies before the first block."""
    train_fraction: float = Field(default=0.6, gt=0, lt=1)
    """Share of a block's history that fits."""
    stopping_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of it that says when to stop."""
    calibration_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of it that calibrates; the rest sets the threshold."""
    bootstrap: BootstrapSettings = BootstrapSettings()


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One decider on one block."""

    start_ns: int
    end_ns: int
    samples: int
    base_rate: float
    threshold: Cut | None
    """What its history's threshold part made of it; None for a decider without scores."""
    figures: Figures


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model held against one baseline at equal coverage."""

    baseline: str
    precision_difference: Estimate
    """Model less baseline."""

    @property
    def beaten(self) -> bool:
        """Whether the model is more precise."""
        return self.precision_difference.value is not None and self.precision_difference.value > 0

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval of the difference lies above zero."""
        return self.precision_difference.low is not None and self.precision_difference.low > 0


@dataclass(frozen=True, slots=True)
class WalkForward:
    """The decisions of every decider on all blocks, and what they amount to."""

    samples: Samples
    """Those of all blocks."""
    settings: WalkForwardSettings
    blocks: int
    independent_blocks: int
    """See `Blocks.count`."""
    block_seconds: float
    """See `Blocks.block_seconds`."""
    independent: float
    """Independent observations that the samples are worth, see `threshold.py`."""
    independent_traded: dict[str, float]
    """By decider: those that the samples it trades are worth."""
    volatility: NDArray[np.float64]
    """float64[n], bps: what each block's history forecasts for the next 5 s of its samples; NaN where nothing."""
    base_rate: Estimate
    decided: dict[str, Decided]
    """By decider: models by their kind, then the baselines."""
    figures: dict[str, Figures]
    """By decider, over all blocks."""
    by_block: dict[str, list[BlockReport]]
    comparisons: dict[str, list[Comparison]]
    """By kind of model."""
    limits: dict[str, list[LimitsReport]]
    """By kind of model, for each block: how its own limits did."""

    def beats_baselines(self, kind: str) -> bool:
        """Whether a model is more precise than every baseline, beyond chance: what it takes to be published."""
        return all(comparison.beyond_chance for comparison in self.comparisons[kind])

    def hours_needed(self, kind: str, precision: float, half_width: float, coverage: float) -> float | None:
        """Hours of market, of as many instruments, that show a precision of plus and minus so much at this coverage.

        It counts on samples that are traded being worth as much as those of this walk; None where it traded none.
        """
        traded = int(self.decided[kind].trade.sum())
        if not traded:
            return None
        worth = self.independent_traded[kind] / traded
        per_hour = 3.6e12 / STEP_NS * 2 * len(self.samples.instruments) * coverage * worth
        return needed(precision, half_width, self.settings.bootstrap.confidence) / per_hour

    def summary(self) -> dict[str, Any]:
        """All figures, for JSON. An estimate is [value, low, high], with null for what is not defined."""
        return {
            "samples": len(self.samples.rows),
            "blocks": self.blocks,
            "independent_blocks": self.independent_blocks,
            "independent": self.independent,
            "independent_traded": self.independent_traded,
            "label": self.samples.label.described,
            "base_rate": self.base_rate,
            "settings": self.settings.model_dump(mode="json"),
            "figures": {name: asdict(figures) for name, figures in self.figures.items()},
            "reliability": {
                name: [asdict(one) for one in reliability(decided.score, self.samples.eligible)]
                for name, decided in self.decided.items()
                if decided.score is not None
            },
            "by_block": {name: [_summary(block) for block in blocks] for name, blocks in self.by_block.items()},
            "comparisons": {
                kind: {one.baseline: one.precision_difference for one in comparisons}
                for kind, comparisons in self.comparisons.items()
            },
            "beats_baselines": {kind: self.beats_baselines(kind) for kind in self.comparisons},
            "limits": {kind: [one.described for one in blocks] for kind, blocks in self.limits.items()},
        }


def walk_forward(
    samples: Samples,
    kinds: Sequence[Kind],
    training: TrainingSettings,
    settings: WalkForwardSettings,
    rules: Rules,
    report: Report = lambda _: None,
) -> WalkForward:
    """Evaluates models of these kinds, the default champion, and the baselines.

    Raises:
        SamplesError: Too short a time span, a part of it in which every label is the same, or samples of another label
            than the settings'.
    """
    check_same_label(samples, training)
    of_mf1 = samples.of_mf1
    splits = block_splits(samples.time_ns, training, settings)
    tested = np.concatenate([split.test for split in splits])
    fitted = (*kinds, *([] if CHAMPION in kinds else [CHAMPION]))
    volatility = []
    by_block: dict[str, list[Decided]] = {name: [] for name in (*fitted, *BASELINES)}
    thresholds: dict[str, list[Cut | None]] = {name: [] for name in by_block}
    limits: dict[str, list[LimitsReport]] = {kind: [] for kind in fitted}
    for number, split in enumerate(splits, start=1):
        # A block may well be all of one kind, and so may what sets its threshold.
        check_labels(samples, split._replace(threshold=split.train, test=split.train))
        rows = of_mf1.rows[split.test]
        for kind in fitted:
            report(f"walk-forward, block {number} of {len(splits)}: {kind}")
            taken = samples if kind in kinds else of_mf1
            model = fit(kind, taken, split, training)
            scores = model.scores(taken.rows[split.test])
            by_block[kind].append(Decided(scores >= np.float32(model.cut.threshold), scores))
            thresholds[kind].append(model.cut)
            limits[kind].append(limits_report(model, taken, split, scores, training))
        report(f"walk-forward, block {number} of {len(splits)}: baselines")
        by_block[LOGISTIC].append(_logistic(of_mf1, split, training, rows, thresholds[LOGISTIC]))
        known = np.concatenate(split[:-1])
        volatility.append(forecasts(fit_forecast(of_mf1.take(known)), rows))
        base_rate = np.full(len(rows), samples.eligible[known].mean(), np.float32)
        by_block[ALWAYS].append(Decided(np.ones(len(rows), np.bool_), base_rate))
        by_block[RULES].append(Decided(rules(rows)))
        thresholds[ALWAYS].append(None)
        thresholds[RULES].append(None)

    report("walk-forward: figures")
    whole = samples.take(tested)
    blocks = Blocks(whole, settings.bootstrap)
    decided = {name: _joined(parts) for name, parts in by_block.items()}
    return WalkForward(
        samples=whole,
        settings=settings,
        blocks=len(splits),
        independent_blocks=blocks.count,
        block_seconds=blocks.block_seconds,
        independent=independent(whole, np.ones(len(tested), np.bool_)),
        independent_traded={name: independent(whole, one.trade) for name, one in decided.items()},
        volatility=np.concatenate(volatility),
        base_rate=blocks.base_rate(),
        decided=decided,
        figures={name: blocks.figures(one) for name, one in decided.items()},
        by_block={
            name: [
                _report(samples.take(split.test), one, threshold)
                for split, one, threshold in zip(splits, parts, thresholds[name], strict=True)
            ]
            for name, parts in by_block.items()
        },
        comparisons={kind: _compared(kind, by_block, blocks) for kind in kinds},
        limits=limits,
    )


def block_splits(time_ns: NDArray[np.int64], training: TrainingSettings, settings: WalkForwardSettings) -> list[Split]:
    """A split for each block: four parts of its history, and the block as `test`.

    Raises:
        SamplesError: A part is empty.
    """
    start, end = (int(time_ns.min()), int(time_ns.max()) + 1) if len(time_ns) else (0, 0)
    first = start + round((end - start) * settings.first_fraction)
    edges = np.linspace(first, end, settings.blocks + 1).round().astype(np.int64)
    fractions = (settings.train_fraction, settings.stopping_fraction, settings.calibration_fraction, 1.0)
    splits = []
    for begin, stop in itertools.pairwise(edges):
        history = cut(time_ns, start, int(begin) - training.gap_ns, fractions, training.gap_ns)
        split = Split._make((*history, np.flatnonzero((time_ns >= begin) & (time_ns < stop))))
        if not all(map(len, split)):
            raise SamplesError(f"{(end - start) / 1e9:.1f} s are too short for {settings.blocks} walk-forward blocks")
        splits.append(split)
    return splits


def _logistic(
    samples: Samples,
    split: Split,
    training: TrainingSettings,
    rows: NDArray[np.float32],
    thresholds: list[Cut | None],
) -> Decided:
    # It needs no early stopping, so it may learn from all that a model has learnt from.
    index = np.concatenate([split.train, split.stopping])
    margin = fit_logistic(Labelled(samples.rows[index], samples.eligible[index]), RULES_FEATURES)
    slope, intercept, chosen = calibrate(margin, samples, split, training)
    thresholds.append(chosen)
    scores = calibrated(margin(rows), slope, intercept)
    return Decided(scores >= np.float32(chosen.threshold), scores)


def _joined(parts: list[Decided]) -> Decided:
    scores = [part.score for part in parts if part.score is not None]
    return Decided(
        np.concatenate([part.trade for part in parts]), np.concatenate(scores) if len(scores) == len(parts) else None
    )


def _summary(block: BlockReport) -> dict[str, Any]:
    """For JSON."""
    cut = block.threshold
    # That of a model that knows nothing chose nothing.
    threshold = None if cut is None else cut._asdict() if cut.traded else {"threshold": cut.threshold}
    return {**asdict(block), "threshold": threshold}


def _report(samples: Samples, decided: Decided, threshold: Cut | None) -> BlockReport:
    blocks = Blocks(samples, BootstrapSettings(resamples=0))
    return BlockReport(
        start_ns=int(samples.time_ns.min()),
        end_ns=int(samples.time_ns.max()),
        samples=len(samples.rows),
        base_rate=float(samples.eligible.mean()),
        threshold=threshold,
        figures=blocks.figures(decided),
    )


def _compared(kind: Kind, by_block: dict[str, list[Decided]], blocks: Blocks) -> list[Comparison]:
    own = np.concatenate([part.trade for part in by_block[kind]])
    everything = np.ones(len(own), np.bool_)
    rules = np.concatenate([part.trade for part in by_block[RULES]])
    at_the_rules = np.concatenate(
        [_top(ours, theirs.trade) for ours, theirs in zip(by_block[kind], by_block[RULES], strict=True)]
    )
    compared = [
        Comparison(ALWAYS, blocks.precision_difference(own, everything)),
        Comparison(RULES, blocks.precision_difference(at_the_rules, rules)),
    ]
    for name in (LOGISTIC, *([] if kind == CHAMPION else [CHAMPION])):
        theirs = [_top(other, ours.trade) for ours, other in zip(by_block[kind], by_block[name], strict=True)]
        compared.append(Comparison(name, blocks.precision_difference(own, np.concatenate(theirs))))
    return compared


def _top(decided: Decided, trade: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The best-ranked samples of a decider with scores, as many as another trades."""
    assert decided.score is not None
    return top_share(decided.score, float(trade.mean()))
