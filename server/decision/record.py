"""Writes a decision as the reply of the contract, as bytes and only once.

The caller's reply differs from what is recorded (`packets.py`) in its ledger alone, which then also contains the time
of the audit.
"""

from __future__ import annotations

import enum
import hashlib
import math
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from google.protobuf.timestamp_pb2 import Timestamp

from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.protowire import prefixed, template, varint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fallback.budget import Budget, Use
    from fallback.order import Answer, Case

_ZERO: Final = varint(0)
_double: Final = struct.Struct("<d").pack
_EXPIRES: Final = struct.Struct("<q")
"""Unix seconds."""

_OUTCOME: Final = template(pb.Decision.DESCRIPTOR, "decision_id", "action", "reasons")
_ORDER_REF: Final = template(pb.Decision.DESCRIPTOR, "order_ref")
_MODEL: Final = template(pb.Decision.DESCRIPTOR, "source", "model_name", "model_version")
_SCORE: Final = template(pb.Decision.DESCRIPTOR, "score", "threshold")
_DEGRADATIONS: Final = template(pb.Decision.DESCRIPTOR, "degradations")
_FEATURE_AGE: Final = template(pb.Decision.DESCRIPTOR, "feature_age")
_DECIDED_AT: Final = template(pb.Decision.DESCRIPTOR, "decided_at", "control_version")
_LEDGER: Final = template(pb.Decision.DESCRIPTOR, "budget")
_BUDGET: Final = template(pb.Budget.DESCRIPTOR, "allowed_us", "used_us")
_USES: Final = template(pb.Budget.DESCRIPTOR, "stages")
_STAGE: Final = template(pb.StageUse.DESCRIPTOR, "stage")
_USE_OF: Final = {
    stage: _STAGE % varint(stage) + template(pb.StageUse.DESCRIPTOR, "allowed_us", "used_us")
    for stage in pb.Stage.values()
}
"""By stage."""
_SKIPPED: Final = template(pb.StageUse.DESCRIPTOR, "skipped")
_INSTANT: Final = template(Timestamp.DESCRIPTOR, "seconds", "nanos")
"""A `Duration` has the same fields."""


class ReplyState(enum.Enum):
    """What is known of a decision's reply; maintained by `server.decision.replies`."""

    NONE = enum.auto()
    """There is nothing to note: no row was written, or the commit failed, or it is what a repeat hears in place of the
    decision, which was noted before."""
    OWED = enum.auto()
    """Nobody knows yet whether the caller will hear it."""
    HEARD = enum.auto()
    """A caller heard it."""
    UNHEARD = enum.auto()
    """Noted as not heard."""
    ELSEWHERE = enum.auto()
    """Another process decided, and knows."""


