"""Whether the features of a case may decide: one rule, for the request path and for a replay of it.

Comparisons are written so that an undefined age (NaN) is too old.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from fallback.order import Case
from feature_cache import features
from feature_cache.store.codec import BookState
from pretrade.decision.v1 import decision_pb2 as pb

DEGRADATIONS: Final = {
    pb.REASON_CODE_FEATURES_MISSING: pb.DEGRADATION_FEATURES_MISSING,
    pb.REASON_CODE_FEATURES_STALE: pb.DEGRADATION_FEATURES_STALE,
    pb.REASON_CODE_BOOK_UNKNOWN: pb.DEGRADATION_BOOK_UNKNOWN,
}
"""What a decision says of features that may not decide, by the reason why they may not."""
_BOOK_AGE: Final = features.MF1.index["book_age_ms"]


class FeatureSettings(BaseModel):
    """Which features may decide."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_age_seconds: float = Field(default=1.0, gt=0, le=60)
    """Features are stale, and no model uses them, above this age from exchange event time, in seconds. Lower it for a
    model that needs newer data; raise it for instruments that trade rarely."""
    file: Path | None = None
    """Python file with feature sets of your own, in a list `FEATURE_SETS`; see docs/feature-sets.md. The server runs it
    when it starts. Sets of installed packages need no file."""


def is_fresh(age_seconds: float, book_age_seconds: float, max_age_seconds: float) -> bool:
    """True when a vector and the book in it are young enough.

    Args:
        age_seconds: Age of the vector, >= 0.
        book_age_seconds: Age of the book when the vector was made: trades go on arriving while the book's feed is dead.
        max_age_seconds: The oldest book that may decide.
    """
    return book_age_seconds >= 0.0 and age_seconds + book_age_seconds <= max_age_seconds


def problem_of(
    state: BookState | None, age_seconds: float, book_age_seconds: float, max_age_seconds: float
) -> pb.ReasonCode.ValueType | None:
    """Why the server's own features of an instrument may not decide; None if they may.

    Args:
        state: State of the book; None when the server has no vector.
        age_seconds: Of the vector.
        book_age_seconds: Of the book in it.
        max_age_seconds: See `is_fresh`.
    """
    if state is None:
        return pb.REASON_CODE_FEATURES_MISSING
    if state is BookState.UNKNOWN:
        return pb.REASON_CODE_BOOK_UNKNOWN
    if not is_fresh(age_seconds, book_age_seconds, max_age_seconds):
        return pb.REASON_CODE_FEATURES_STALE
    return None


def judge(case: Case, problem: pb.ReasonCode.ValueType | None, max_age_seconds: float) -> None:
    """Writes into the case what is wrong with the features; `features_problem` is about those that would decide.

    The server's own features matter even if the caller sent others: the guards' mid comes from them.

    Args:
        case: The order, with its caller's own features if it has any.
        problem: Of the server's own.
        max_age_seconds: See `is_fresh`.
    """
    if problem is not None:
        case.degradations.append(DEGRADATIONS[problem])
    own = case.order.caller_features
    if own is None:
        case.features_problem = problem
    elif not is_fresh(0.0, own.item(_BOOK_AGE) / 1e3, max_age_seconds):
        case.features_problem = pb.REASON_CODE_FEATURES_STALE
        if pb.DEGRADATION_FEATURES_STALE not in case.degradations:
            case.degradations.append(pb.DEGRADATION_FEATURES_STALE)
