"""Writes a decision as the contract's messages: the reply and the audit packet.

Both are written as bytes, and only once: the packet contains the bytes of the reply. The caller's reply differs from
the recorded one in its ledger alone, which then also contains the time of the audit.
"""

from __future__ import annotations

import enum
import hashlib
import math
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from fallback.order import NO_CONTEXT
from feature_cache import features
from feature_cache.store.codec import BookState
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.control.state import ControlState
from server.decision import decision_wire
from server.decision.protowire import prefixed, template, varint

if TYPE_CHECKING:
    from fallback.budget import Budget
    from fallback.order import Answer, Attempt, Case
    from feature_cache.store.codec import FeatureSnapshot

_BOOK_AGE = features.INDEX["book_age_ms"]
_BOOK_STATES = {
    BookState.UNKNOWN: packet_pb2.BOOK_STATE_UNKNOWN,
    BookState.VALID: packet_pb2.BOOK_STATE_VALID,
    BookState.LOCKED: packet_pb2.BOOK_STATE_LOCKED,
}
_ZERO: Final = varint(0)
_double: Final = struct.Struct("<d").pack
_float: Final = struct.Struct("<f").pack
_EXPIRES: Final = struct.Struct("<q")
"""Unix seconds."""

_ENTRY: Final = template(packet_pb2.JournalEntry.DESCRIPTOR, "decision")
_PACKET: Final = template(
    packet_pb2.DecisionPacket.DESCRIPTOR, "order", "decision", "arrived_monotonic_ns", "decided_monotonic_ns"
)
_MODEL_INPUT: Final = template(packet_pb2.DecisionPacket.DESCRIPTOR, "model_input", "feature_set_id")
_PROVENANCE: Final = template(packet_pb2.DecisionPacket.DESCRIPTOR, "features")
_FROM_CALLER: Final = template(packet_pb2.FeatureProvenance.DESCRIPTOR, "from_caller") % varint(True)
_KNOWN: Final = template(
    packet_pb2.FeatureProvenance.DESCRIPTOR, "sequence", "event_time_ns", "book_state", "book_age_ms"
)
_AGE: Final = template(packet_pb2.FeatureProvenance.DESCRIPTOR, "age_us", "age_seconds")
_ATTEMPTS: Final = template(packet_pb2.DecisionPacket.DESCRIPTOR, "attempts")
_ATTEMPT: Final = template(packet_pb2.Attempt.DESCRIPTOR, "replica", "outcome", "model_version")
_ATTEMPT_COST: Final = template(packet_pb2.Attempt.DESCRIPTOR, "used_us", "batch_rows", "batch_index")
_SERVER: Final = template(
    packet_pb2.DecisionPacket.DESCRIPTOR, "instance_id", "config_hash", "durability", "trading_state"
)
_FLAG_ON: Final = template(packet_pb2.DecisionPacket.DESCRIPTOR, "flags_on")
_CHAIN_STAGE: Final = template(packet_pb2.DecisionPacket.DESCRIPTOR, "chain_stages")
_MID: Final = template(packet_pb2.DecisionPacket.DESCRIPTOR, "mid_price")
_SOURCE: Final = template(packet_pb2.DecisionPacket.DESCRIPTOR, "cached_from_decision_id", "model_expires_at")
_CONTEXT: Final = template(packet_pb2.DecisionPacket.DESCRIPTOR, "trace_id", "correlation_id")


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
        "_control_version",
        "_decided_at_ns",
        "_degradations",
        "_feature_age_seconds",
        "_model_name",
        "_model_version",
        "_score",
        "_threshold",
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
        self.order_ref = case.order.order_ref
        self.action = action
        self.source = answer.source
        self.reasons = reasons
        self.model_expires_at = answer.model_expires_at
        self.reply = ReplyState.NONE
        self.abstained = False
        self._model_name = answer.model_name
        self._model_version = answer.model_version
        self._score = answer.score
        self._threshold = answer.threshold
        self._feature_age_seconds = case.feature_age_seconds
        self._degradations = case.degradations
        self._decided_at_ns = wall_ns
        self._control_version = control_version
        budget = case.budget
        self.arrived = budget.arrived
        self.allowed_us = max(0, int(budget.allowed * 1e6))
        self._uses = budget.uses
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
        return decided

    @property
    def remembered(self) -> bytes:
        """What repeats of the call need: when the model expires, 8 bytes, and the decision without its `order_ref`."""
        message = pb.Decision.FromString(self.wire)
        message.ClearField("order_ref")
        return _EXPIRES.pack(self.model_expires_at) + message.SerializeToString()

    def charge_audit(self, budget: Budget, allowed: float, started: float, now: float) -> None:
        """Adds the cost of the durable audit to the ledger and the reply."""
        budget.charge(pb.STAGE_AUDIT, allowed, now - started)
        self._write(now)

    def abstain(self, reason: pb.ReasonCode.ValueType) -> None:
        """Makes it an abstention for the audit's sake; to be followed by `charge_audit`."""
        self.abstained = True
        self.action = pb.ACTION_ABSTAIN
        self.reasons.append(reason)

    def _write(self, now: float) -> None:
        self.used_us = max(0, int((now - self.arrived) * 1e6))
        self.wire = decision_wire.write(
            self.decision_id,
            self.order_ref,
            self.action,
            self.reasons,
            self._degradations,
            self.source,
            self._model_name,
            self._model_version,
            self._score,
            self._threshold,
            self._feature_age_seconds,
            self._decided_at_ns,
            self._control_version,
            self.allowed_us,
            self.used_us,
            self._uses,
        )


