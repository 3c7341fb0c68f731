"""What can go wrong with the audit.

::

    AuditError
    ├── JournalError              this row is not durable: the caller must not act on its decision
    │   ├── JournalFull           too many rows wait; try again when `depth` or `bytes` falls
    │   ├── JournalUnwritable     the last write failed; the journal recovers by itself
    │   ├── JournalClosed         not started, or already closed
    │   ├── JournalInUse          another process holds this journal; start fails
    │   └── JournalCorrupted      a row does not fit the chain; start fails, `position` says where
    ├── SchemaUnknown             the database is of a newer version; nothing is shipped until this one is replaced
    ├── UnknownDecision           neither the store nor the journal holds this decision
    ├── NotReplayable             a decision cannot be recomputed; the message says what is missing
    │   ├── ModelUnknown          no archive of this version, or its content is another
    │   └── ModelFailed           the model gave no score
    ├── OutcomeConflict           this reporter said something else about this decision before
    ├── InvalidRequest            a request breaks a rule; the message names field and rule
    ├── AuditUnavailable          what was asked for may be where nobody can look now
    └── AuditBusy                 too many requests wait for the audit
"""

from __future__ import annotations


class AuditError(Exception):
    """Base of everything the audit raises on purpose."""


class JournalError(AuditError):
    """The row was not made durable."""


class JournalFull(JournalError):  # noqa: N818 - reads as the state it reports, like queue.Full
    """As many rows wait as `JournalSettings` allows: `queue_rows` to be written, `max_mebibytes` to be shipped."""


class JournalUnwritable(JournalError):  # noqa: N818 - see JournalFull
    """The last write failed and no probe has succeeded since."""


class JournalClosed(JournalError):  # noqa: N818 - see JournalFull
    """The journal was not started, or is closed."""


class JournalInUse(JournalError):  # noqa: N818 - see JournalFull
    """Another process writes this journal: two writers would fork the chain."""


class JournalCorrupted(JournalError):  # noqa: N818 - see JournalFull
    """A row is missing, or is not what was written.

    Attributes:
        position: The first position that does not fit.
        problem: What is wrong there.
    """

    def __init__(self, position: int, problem: str, journal_id: str = "") -> None:
        super().__init__(f"{f'journal {journal_id}, ' if journal_id else ''}position {position}: {problem}")
        self.position = position
        self.problem = problem


class SchemaUnknown(AuditError):  # noqa: N818 - see JournalFull
    """The tables of the audit database are of a newer version of pretrade."""


class UnknownDecision(AuditError):  # noqa: N818 - see JournalFull
    """Neither the store nor the journal holds this decision."""


class NotReplayable(AuditError):  # noqa: N818 - see JournalFull
    """A decision cannot be recomputed; the message says what is missing."""


class ModelUnknown(NotReplayable):
    """No archive of this model version can be found, or its content is not what its version says."""


class ModelFailed(NotReplayable):
    """The model gave no score."""


class OutcomeConflict(AuditError):  # noqa: N818 - see JournalFull
    """The reporter recorded another outcome of this decision before."""


class InvalidRequest(AuditError):  # noqa: N818 - see JournalFull
    """A request breaks a rule; the message names the field and the rule."""


class AuditUnavailable(AuditError):  # noqa: N818 - see JournalFull
    """What was asked for may be in the database or the journal, which cannot be read now."""


class AuditBusy(AuditError):  # noqa: N818 - see JournalFull
    """Too many requests wait for the audit."""
