"""Settings of the canary and of the shadow traffic it is judged by."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from feature_cache.constants import Constant

Share = Annotated[float, Field(ge=0, le=1)]
Tolerance = Annotated[float, Field(ge=0, le=0.99)]


class CanarySettings(BaseModel):
    """When a canary takes its next step, and when it is rolled back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: tuple[float, ...] = Field(default=(0.01, 0.05, 0.25, 0.5, 1.0), min_length=1)
    """Share of the order flows at each step, increasing to 1; a JSON list. Fewer steps promote sooner and risk more."""
    dwell_seconds: float = Field(default=300.0, ge=0, le=604_800)
    """Least time at a step, in seconds. Raise it to see each step in more market conditions."""
    patience_seconds: float = Field(default=3_600.0, gt=0, le=2_592_000)
    """A canary that cannot prove a step within this time, in seconds, is rolled back. Raise it for few orders."""
    independent_seconds: float | None = Field(default=None, gt=0, le=3_600)
    """Rows of one instrument within this time, in seconds, are one observation: they share an outcome. Unset: 5, or
    what the canary's label looks ahead if that is longer. Raise it to the time that a state of your market lasts; lower
    it only to try a canary out, because it is then rolled back and promoted by chance."""
    min_orders: int = Field(default=100, ge=1, le=1_000_000)
    """Batches of the canary, quarters of a second with batches of its own orders, and tenths with such orders, that a
    step must have had, in the process that takes the next one."""
    min_pairs: int = Field(default=60, ge=1, le=10_000_000)
    """Observations of rows that both models scored that a step must have had, likewise."""
    min_outcomes: int = Field(default=100, ge=0, le=10_000_000)
    """Observations of rows whose outcome is known that a step must have had, likewise. With 0, outcomes can only count
    against the canary, and one that differs from the champion is rolled back, be it better or not."""
    false_rollback_probability: Constant[float] = 0.001
    """Probability of rolling back a canary that is within every tolerance all the time; over its life, all checks and
    processes. One canary in a thousand is rare enough."""
    judges: int | None = Field(default=None, ge=1, le=10_000)
    """Number of processes that judge a canary, over all servers that share the control state. Set it if you run several
    servers. Unset: the processes of this server."""
    false_step_probability: Constant[float] = 0.05
    """Probability of taking a step with a canary that is beyond a tolerance all the time. Five per cent is the common
    choice, and the next step tests again."""
    max_error_excess: Tolerance = 0.02
    """Tolerance: share of failed batches, less the champion's."""
    max_fallback_share: Tolerance = 0.05
    """Tolerance: share of the canary's orders that it did not answer in time, less that of the champion's orders that
    the first replica asked did not."""
    slow_seconds: float = Field(default=0.01, gt=0, le=10)
    """A batch of orders that takes longer than this is slow, in seconds. Set it to the part of a decision's time that a
    model may take."""
    max_slow_excess: Tolerance = 0.1
    """Tolerance: share of slow batches of orders, less the champion's."""
    max_disagreement: Tolerance = 0.3
    """Tolerance: share of rows on which one model says TRADE and the other NO_TRADE. A canary that differs more must be
    shown to be better."""
    max_score_shift: Tolerance = 0.2
    """Tolerance: mean absolute difference of the scores of a row. A canary that differs more must be shown to be
    better."""
    max_rank_disagreement: float = Field(default=0.0, ge=-0.99, le=0.99)
    """Tolerance: share of the pairs of rows that the two models order differently, less the share that they order alike
    (Kendall's tau, negated, -1 to 1). Unrelated scores give 0. Lower it to require more agreement."""
    max_brier_excess: Tolerance = 0.02
    """Tolerance: Brier score, less the champion's, where outcomes are known."""
    max_bad_trade_excess: Tolerance = 0.05
    """Tolerance: share of rows with TRADE that turned out not to be eligible, less the champion's."""
    max_missed_trade_excess: Tolerance = 0.3
    """Tolerance: share of rows without TRADE that turned out to be eligible, less the champion's. Lower it if orders
    that are not sent cost you more than bad ones."""
    archive_url: str = Field(default="{version}.mar", pattern=r"^[^\s@]*\{version\}[^\s@]*$")
    """Where TorchServe finds the archive of a version: a file in its model store, or a URL that it may load from,
    without name and password. Set it if TorchServe has no access to the registry's folder."""
    load_seconds: Constant[float] = 60.0
    """How long loading a version into one replica may take, in seconds. Importing Torch alone takes
    several; a replica that needs longer than this hangs."""
    keep_previous_seconds: Constant[float] = 3_600.0
    """How long the champion's predecessor stays loaded after a promotion, in seconds. Going back within the hour needs
    no loading."""

    @field_validator("steps")
    @classmethod
    def _increase_to_one(cls, steps: tuple[float, ...]) -> tuple[float, ...]:
        check_steps(steps)
        return steps


class ShadowSettings(BaseModel):
    """Rows that the model which did not decide scores as well, after the reply."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_share: Share = 1.0
    """Share of the decisions that are mirrored. Lower it if the challenger cannot keep up."""
    keep_pairs: bool = True
    """Record the scores of both models in the audit. Turn it off to save disk space."""


def check_steps(steps: tuple[float, ...]) -> None:
    """Raises ValueError unless the steps increase from above 0 to 1."""
    # Written so that NaN, which compares with nothing, is refused.
    if not steps or steps[-1] != 1.0 or not all(a < b for a, b in pairwise((0.0, *steps))):
        raise ValueError("must increase from above 0 to 1, which is every order flow")
