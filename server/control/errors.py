"""Why a change is not made. None of these knows a transport; `rpc/admin.py` maps them.

ControlError
├── UnknownSubjectError   there is no such thing to steer
├── InvalidChangeError    the request must be changed
├── ControlChangedError   somebody else was first: look again
├── ChangeRefusedError    not in the state that things are in
└── ChangeInDoubtError    nobody knows yet whether it was made
"""

from __future__ import annotations


class ControlError(Exception):
    """A change that is not made, or not known to be.

    Attributes:
        reason: Stable, machine-readable, UPPER_SNAKE_CASE.
    """

    reason = ""


class UnknownSubjectError(ControlError):
    """There is no such thing to steer."""

    reason = "UNKNOWN_SUBJECT"


class InvalidChangeError(ControlError):
    """The change breaks a rule; the message names the field and the rule."""

    reason = "INVALID_CHANGE"


class ControlChangedError(ControlError):
    """The control state is not the one that the change was meant for."""

    reason = "CONTROL_CHANGED"

    def __init__(self, version: int, expected: int) -> None:
        super().__init__(f"the control state's version is {version}, not {expected}")


class ChangeRefusedError(ControlError):
    """It cannot be done in the state that things are in."""

    reason = "CHANGE_REFUSED"


class ChangeInDoubtError(ControlError):
    """It was sent to Redis, and no answer said whether it was made.

    It may be in force, now or in a moment. If it is, it is recorded with its id, by this process or any other.

    Attributes:
        change_id: The change's id, to look for in the history.
    """

    reason = "CHANGE_IN_DOUBT"

    def __init__(self, change_id: str, why: str) -> None:
        super().__init__(
            f"it is not known whether the change was made ({why}); change id {change_id}; "
            "if it was, it is recorded under that id as soon as that is known"
        )
        self.change_id = change_id
