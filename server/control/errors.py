"""Why a change is not made. None of these knows a transport; `rpc/admin.py` maps them.

ControlError
├── UnknownSubjectError   there is no such thing to steer
├── InvalidChangeError    the request must be changed
├── ControlChangedError   somebody else was first: look again
└── ChangeRefusedError    not in the state that things are in
"""

from __future__ import annotations


class ControlError(Exception):
    """A change that is not made."""


class UnknownSubjectError(ControlError):
    """There is no such thing to steer."""


class InvalidChangeError(ControlError):
    """The change breaks a rule; the message names the field and the rule."""


class ControlChangedError(ControlError):
    """The control state is not the one that the change was meant for."""

    def __init__(self, version: int, expected: int) -> None:
        super().__init__(f"the control state's version is {version}, not {expected}")


class ChangeRefusedError(ControlError):
    """It cannot be done in the state that things are in."""
