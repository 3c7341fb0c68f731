"""What can go wrong with the audit.

::

    AuditError
    ├── JournalError              this row is not durable: the caller must not act on its decision
    │   ├── JournalFullError           too many rows wait; try again when `depth` or `bytes` falls
    │   ├── JournalUnwritableError     the last write failed; the journal recovers by itself
    │   ├── JournalClosedError         not started, or already closed
    │   ├── JournalInUseError          another process holds this journal; start fails
    │   └── JournalCorruptedError      a row does not fit the chain; start fails, `position` says where
    ├── SchemaUnknownError             the database is of a newer version; nothing is shipped until this one is replaced
    ├── UnknownDecisionError           neither the store nor the journal holds this decision
    ├── NotReplayableError             a decision cannot be recomputed; the message says what is missing
    │   ├── ModelUnknownError          no archive of this version, or its content is another
    │   └── ModelFailedError           the model gave no score
    ├── OutcomeConflictError           this reporter said something else about this decision before
    ├── InvalidRequestError            a request breaks a rule; the message names field and rule
    ├── AuditUnavailableError          what was asked for may be where nobody can look now
    └── AuditBusyError                 too many requests wait for the audit
"""

from __future__ import annotations


class AuditError(Exception):
    """Base of everything the audit raises on purpose."""


class JournalError(AuditError):
    """The row was not made durable."""


class JournalFullError(JournalError):
    """As many rows wait as `JournalSettings` allows: `queue_rows` to be written, `max_mebibytes` to be shipped."""


class JournalUnwritableError(JournalError):
    """The last write failed and no probe has succeeded since."""


class JournalClosedError(JournalError):
    """The journal was not started, or is closed."""


class JournalInUseError(JournalError):
    """Another process writes this journal: two writers would fork the chain."""


class JournalCorruptedError(JournalError):
    """A row is missing, or is not what was written.

    Attributes:
        position: The first position that does not fit.
        problem: What is wrong there.
    """

    def __init__(self, position: int, problem: str, journal_id: str = "") -> None:
        super().__init__(f"{f'journal {journal_id}, ' if journal_id else ''}position {position}: {problem}")
        self.position = position
        self.problem = problem


class SchemaUnknownError(AuditError):
    """The tables of the audit database are of a newer version of pretrade."""


class UnknownDecisionError(AuditError):
    """Neither the store nor the journal holds this decision."""


class NotReplayableError(AuditError):
    """A decision cannot be recomputed; the message says what is missing."""


class ModelUnknownError(NotReplayableError):
    """No archive of this model version can be found, or its content is not what its version says."""


class ModelFailedError(NotReplayableError):
    """The model gave no score."""


class OutcomeConflictError(AuditError):
    """The reporter recorded another outcome of this decision before."""


class InvalidRequestError(AuditError):
    """A request breaks a rule; the message names the field and the rule."""


class AuditUnavailableError(AuditError):
    """What was asked for may be in the database or the journal, which cannot be read now."""


class AuditBusyError(AuditError):
    """Too many requests wait for the audit."""
