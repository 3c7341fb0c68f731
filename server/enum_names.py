"""The names of enum values for people."""

from __future__ import annotations


def short_name(enum: object, value: int) -> str:
    """An enum value's name without its prefix, for example `PRIMARY`."""
    wrapper = enum
    name: str = wrapper.Name(value)  # type: ignore[attr-defined]  # every enum wrapper of protobuf has it
    prefix: str = wrapper.DESCRIPTOR.values[0].name.removesuffix("UNSPECIFIED")  # type: ignore[attr-defined]
    return name.removeprefix(prefix)
