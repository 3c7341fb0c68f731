"""The names of the contract's enum values, for people."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def enum_name(enum: object, value: int) -> str:
    """An enum value's name without its prefix, for example `PRIMARY`.

    Args:
        enum: The enum as the generated module has it, for example `decision_pb2.Source`.
        value: The number of the value.

    Raises:
        ValueError: The enum has no such value.
    """
    wrapper: Any = enum  # the stubs have a type of its own for every enum
    prefix: str = wrapper.Name(0).removesuffix("UNSPECIFIED")
    name: str = wrapper.Name(value)
    return name.removeprefix(prefix)


def enum_choices(enum: object) -> dict[str, int]:
    """The values of an enum by the names that people type, for example `primary`; the unspecified one is left out."""
    wrapper: Any = enum
    return {enum_name(enum, value).lower(): value for value in wrapper.values() if value}
