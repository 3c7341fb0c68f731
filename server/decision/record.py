"""Writes a decision as the reply of the contract, as bytes and only once: when they are asked for.

The caller's reply differs from what is recorded (`packets.py`) in its ledger alone, which then also contains the time
of the audit.
"""

from __future__ import annotations

import enum
import hashlib
import math
import struct
from typing import TYPE_CHECKING, Final, Protocol

from fallback.order import Answer
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision import decision_wire

if TYPE_CHECKING:
    from fallback.budget import Budget, Use
    from fallback.order import Attempt, Case, Order

    RecordedRow = tuple[
        Case,
        Answer,
        Order,
        str,
        pb.Action.ValueType,
        bytes,
        bytes,
        int,
        int,
        list[Use],
        tuple[Attempt, ...],
        int,
        int,
    ]
    """What is written down of a decision, as it was when the decision was made: a case, its answer and its order;
    decision id, action, reasons and degradations; microseconds allowed and used, and the ledger; the attempts;
    nanoseconds of the wall clock and of the monotonic one."""

_EXPIRES: Final = struct.Struct("<q")
"""Unix seconds."""


class ReplyState(enum.Enum):
    """What is known of a decision's reply; maintained by `server.decision.replies`."""

    NONE = enum.auto()
    """There is nothing to note: no row was written, or the commit failed, or it is what a repeat hears in place of the
    decision, which was noted before."""
    OWED = enum.auto()
    """Nobody knows yet whether the caller will hear it."""
    HEARD = enum.auto()
    """A caller heard it."""
    UNSENT = enum.auto()
    """Noted as not sent for seconds. It may be sent yet, or given up."""
    UNHEARD = enum.auto()
    """Noted as not heard."""
    REPEATED = enum.auto()
    """Noted as perhaps heard by a repeat."""
    ELSEWHERE = enum.auto()
    """Another process decided, and knows."""


class HeldTogether(Protocol):
    """Decisions that were made in columns: the journal holds them as one until all of them are settled."""

    unsettled: set[Decided]
    """Those of which it is not yet durable what their callers heard."""

    def __len__(self) -> int:
        """How many they are."""
        ...

    def __hash__(self) -> int:
        """Each is equal to itself alone."""
        ...


class Decided:
    """A decision, ready to be recorded and sent.

    In the packet its ledger ends before the audit; in the reply it includes the audit's time. `abstained` is true when
    the caller gets ABSTAIN because the audit failed, whatever the packet says.
    """

    __slots__ = (
        "_answer",
        "_control_version",
        "_decided_at_ns",
        "_degradations",
        "_feature_age_seconds",
        "_uses",
        "_wire",
        "abstained",
        "action",
        "allowed_us",
        "arrived",
        "block",
        "decision_id",
        "model_expires_at",
        "order_ref",
        "reasons",
        "reply",
        "source",
        "used_us",
    )

    count: Final = 1
    """Decisions; see `DecidedBlock`."""

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
        self.order_ref = case.order.order_ref
        self.action = action
        self.source = answer.source
        self.reasons = reasons
        self.model_expires_at = answer.model_expires_at
        self.reply = ReplyState.NONE
        self.block: HeldTogether | None = None
        """Those that it was decided with in columns, if it was."""
        self.abstained = False
        self._answer = answer
        self._feature_age_seconds = case.feature_age_seconds
        self._degradations = case.degradations
        self._decided_at_ns = wall_ns
        self._control_version = control_version
        budget = case.budget
        arrived = self.arrived = budget.arrived
        self.allowed_us = max(0, int((budget.deadline - arrived) * 1e6))
        self.used_us = max(0, int((now - arrived) * 1e6))
        self._uses = budget.uses
        self._wire: bytes | None = None

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
        decided.block = None
        decided.abstained = pb.REASON_CODE_AUDIT_LATE in decided.reasons
        decided.allowed_us = message.budget.allowed_us
        decided.used_us = message.budget.used_us
        decided._wire = message.SerializeToString()
        return decided

    @property
    def wire(self) -> bytes:
        """The serialised `Decision`."""
        if self._wire is None:
            answer = self._answer
            self._wire = decision_wire.write(
                self.decision_id,
                self.order_ref,
                self.action,
                self.reasons,
                self._degradations,
                self.source,
                answer.model_name,
                answer.model_version,
                answer.score,
                answer.threshold,
                self._feature_age_seconds,
                self._decided_at_ns,
                self._control_version,
                self.allowed_us,
                self.used_us,
                self._uses,
            )
        return self._wire

    @property
    def answer(self) -> Answer:
        """What the source said, for the guards of a repeat."""
        message = pb.Decision.FromString(self.wire)
        return Answer(
            self.action,
            self.source,
            self.reasons[0],
            message.score if message.HasField("score") else math.nan,
            message.threshold if message.HasField("threshold") else math.nan,
            message.model_name,
            message.model_version,
            self.model_expires_at,
        )

    @property
    def remembered(self) -> bytes:
        """What repeats of the call need: when the model expires, 8 bytes, and the decision without its `order_ref`."""
        return remembered_of(pb.Decision.FromString(self.wire), self.model_expires_at)

    def charge_audit(self, budget: Budget, allowed: float, started: float, now: float) -> None:
        """Adds the cost of the durable audit to the ledger and the reply."""
        budget.charge(pb.STAGE_AUDIT, allowed, now - started)
        self.used_us = max(0, int((now - self.arrived) * 1e6))
        self._wire = None

    def abstain(self, reason: pb.ReasonCode.ValueType) -> None:
        """Makes it an abstention for the audit's sake; to be followed by `charge_audit`."""
        self.abstained = True
        self.action = pb.ACTION_ABSTAIN
        self.reasons.append(reason)


def remembered_of(message: pb.Decision, model_expires_at: int) -> bytes:
    """`Decided.remembered` of a decision, which loses its `order_ref`."""
    message.ClearField("order_ref")
    return _EXPIRES.pack(model_expires_at) + message.SerializeToString()


def hash_of(settings_json: str) -> str:
    """The hash by which packets name settings."""
    return hashlib.sha256(settings_json.encode()).hexdigest()[:16]
