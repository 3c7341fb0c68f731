"""Shadow calls: decided rows mirrored to the challenger, after the reply, never waited for."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from server.inference.batcher import Result, Scored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from server.inference.replica import Replica


class Shadow:
    """Sends rows to the challenger and compares what it says with what was decided.

    A challenger that is slow, hung or broken costs a decision nothing: its queue is bounded and rows beyond it are shed
    and counted. The challenger's breaker applies, so a dead one is not even asked.
    """

    def __init__(self, challenger: Replica) -> None:
        self._challenger = challenger
        self.offered = 0
        """Rows that should have been mirrored."""
        self.refused = 0
        """Rows not sent because the challenger's breaker was open."""
        self.agreed = 0
        """Rows on which champion and challenger fell on the same side of their thresholds."""
        self.disagreed = 0
        """Rows on which they did not."""
        self.uncompared = 0
        """Rows the challenger scored and no champion did."""
        self.failed = 0
        """Rows without a usable score."""

    def fates(self) -> dict[str, int]:
        """Rows by what became of them; those under way are missing."""
        return {
            "agreed": self.agreed,
            "disagreed": self.disagreed,
            "uncompared": self.uncompared,
            "failed": self.failed,
            "shed": self._challenger.batcher.shed,
            "refused": self.refused,
        }

    def mirror(self, features: NDArray[np.float32], champion_score: float, champion_threshold: float) -> None:
        """Offers one row (float32[N_FEATURES], turned for the side) with the champion's score, NaN for none."""
        self.offered += 1
        if not self._challenger.available:
            self.refused += 1
            return
        future = self._challenger.batcher.submit_shadow(features.astype("<f4", copy=False).tobytes())
        if future is not None:
            champion_trades = None if math.isnan(champion_score) else champion_score >= champion_threshold
            future.add_done_callback(lambda done: self._compare(done, champion_trades))

    def _compare(self, done: asyncio.Future[Result], champion_trades: bool | None) -> None:
        if done.cancelled():
            return
        result = done.result()
        if not isinstance(result, Scored):
            self.failed += 1
        elif champion_trades is None:
            self.uncompared += 1
        elif (result.score >= result.model.threshold) == champion_trades:
            self.agreed += 1
        else:
            self.disagreed += 1
