"""What the audit says of the reply to a decision: `replied`, unless an entry of a journal says otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal, get_args

from google.protobuf.message import DecodeError

from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.journal_file import Row

Cause = Literal[
    "audit_late", "cancelled", "deadline", "failed", "unsent", "not_durable", "killed", "withdrawn", "superseded"
]
"""Why a decision was not what its caller heard; see `ReplyUnconfirmed.cause`."""
CAUSES: Final[tuple[Cause, ...]] = get_args(Cause)

REPLIED: Final = "replied"
"""The status of a decision of which nothing else is said."""
UNSETTLED: Final = "unsettled"
"""The status of a decision of which nobody can say yet whether its caller heard it."""


def unconfirmed_status(cause: str) -> str:
    """The status of a decision whose reply is unconfirmed for this cause."""
    return f"reply_unconfirmed:{cause}"


class Statuses:
    """What entries of journals say of replies. They are added in the order of their journal; journals in any order."""

    def __init__(self) -> None:
        self._unconfirmed: dict[str, str] = {}
        self._heard: set[str] = set()

    def add(self, entry: packet_pb2.JournalEntry) -> None:
        """Takes what an entry says, if it says anything of a reply."""
        if entry.HasField("reply_unconfirmed"):
            note = entry.reply_unconfirmed
            self._unconfirmed[note.decision_id] = unconfirmed_status(note.cause)
        elif entry.HasField("reply_heard"):
            self._heard.add(entry.reply_heard.decision_id)

    def add_heard(self, decision_ids: set[str]) -> None:
        """Takes what is known otherwise: that repeats of their calls heard these decisions."""
        self._heard |= decision_ids

    def of(self, decision_id: str, otherwise: str = REPLIED) -> str:
        """The status of a decision; `otherwise` when nothing was said of it."""
        return REPLIED if decision_id in self._heard else self._unconfirmed.get(decision_id, otherwise)

    @property
    def doubtful(self) -> set[str]:
        """Decisions whose replies are unconfirmed."""
        return self._unconfirmed.keys() - self._heard


def unconfirmed(
    decision_id: str,
    cause: Cause,
    heard_action: pb.Action.ValueType = pb.ACTION_UNSPECIFIED,
    heard_reasons: Sequence[pb.ReasonCode.ValueType] = (),
) -> bytes:
    """The serialised journal entry that says that a decision was not what its caller heard."""
    note = packet_pb2.ReplyUnconfirmed(
        decision_id=decision_id, cause=cause, heard_action=heard_action, heard_reasons=heard_reasons
    )
    return packet_pb2.JournalEntry(reply_unconfirmed=note).SerializeToString()


def heard(decision_id: str) -> bytes:
    """The serialised journal entry that says that a repeat of the call heard a decision after all."""
    return packet_pb2.JournalEntry(reply_heard=packet_pb2.ReplyHeard(decision_id=decision_id)).SerializeToString()


def unknown_replies(rows: Iterable[Row], cause: Cause) -> list[bytes]:
    """Notes for the decisions among some rows of which no other of these rows says what became of the reply."""
    unknown: dict[str, None] = {}
    for row in rows:
        try:
            entry = packet_pb2.JournalEntry.FromString(row.entry)
        except DecodeError:
            continue
        if entry.HasField("decision"):
            unknown[entry.decision.decision.decision_id] = None
        elif entry.HasField("reply_unconfirmed"):
            unknown.pop(entry.reply_unconfirmed.decision_id, None)
        elif entry.HasField("reply_heard"):
            unknown.pop(entry.reply_heard.decision_id, None)
    return [unconfirmed(decision_id, cause) for decision_id in unknown]
