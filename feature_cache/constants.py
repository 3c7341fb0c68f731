"""Numbers of a settings section that no user needs to decide.

Such a number is defined beside the settings that it belongs to, with the reason for it. A test may pass another value
to the section's constructor. Neither the environment nor a configuration file can set it, and no page lists it.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

from pydantic.fields import FieldInfo

T = TypeVar("T")


class _Marker:
    """Marks a field as a constant."""


_MARKER: Final = _Marker()

Constant = Annotated[T, _MARKER]
"""The type of a field that is a constant."""


def is_constant(field: FieldInfo) -> bool:
    """True for a field that cannot be set."""
    return _MARKER in field.metadata
