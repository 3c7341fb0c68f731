"""Options that several commands share as one value.

Typer makes options of a function's parameters. `spreads_options` puts the fields of a dataclass in the place of the
parameter that is of it, so that a group of options is written once, in that dataclass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from inspect import Parameter, signature
from typing import Any, get_type_hints


def spreads_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command with parameters that are dataclasses of options, as Typer needs it: with an option for each field."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    given = signature(command)
    own = [one.replace(annotation=hints[one.name]) for one in given.parameters.values() if one.name not in groups]
    options = {name: list(_options_of(group)) for name, group in groups.items()}

    @functools.wraps(command)
    def called(**values: Any) -> None:
        spread = {
            name: group(**{one.name: values.pop(one.name) for one in options[name]}) for name, group in groups.items()
        }
        command(**values, **spread)

    parameters = [*own, *(one for group in options.values() for one in group)]
    called.__signature__ = given.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": None}
    return called


def _options_of(group: type) -> Iterator[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for one in fields(group):
        yield Parameter(one.name, Parameter.KEYWORD_ONLY, default=one.default, annotation=hints[one.name])