class PacketWriter:
    """Writes audit packets; holds what all packets of this process share."""

    def __init__(self, instance_id: str, config_hash: str, durability: str, control: ControlState) -> None:
        self._instance_id = instance_id
        self.config_hash = config_hash
        """Of the settings in force."""
        self._durability = durability
        self._control = control
        self._known: dict[str, tuple[FeatureSnapshot, bytes]] = {}
        """The newest snapshot of an instrument, and what packets say of it."""

    def packet(self, case: Case, answer: Answer, decided: Decided, now: float) -> bytes:
        """The serialised journal entry of a decision made at the monotonic instant `now`."""
        parts = [
            _PACKET
            % (
                prefixed(case.order.wire),
                prefixed(decided.wire),
                varint(int(case.budget.arrived * 1e9)),
                varint(int(now * 1e9)),
            ),
            self._server(),
            _stages(tuple(case.stages)),
        ]
        if case.features is not None:
            parts.append(_MODEL_INPUT % (prefixed(case.row()), _FEATURE_SET))
        provenance = b"" if case.order.caller_features is None else _FROM_CALLER
        if case.snapshot is not None:
            age = _AGE % (varint(int(case.snapshot_age_seconds * 1e6)), _double(case.snapshot_age_seconds))
            provenance += self._about(case.snapshot) + age
        if provenance:
            parts.append(_PROVENANCE % prefixed(provenance))
        parts.extend(map(_attempt, case.attempts))
        if not math.isnan(case.mid):
            parts.append(_MID % _double(case.mid))
        if answer.cached_from or answer.model_expires_at:
            parts.append(_SOURCE % (prefixed(answer.cached_from.encode()), varint(answer.model_expires_at)))
        if (context := case.order.context) is not NO_CONTEXT:
            parts.append(_CONTEXT % (prefixed(context.trace_id.encode()), prefixed(context.correlation_id.encode())))
        return _ENTRY % prefixed(b"".join(parts))

    @property
    def control_version(self) -> int:
        """Version of the control state that decisions are made under."""
        return self._control.version

    def settings(self, settings_json: str, software_version: str, wall_ns: int) -> bytes:
        """The serialised journal entry of the settings that packets name by their hash."""
        return packet_pb2.JournalEntry(
            settings=packet_pb2.SettingsInForce(
                config_hash=self.config_hash,
                settings_json=settings_json,
                software_version=software_version,
                instance_id=self._instance_id,
                recorded_at_ns=wall_ns,
            )
        ).SerializeToString()

    def _server(self) -> bytes:
        """What holds for all packets while the control state is what it is."""
        control = self._control
        return _server(
            self._instance_id, self.config_hash, self._durability, control.trading_state_name, tuple(control.flags_on)
        )

    def _about(self, snapshot: FeatureSnapshot) -> bytes:
        """What the server knew of the instrument: the same until its next snapshot."""
        known = self._known.get(snapshot.instrument)
        if known is None or known[0] is not snapshot:
            about = _KNOWN % (
                varint(snapshot.sequence),
                varint(snapshot.event_time_ns),
                varint(_BOOK_STATES[snapshot.state]),
                _float(snapshot.values[_BOOK_AGE]),
            )
            known = self._known[snapshot.instrument] = (snapshot, about)
        return known[1]


_FEATURE_SET: Final = prefixed(features.FEATURE_SET_ID.encode())


@lru_cache(maxsize=256)
def _server(
    instance_id: str,
    config_hash: str,
    durability: str,
    trading_state: str,
    flags_on: tuple[str, ...],
) -> bytes:
    texts = (instance_id, config_hash, durability, trading_state)
    flags = (_FLAG_ON % prefixed(flag.encode()) for flag in flags_on)
    return b"".join((_SERVER % tuple(prefixed(one.encode()) for one in texts), *flags))


@lru_cache(maxsize=256)
def _stages(names: tuple[str, ...]) -> bytes:
    return b"".join(_CHAIN_STAGE % prefixed(name.encode()) for name in names)


@lru_cache(maxsize=256)
def _attempt_head(replica: str, outcome: str, model_version: str) -> bytes:
    return _ATTEMPT % tuple(prefixed(one.encode()) for one in (replica, outcome, model_version))


def _attempt(attempt: Attempt) -> bytes:
    cost = _ATTEMPT_COST % (
        _microseconds(attempt.used_seconds),
        varint(attempt.batch_rows),
        varint(attempt.batch_index),
    )
    return _ATTEMPTS % prefixed(_attempt_head(attempt.replica, attempt.outcome, attempt.model_version) + cost)


def _microseconds(seconds: float) -> bytes:
    return varint(int(seconds * 1e6)) if seconds > 0 else _ZERO


def hash_of(settings_json: str) -> str:
    """The hash by which packets name settings."""
    return hashlib.sha256(settings_json.encode()).hexdigest()[:16]
