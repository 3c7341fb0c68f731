"""What became of the reply to a decision: its caller heard the decision, unless a journal entry says otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, NamedTuple, get_args

from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.journal.entries import entry_of, packets
from server.journal.journal_file import Kind, Row

Cause = Literal[
    "audit_late",
    "cancelled",
    "deadline",
    "failed",
    "unsent",
    "not_durable",
    "killed",
    "repeated",
    "withdrawn",
    "superseded",
]
"""Why a decision was not what its caller heard; see `ReplyUnconfirmed.cause`."""
CAUSES: Final[tuple[Cause, ...]] = get_args(Cause)

REPLIED: Final = "replied"
"""The status of a decision of which nothing else is said."""
WITHDRAWN: Final = "reply_unconfirmed:withdrawn"
"""The status of a decision in whose place repeats hear something safer. The first call may have heard it."""
REPEATED: Final = "reply_unconfirmed:repeated"
"""The status of a decision that a repeat was about to hear, although the first call had not. The repeat may have."""
UNSETTLED: Final = "unsettled"
"""The status of a decision of which it is not known yet whether its caller received it."""


_NOTHING_HEARD: Final[frozenset[str]] = frozenset(("cancelled", "deadline", "failed", "superseded"))
"""Causes with which no decision was sent."""


class Reply(NamedTuple):
    """What became of the reply to a decision."""

    status: str
    """`AuditedDecision.reply_status`."""
    heard_action: audit_pb2.HeardAction.ValueType = audit_pb2.HEARD_ACTION_UNSPECIFIED
    """What the caller heard; unspecified if that is the decision as it stands in the packet."""
    heard_reasons: tuple[pb.ReasonCode.ValueType, ...] = ()
    """The reasons that the caller heard with it; empty for those of the packet."""


AS_DECIDED: Final = Reply(REPLIED)
"""The caller heard the decision."""
NOT_SETTLED: Final = Reply(UNSETTLED, audit_pb2.HEARD_ACTION_UNKNOWN)
"""It is not known yet what the caller heard."""


def unconfirmed_status(cause: str) -> str:
    """The status of a decision whose reply is unconfirmed for this cause."""
    return f"reply_unconfirmed:{cause}"


def is_of_repeats(status: str) -> bool:
    """Whether an unconfirmed reply is that of repeats, which takes precedence over the first one."""
    return status in (WITHDRAWN, REPEATED)


def reply_of(note: packet_pb2.ReplyUnconfirmed) -> Reply:
    """What an unconfirmed reply means: an action was heard in place of the decision, nothing was, or nobody knows."""
    status = unconfirmed_status(note.cause)
    if note.heard_action:
        return Reply(status, audit_pb2.HeardAction.ValueType(note.heard_action), tuple(note.heard_reasons))
    if note.cause in _NOTHING_HEARD:
        return Reply(status, audit_pb2.HEARD_ACTION_NOTHING)
    return Reply(status, audit_pb2.HEARD_ACTION_UNKNOWN)


SAY_OF_REPLIES: Final = (Kind.REPLY_UNCONFIRMED, Kind.REPLY_HEARD)
"""The kinds of rows that say something of a reply."""


class Statuses:
    """What became of replies, from journal entries.

    Entries are added in the order of their journal, journals in any order.

    What repeats of a call received takes precedence over what became of its first reply. That a decision was withdrawn
    takes precedence over a repeat having received it, because no later repeat gets it. That a repeat may have received
    it is the weakest word of repeats, and says nothing where the first call received it.
    """

    def __init__(self) -> None:
        self._unconfirmed: dict[str, Reply] = {}
        self._repeats: dict[str, Reply] = {}

    def add(self, entry: packet_pb2.JournalEntry) -> None:
        """Takes what an entry says, if it says anything of a reply."""
        if entry.HasField("reply_unconfirmed"):
            note = entry.reply_unconfirmed
            reply = reply_of(note)
            if is_of_repeats(reply.status):
                self._add_repeat(note.decision_id, reply)
            else:
                self._unconfirmed[note.decision_id] = reply
        elif entry.HasField("reply_heard"):
            self._add_repeat(entry.reply_heard.decision_id, AS_DECIDED)

    def add_repeats(self, replies: Mapping[str, Reply]) -> None:
        """Adds what is known from elsewhere of repeats, by decision id."""
        for decision_id, reply in replies.items():
            self._add_repeat(decision_id, reply)

    def _add_repeat(self, decision_id: str, reply: Reply) -> None:
        known = self._repeats.get(decision_id)
        if known is None or known.status == REPEATED or reply.status == WITHDRAWN:
            self._repeats[decision_id] = reply

    def of(self, decision_id: str) -> Reply | None:
        """What became of the reply to a decision; None when nothing was said of it."""
        first, repeats = self._unconfirmed.get(decision_id), self._repeats.get(decision_id)
        return first if repeats is None or (first is None and repeats.status == REPEATED) else repeats

    def ids(self) -> set[str]:
        """The decisions of which something was said."""
        return self._repeats.keys() | self._unconfirmed.keys()


def unconfirmed(
    decision_id: str,
    cause: Cause,
    heard_action: pb.Action.ValueType = pb.ACTION_UNSPECIFIED,
    heard_reasons: Sequence[pb.ReasonCode.ValueType] = (),
) -> bytes:
    """The serialised journal entry that says that a caller did not receive its decision."""
    note = packet_pb2.ReplyUnconfirmed(
        decision_id=decision_id, cause=cause, heard_action=heard_action, heard_reasons=heard_reasons
    )
    return packet_pb2.JournalEntry(reply_unconfirmed=note).SerializeToString()


def heard(decision_id: str) -> bytes:
    """The serialised journal entry that says that a repeat of the call received the decision after all."""
    return packet_pb2.JournalEntry(reply_heard=packet_pb2.ReplyHeard(decision_id=decision_id)).SerializeToString()


def unknown_replies(rows: Iterable[Row]) -> list[packet_pb2.DecisionPacket]:
    """The decisions among some rows of which no other of these rows says what became of the reply."""
    unknown: dict[str, packet_pb2.DecisionPacket] = {}
    for row in rows:
        entry = entry_of(row.entry)
        unknown.update((packet.decision.decision_id, packet) for packet in packets(entry))
        if entry.HasField("reply_unconfirmed") and entry.reply_unconfirmed.cause != "repeated":
            unknown.pop(entry.reply_unconfirmed.decision_id, None)
        elif entry.HasField("reply_heard"):
            unknown.pop(entry.reply_heard.decision_id, None)
    return list(unknown.values())


def notes_of(unknown: Iterable[packet_pb2.DecisionPacket], cause: Literal["killed", "not_durable"]) -> list[bytes]:
    """The serialised journal entries that say that it is unknown what became of the replies to these decisions."""
    decisions = [packet.decision for packet in unknown]
    if cause != "not_durable":
        return [unconfirmed(decision.decision_id, cause) for decision in decisions]
    # The commit had failed, so that the callers were told what `server.decision.recorder` says then.
    failed = pb.REASON_CODE_AUDIT_UNAVAILABLE
    return [
        unconfirmed(decision.decision_id, cause, pb.ACTION_ABSTAIN, [*decision.reasons, failed])
        for decision in decisions
    ]
