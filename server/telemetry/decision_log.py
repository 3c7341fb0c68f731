"""The canonical log line: all that matters about one decision, in one line."""

from __future__ import annotations

from typing import Final

import structlog
from pydantic import BaseModel, ConfigDict, Field

from feature_cache.constants import Constant
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.reports import Report, Sink
from server.machine import REAL, Machine

_log = structlog.get_logger(__name__)

_ERROR_CAUSES: Final = frozenset(("failed", "degraded"))


class DecisionLogSettings(BaseModel):
    """Log lines of single decisions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    one_in: int = Field(default=1_000, ge=0)
    """One in this many good decisions gets a line, besides degraded, failed and slow ones; 0: none of the good ones."""
    slow_seconds: float = Field(default=0.025, gt=0, le=10)
    """A decision that takes longer than this gets a line, in seconds. Raise it if too many do."""
    max_per_second: Constant[float] = 20.0
    """Most lines a second; the rest are counted, and are in the audit. Nobody reads a log that grows faster."""


def decision_log(settings: DecisionLogSettings, everything: bool, machine: Machine = REAL) -> Sink:
    """The sink that writes canonical lines; with `everything`, one for every decision."""
    return Sink(
        "log",
        write_line,
        one_in=1 if everything else settings.one_in,
        slow_seconds=settings.slow_seconds,
        follows_traces=False,
        max_per_second=1e6 if everything else settings.max_per_second,
        machine=machine,
    )


def write_line(report: Report) -> None:
    """Writes a report as one line. The audit has what is not in it, quantity, price and score, by the decision's id."""
    log = _log.warning if report.cause in _ERROR_CAUSES else _log.info
    fields: dict[str, object] = {
        "cause": report.cause,
        "order_ref": report.order.order_ref[:64],
        "strategy": report.order.strategy[:64],
        "instrument": report.order.instrument[:64],
        "used_us": int(1e6 * (report.ended - report.arrived)),
    }
    if report.context.trace_id:
        fields["trace_id"] = report.context.trace_id
    if report.context.correlation_id:
        fields["correlation_id"] = report.context.correlation_id
    if report.error:
        fields["error"] = report.error
    if report.case is not None:
        fields["allowed_us"] = int(1e6 * report.case.budget.allowed)
        fields["degradations"] = [pb.Degradation.Name(each) for each in report.case.degradations]
        fields["attempts"] = [f"{attempt.replica} {attempt.outcome}" for attempt in report.case.attempts]
    if report.decision is not None:
        fields["decision_id"] = report.decision.decision_id
        fields["action"] = pb.Action.Name(report.decision.action)
        fields["source"] = pb.Source.Name(report.decision.source)
        fields["reasons"] = [pb.ReasonCode.Name(each) for each in report.decision.reasons]
    log("decision", **fields)
