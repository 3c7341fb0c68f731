"""Writes decisions in Protocol Buffers' wire format: the most frequent message, and with its ledger the longest.

The generated classes write the same bytes; `decision_wire_c.pyx`, where it is compiled, does it some twenty times as
fast. Tests hold one against the other.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from feature_cache.compiled import compiled
from pretrade.decision.v1 import decision_pb2 as pb
from server.journal.protowire import prefixed, template

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fallback.budget import Use

ORDER_DECIDED: Final = template(pb.OrderResult.DESCRIPTOR, "order_ref", "decision")
RESULTS: Final = template(pb.DecideBatchResponse.DESCRIPTOR, "results")


def write_plainly(
    decision_id: str,
    order_ref: str,
    action: pb.Action.ValueType,
    reasons: list[pb.ReasonCode.ValueType],
    degradations: list[pb.Degradation.ValueType],
    source: pb.Source.ValueType,
    model_name: str,
    model_version: str,
    score: float,
    threshold: float,
    feature_age_seconds: float,
    decided_at_ns: int,
    control_version: int,
    allowed_us: int,
    used_us: int,
    uses: list[Use],
) -> bytes:
    """A `Decision`, serialised.

    What is not said here is as in the contract. `score` and `threshold` are left out when the score is NaN,
    `feature_age_seconds` when it is NaN. `decided_at_ns` counts from the Unix epoch. `uses` is what each stage was
    allowed and used, in seconds; a negative time is written as 0.
    """
    message = pb.Decision(
        decision_id=decision_id,
        order_ref=order_ref,
        action=action,
        source=source,
        reasons=reasons,
        degradations=degradations,
        model_name=model_name,
        model_version=model_version,
        control_version=control_version,
    )
    if not math.isnan(score):
        message.score, message.threshold = score, threshold
    if not math.isnan(feature_age_seconds):
        message.feature_age.FromNanoseconds(int(feature_age_seconds * 1e9))
    message.budget.allowed_us, message.budget.used_us = allowed_us, used_us
    _add_stages(message.budget, uses)
    message.decided_at.FromNanoseconds(decided_at_ns)
    return message.SerializeToString()


def write_stages_plainly(uses: list[Use]) -> bytes:
    """A `Budget` that says no more than what each stage was allowed and used, serialised."""
    budget = pb.Budget()
    _add_stages(budget, uses)
    return budget.SerializeToString()


def write_results_plainly(order_refs: Sequence[str], decisions: Sequence[bytes]) -> bytes:
    """A `DecideBatchResponse` with the results of these orders, serialised; `decisions` are so by now."""
    results = [
        ORDER_DECIDED % (prefixed(order_ref.encode()), prefixed(decision))
        for order_ref, decision in zip(order_refs, decisions, strict=True)
    ]
    return b"".join([RESULTS % prefixed(result) for result in results])


def _add_stages(budget: pb.Budget, uses: list[Use]) -> None:
    for stage, allowed, used, skipped in uses:
        budget.stages.add(stage=stage, allowed_us=_microseconds(allowed), used_us=_microseconds(used), skipped=skipped)


def _microseconds(seconds: float) -> int:
    return int(seconds * 1e6) if seconds > 0 else 0


_compiled = compiled("server.decision.decision_wire_c")
write: Final = write_plainly if _compiled is None else _compiled.write
"""`write_plainly`, or what does the same faster."""
write_stages: Final = write_stages_plainly if _compiled is None else _compiled.write_stages
"""`write_stages_plainly`, or what does the same faster."""
write_results: Final = write_results_plainly if _compiled is None else _compiled.write_results
"""`write_results_plainly`, or what does the same faster."""
