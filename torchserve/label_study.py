"""Which label can be foretold how surely: the default champion on every label, in one walk forward.

Within the walk a label is also *chosen*, as it would have been at that time: in each block, for each delay, the one
whose threshold part has the widest coverage at which the lower end of the precision reaches the target; where none has
one, the one whose lower end is highest. The block that is then decided has had no say in it. What comes of the choice
is the honest answer to how often one can trade at the wanted precision.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from torchserve.dataset import Market, Samples
from torchserve.evaluation import Blocks, Decided, Figures
from torchserve.label import STUDIED, Label
from torchserve.sources import Report
from torchserve.threshold import Cut, independent
from torchserve.training import TrainingSettings, check_labels, fit
from torchserve.walk_forward import CHAMPION, WalkForwardSettings, block_splits

WIDEST: Final = "chosen"
"""In place of a horizon: the label that each block's history chose."""


@dataclass(frozen=True, slots=True)
class Studied:
    """What became of a label on all blocks together."""

    horizon: str
    """Seconds, or `WIDEST`."""
    delay_seconds: float
    base_rate: float
    """Share of eligible samples."""
    independent: float
    """Independent observations that the traded samples are worth."""
    traded: int
    """Samples."""
    blocks_reached: int
    """Blocks whose threshold was sure to reach the target where it was chosen."""
    figures: Figures


@dataclass(frozen=True, slots=True)
class _Block:
    samples: Samples
    decided: Decided
    cut: Cut


def study(
    market: Market,
    training: TrainingSettings,
    settings: WalkForwardSettings,
    labels: Sequence[Label] = STUDIED,
    report: Report = lambda _: None,
) -> list[Studied]:
    """The labels in their order, and after those of each delay what was chosen of them.

    Raises:
        SamplesError: Too short a time span, or a part of it in which every label is the same.
    """
    known = {label: market.samples(label).of_mf1 for label in labels}
    # All on the same span, so that the blocks of one label are those of any other.
    end = min((int(samples.time_ns.max()) for samples in known.values() if len(samples.rows)), default=0)
    by_delay: dict[float, list[list[_Block]]] = defaultdict(list)
    studied = []
    for label, samples in known.items():
        report(f"labels: {label.text}")
        part = samples.take(np.flatnonzero(samples.time_ns <= end))
        blocks = _walk(part, training.model_copy(update={"label": label}), settings)
        by_delay[label.delay_seconds].append(blocks)
    for delay, walks in by_delay.items():
        of_delay = [label for label in labels if label.delay_seconds == delay]
        for label, blocks in zip(of_delay, walks, strict=True):
            studied.append(_studied(f"{label.horizon_seconds:g}", delay, blocks, settings))
        chosen = [max(candidates, key=_preference) for candidates in zip(*walks, strict=True)]
        studied.append(_studied(WIDEST, delay, chosen, settings))
    return studied


def _preference(block: _Block) -> tuple[bool, float]:
    return block.cut.reached, block.cut.coverage if block.cut.reached else block.cut.low


def _walk(samples: Samples, training: TrainingSettings, settings: WalkForwardSettings) -> list[_Block]:
    blocks = []
    for split in block_splits(samples.time_ns, training, settings):
        check_labels(samples, split._replace(threshold=split.train, test=split.train))
        model = fit(CHAMPION, samples, split, training)
        scores = model.scores(samples.rows[split.test])
        decided = Decided(scores >= np.float32(model.cut.threshold), scores)
        blocks.append(_Block(samples.take(split.test), decided, model.cut))
    return blocks


def _studied(horizon: str, delay: float, blocks: Sequence[_Block], settings: WalkForwardSettings) -> Studied:
    samples = _joined([block.samples for block in blocks])
    trade: NDArray[np.bool_] = np.concatenate([block.decided.trade for block in blocks])
    scores = np.concatenate([block.decided.score for block in blocks if block.decided.score is not None])
    return Studied(
        horizon=horizon,
        delay_seconds=delay,
        base_rate=float(samples.eligible.mean()),
        independent=independent(samples, trade),
        traded=int(trade.sum()),
        blocks_reached=sum(block.cut.reached for block in blocks),
        figures=Blocks(samples, settings.bootstrap).figures(Decided(trade, scores)),
    )


def _joined(parts: Sequence[Samples]) -> Samples:
    """Samples of consecutive blocks, maybe of several labels, of which the furthest-looking is taken for the whole."""
    furthest = max((part.label for part in parts), key=lambda label: label.span_ns)
    return replace(
        parts[0],
        rows=np.concatenate([part.rows for part in parts]),
        eligible=np.concatenate([part.eligible for part in parts]),
        markout_bps=np.concatenate([part.markout_bps for part in parts]),
        time_ns=np.concatenate([part.time_ns for part in parts]),
        sell=np.concatenate([part.sell for part in parts]),
        instrument=np.concatenate([part.instrument for part in parts]),
        label=furthest,
    )