class Decided:
    """A decision, ready to be recorded and sent.

    `wire` is the serialised `Decision`. In the packet its ledger ends before the audit; in the reply it includes the
    audit's time. `abstained` is true when the caller gets ABSTAIN because the audit failed, whatever the packet says.
    """

    __slots__ = (
        "_head",
        "_ledger",
        "_rest",
        "_uses",
        "abstained",
        "action",
        "allowed_us",
        "arrived",
        "decision_id",
        "model_expires_at",
        "order_ref",
        "reasons",
        "reply",
        "source",
        "used_us",
        "wire",
    )

    def __init__(
        self,
        case: Case,
        answer: Answer,
        action: pb.Action.ValueType,
        reasons: list[pb.ReasonCode.ValueType],
        decision_id: str,
        now: float,
        wall_ns: int,
        control_version: int = 0,
    ) -> None:
        """The decision at the monotonic instant `now`, without the cost of what follows (audit and reply)."""
        self.decision_id = decision_id
        self.order_ref = case.order.message.order_ref
        self.action = action
        self.source = answer.source
        self.reasons = reasons
        self.model_expires_at = answer.model_expires_at
        self.reply = ReplyState.NONE
        self.abstained = False
        seconds, nanos = divmod(wall_ns, 1_000_000_000)
        rest = _model(answer.source, answer.model_name, answer.model_version) + _DECIDED_AT % (
            prefixed(_INSTANT % (varint(seconds), varint(nanos))),
            varint(control_version),
        )
        if not math.isnan(answer.score):
            rest += _SCORE % (_double(answer.score), _double(answer.threshold))
        if not math.isnan(case.feature_age_seconds):
            rest += _FEATURE_AGE % prefixed(_duration(int(case.feature_age_seconds * 1e9)))
        if case.degradations:
            rest += _DEGRADATIONS % prefixed(bytes(case.degradations))
        self._rest = rest
        budget = case.budget
        self.arrived = budget.arrived
        self.allowed_us = max(0, int(budget.allowed * 1e6))
        self._uses = _uses(budget.uses)
        self._write_head()
        self._write(now)

    @classmethod
    def repeated(cls, remembered: bytes, order_ref: str, *, is_withdrawn: bool) -> Decided:
        """A decision that was made before, perhaps by another process; its ledger is not changed.

        Args:
            remembered: See there.
            order_ref: That of the order, which is the same as of the first one.
            is_withdrawn: True when it replaces the first decision for repeats.
        """
        (expires_at,) = _EXPIRES.unpack_from(remembered)
        message = pb.Decision.FromString(remembered[_EXPIRES.size :])
        message.order_ref = order_ref
        decided = cls._of(message, expires_at)
        if not is_withdrawn and pb.REASON_CODE_AUDIT_UNAVAILABLE not in decided.reasons:
            decided.reply = ReplyState.ELSEWHERE
        return decided

    def withdrawn(
        self, action: pb.Action.ValueType, reasons: list[pb.ReasonCode.ValueType], control_version: int
    ) -> Decided:
        """The same decision for a repeat of the call to which the guards object now."""
        message = pb.Decision.FromString(self.wire)
        message.action, message.reasons[:], message.control_version = action, reasons, control_version
        return self._of(message, self.model_expires_at)

    @classmethod
    def _of(cls, message: pb.Decision, expires_at: int) -> Decided:
        decided = cls.__new__(cls)
        decided.model_expires_at = expires_at
        decided.decision_id = message.decision_id
        decided.order_ref = message.order_ref
        decided.action = message.action
        decided.source = message.source
        decided.reasons = list(message.reasons)
        decided.reply = ReplyState.NONE
        decided.abstained = pb.REASON_CODE_AUDIT_LATE in decided.reasons
        decided.allowed_us = message.budget.allowed_us
        decided.used_us = message.budget.used_us
        decided.wire = message.SerializeToString()
        message.ClearField("order_ref")
        decided._head, decided._ledger = message.SerializeToString(), b""
        return decided

    @property
    def uses(self) -> bytes:
        """The ledger so far: a serialised `Budget` that holds the stages alone."""
        return self._uses

    @property
    def remembered(self) -> bytes:
        """What repeats of the call need: when the model expires, 8 bytes, and the decision without its `order_ref`."""
        return _EXPIRES.pack(self.model_expires_at) + self._head + self._ledger

    def charge_audit(self, budget: Budget, allowed: float, started: float, now: float) -> None:
        """Adds the cost of the durable audit to the ledger and the reply."""
        budget.charge(pb.STAGE_AUDIT, allowed, now - started)
        self._uses += _uses(budget.uses[-1:])
        self._write(now)

    def abstain(self, reason: pb.ReasonCode.ValueType) -> None:
        """Makes it an abstention for the audit's sake; to be followed by `charge_audit`."""
        self.abstained = True
        self.action = pb.ACTION_ABSTAIN
        self.reasons.append(reason)
        self._write_head()

    def _write_head(self) -> None:
        """Everything but the ledger and the caller's reference."""
        self._head = self._rest + _OUTCOME % (
            prefixed(self.decision_id.encode()),
            varint(self.action),
            prefixed(bytes(self.reasons)),
        )

    def _write(self, now: float) -> None:
        self.used_us = max(0, int((now - self.arrived) * 1e6))
        ledger = _BUDGET % (varint(self.allowed_us), varint(self.used_us)) + self._uses
        self._ledger = _LEDGER % prefixed(ledger)
        self.wire = self._head + _ORDER_REF % prefixed(self.order_ref.encode()) + self._ledger


@lru_cache(maxsize=256)
def _model(source: pb.Source.ValueType, name: str, version: str) -> bytes:
    return _MODEL % (varint(source), prefixed(name.encode()), prefixed(version.encode()))


def _uses(uses: Sequence[Use]) -> bytes:
    written = []
    for stage, allowed, used, skipped in uses:
        content = _USE_OF[stage] % (_microseconds(allowed), _microseconds(used))
        if skipped:
            content += _SKIPPED % varint(skipped)
        written.append(_USES % prefixed(content))
    return b"".join(written)


def _duration(nanoseconds: int) -> bytes:
    """Seconds and nanoseconds, both with the sign of the whole."""
    seconds, nanos = divmod(abs(nanoseconds), 1_000_000_000)
    sign = -1 if nanoseconds < 0 else 1
    return _INSTANT % (varint(sign * seconds), varint(sign * nanos))


def _microseconds(seconds: float) -> bytes:
    return varint(int(seconds * 1e6)) if seconds > 0 else _ZERO


def hash_of(settings_json: str) -> str:
    """The hash by which packets name settings."""
    return hashlib.sha256(settings_json.encode()).hexdigest()[:16]
