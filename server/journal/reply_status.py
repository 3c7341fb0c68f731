"""The status of a decision's reply in the audit: `replied`, unless a journal entry says otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, get_args

from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.journal.entries import decision_ids, entry_of
from server.journal.journal_file import Row

Cause = Literal[
    "audit_late", "cancelled", "deadline", "failed", "unsent", "not_durable", "killed", "withdrawn", "superseded"
]
"""Why a decision was not what its caller heard; see `ReplyUnconfirmed.cause`."""
CAUSES: Final[tuple[Cause, ...]] = get_args(Cause)

REPLIED: Final = "replied"
"""The status of a decision of which nothing else is said."""
WITHDRAWN: Final = "reply_unconfirmed:withdrawn"
"""The status of a decision in whose place repeats hear something safer. The first call may have heard it."""
UNSETTLED: Final = "unsettled"
"""The status of a decision of which it is not known yet whether its caller received it."""


def unconfirmed_status(cause: str) -> str:
    """The status of a decision whose reply is unconfirmed for this cause."""
    return f"reply_unconfirmed:{cause}"


class Statuses:
    """The reply statuses from journal entries. Entries are added in the order of their journal, journals in any order.

    What repeats of a call received takes precedence over the status of its first reply. That a decision was withdrawn
    takes precedence over a repeat having received it, because no later repeat gets it.
    """

    def __init__(self) -> None:
        self._unconfirmed: dict[str, str] = {}
        self._repeats: dict[str, str] = {}

    def add(self, entry: packet_pb2.JournalEntry) -> None:
        """Takes what an entry says, if it says anything of a reply."""
        if entry.HasField("reply_unconfirmed"):
            note = entry.reply_unconfirmed
            status = unconfirmed_status(note.cause)
            (self._repeats if status == WITHDRAWN else self._unconfirmed)[note.decision_id] = status
        elif entry.HasField("reply_heard"):
            self._repeats.setdefault(entry.reply_heard.decision_id, REPLIED)

    def add_repeats(self, statuses: Mapping[str, str]) -> None:
        """Adds what is known from elsewhere of repeats: `REPLIED` or `WITHDRAWN`, by decision id."""
        for decision_id, status in statuses.items():
            if self._repeats.get(decision_id) != WITHDRAWN:
                self._repeats[decision_id] = status

    def of(self, decision_id: str, otherwise: str = REPLIED) -> str:
        """The status of a decision; `otherwise` when nothing was said of it."""
        return self._repeats.get(decision_id) or self._unconfirmed.get(decision_id, otherwise)


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


def unknown_replies(rows: Iterable[Row], cause: Cause) -> list[bytes]:
    """Notes for the decisions among some rows of which no other of these rows says what became of the reply."""
    unknown: dict[str, None] = {}
    for row in rows:
        entry = entry_of(row.entry)
        unknown.update(dict.fromkeys(decision_ids(entry)))
        if entry.HasField("reply_unconfirmed"):
            unknown.pop(entry.reply_unconfirmed.decision_id, None)
        elif entry.HasField("reply_heard"):
            unknown.pop(entry.reply_heard.decision_id, None)
    return [unconfirmed(decision_id, cause) for decision_id in unknown]
