"""Puts a decision into the contract's words: the reply and the audit packet."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from feature_cache import features
from feature_cache.codec import BookState
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.control.state import ControlState

if TYPE_CHECKING:
    from fallback.budget import Budget
    from fallback.order import Answer, Case

_BOOK_AGE = features.INDEX["book_age_ms"]
_BOOK_STATES = {
    BookState.UNKNOWN: packet_pb2.BOOK_STATE_UNKNOWN,
    BookState.VALID: packet_pb2.BOOK_STATE_VALID,
    BookState.LOCKED: packet_pb2.BOOK_STATE_LOCKED,
}
CHAMPION_SOURCES = frozenset((pb.SOURCE_PRIMARY, pb.SOURCE_SECONDARY))
_MODEL_SOURCES = CHAMPION_SOURCES | {pb.SOURCE_CANARY}


def decision(
    case: Case,
    answer: Answer,
    action: pb.Action.ValueType,
    reasons: list[pb.ReasonCode.ValueType],
    decision_id: str,
    now: float,
    wall_ns: int,
) -> pb.Decision:
    """The decision at the monotonic instant `now`, without the cost of what follows (audit and reply)."""
    message = pb.Decision(
        decision_id=decision_id,
        order_ref=case.order.message.order_ref,
        action=action,
        source=answer.source,
        reasons=reasons,
        degradations=case.degradations,
        model_name=answer.model_name,
        model_version=answer.model_version,
    )
    if not math.isnan(answer.score):
        message.score = answer.score
        message.threshold = answer.threshold
    if not math.isnan(case.feature_age_seconds):
        message.feature_age.FromNanoseconds(int(case.feature_age_seconds * 1e9))
    message.decided_at.seconds, message.decided_at.nanos = divmod(wall_ns, 1_000_000_000)
    budget = message.budget
    budget.allowed_us = _microseconds(case.budget.allowed)
    for use in case.budget.uses:
        _add_use(budget, use)
    budget.used_us = _microseconds(now - case.budget.arrived)
    return message


def charge_audit(message: pb.Decision, budget: Budget, allowed: float, started: float, now: float) -> None:
    """Adds the cost of the durable audit to the ledger and the reply."""
    budget.charge(pb.STAGE_AUDIT, allowed, now - started)
    _add_use(message.budget, budget.uses[-1])
    message.budget.used_us = _microseconds(now - budget.arrived)


class PacketWriter:
    """Fills audit packets; holds what all packets of this process share."""

    def __init__(self, instance_id: str, config_hash: str, durability: str, control: ControlState) -> None:
        self._instance_id = instance_id
        self.config_hash = config_hash
        """Of the settings in force."""
        self._durability = durability
        self._control = control

    def packet(self, case: Case, answer: Answer, message: pb.Decision, now: float) -> bytes:
        """The serialized journal entry of a decision made at the monotonic instant `now`."""
        message.control_version = self._control.version
        entry = packet_pb2.JournalEntry()
        packet = entry.decision
        packet.order.CopyFrom(case.order.message)
        packet.decision.CopyFrom(message)
        if case.features is not None:
            packet.model_input = case.features.tobytes()
            packet.feature_set_id = features.FEATURE_SET_ID
        if case.order.caller_features is not None:
            packet.features.from_caller = True
        snapshot = case.snapshot
        if snapshot is not None:
            provenance = packet.features
            provenance.sequence = snapshot.sequence
            provenance.event_time_ns = snapshot.event_time_ns
            provenance.age_us = int(case.snapshot_age_seconds * 1e6)
            provenance.age_seconds = case.snapshot_age_seconds
            provenance.book_state = _BOOK_STATES[snapshot.state]
            provenance.book_age_ms = snapshot.values[_BOOK_AGE]
        for attempt in case.attempts:
            packet.attempts.add(
                replica=attempt.replica,
                outcome=attempt.outcome,
                used_us=_microseconds(attempt.used_seconds),
                model_version=attempt.model_version,
                batch_rows=attempt.batch_rows,
                batch_index=attempt.batch_index,
            )
        packet.arrived_monotonic_ns = int(case.budget.arrived * 1e9)
        packet.decided_monotonic_ns = int(now * 1e9)
        packet.instance_id = self._instance_id
        packet.config_hash = self.config_hash
        packet.trading_state = self._control.trading_state_name
        packet.flags_on.extend(self._control.flags_on)
        packet.chain_stages.extend(case.stages)
        packet.durability = self._durability
        if not math.isnan(case.mid):
            packet.mid_price = case.mid
        packet.cached_from_decision_id = answer.cached_from
        packet.model_expires_at = answer.model_expires_at
        return entry.SerializeToString()

    def settings(self, settings_json: str, software_version: str, wall_ns: int) -> bytes:
        """The serialized journal entry of the settings that packets name by their hash."""
        return packet_pb2.JournalEntry(
            settings=packet_pb2.SettingsInForce(
                config_hash=self.config_hash,
                settings_json=settings_json,
                software_version=software_version,
                instance_id=self._instance_id,
                recorded_at_ns=wall_ns,
            )
        ).SerializeToString()

    @staticmethod
    def unconfirmed(decision_id: str, cause: str) -> bytes:
        """The serialized journal entry that marks a decision's reply as unconfirmed."""
        return packet_pb2.JournalEntry(
            reply_unconfirmed=packet_pb2.ReplyUnconfirmed(decision_id=decision_id, cause=cause)
        ).SerializeToString()


def is_from_model(source: pb.Source.ValueType) -> bool:
    """True when a replica gave the score just now."""
    return source in _MODEL_SOURCES


def _add_use(message: pb.Budget, use: tuple[pb.Stage.ValueType, float, float, pb.Degradation.ValueType]) -> None:
    stage, allowed, used, skipped = use
    message.stages.add(stage=stage, allowed_us=_microseconds(allowed), used_us=_microseconds(used), skipped=skipped)


def _microseconds(seconds: float) -> int:
    return max(0, int(seconds * 1e6))
