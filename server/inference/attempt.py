"""The result of one attempt at a model: written into the case, and made an answer if the row was scored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fallback.block import Scores
from fallback.order import Answer, Attempt, held_against
from server.inference.outcome import Outcome
from server.inference.rows import Scored

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fallback.block import Model
    from fallback.order import Case
    from pretrade.decision.v1 import decision_pb2 as pb
    from server.inference.rows import Result


_SUCCESS: Final = Outcome.SUCCESS.value


def settle(
    case: Case, replica: str, source: pb.Source.ValueType, result: Result | None, used_seconds: float, span_id: str
) -> Answer | None:
    """Adds an attempt to its case.

    Args:
        case: The order that the attempt was made for.
        replica: The replica that was asked.
        source: Whose answer a score is.
        result: What the replica's batcher resolved to; None for an attempt that was given up.
        used_seconds: What the attempt took.
        span_id: The attempt's span in the call's trace; empty without tracing.

    Returns:
        The answer that the score gives; None without a score.
    """
    if not isinstance(result, Scored):
        outcome = Outcome.IGNORED if result is None else result
        case.attempts.append(Attempt(replica, outcome.value, used_seconds, "", span_id=span_id))
        return None
    model = result.model
    case.attempts.append(
        Attempt(
            replica,
            _SUCCESS,
            used_seconds,
            model.version,
            result.batch_rows,
            result.batch_index,
            span_id,
            result.queued_seconds,
            result.call_parent,
        )
    )
    action, reason = held_against(result.score, model.threshold)
    return Answer(
        action,
        source,
        reason,
        result.score,
        model.threshold,
        model.name,
        model.version,
        model.expires_at,
        parts=model.parts,
        part_scores=result.part_scores,
    )


def model_of(results: Sequence[Scored] | Scores) -> Model | None:
    """The model that has given all results of a block; None where several have."""
    if isinstance(results, Scores):
        return results.model
    model = results[0].model
    return model if all(one.model is model or one.model == model for one in results) else None
