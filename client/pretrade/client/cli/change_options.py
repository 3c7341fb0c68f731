"""The options of every command that changes the control state, written once.

Typer makes options of a function's parameters. `takes_change_options` puts the fields of `How` in the place of the
parameter `how`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from inspect import Parameter, signature
from typing import Any, Final, get_type_hints

from pretrade.client.cli.options import USER, AdminTarget, AsJson, Author, Directory, DryRun, Expect, Reason, Yes
from pretrade.client.stack_file import DEFAULT_DIRECTORY

EXIT_CODES: Final = (
    "Exit codes: 0 done; 1 refused by the server, or not confirmed; 2 wrong usage; 3 no server could be reached; "
    "4 another change came first: look again; 7 not known whether it was done: look at `pretrade changes`."
)
REASON: Final = "from the command line"


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How a change is to be made, on which server, and how its outcome is printed."""

    author: Author = USER
    reason: Reason = REASON
    expect: Expect = None
    dry_run: DryRun = False
    yes: Yes = False
    target: AdminTarget = None
    directory: Directory = DEFAULT_DIRECTORY
    as_json: AsJson = False


def takes_change_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the parameter `how: How`, as Typer needs it: with an option for each field."""
    hints = get_type_hints(command, include_extras=True)
    own = [one.replace(annotation=hints[name]) for name, one in signature(command).parameters.items() if name != "how"]
    of_how = get_type_hints(How, include_extras=True)
    options = [
        Parameter(one.name, Parameter.KEYWORD_ONLY, default=one.default, annotation=of_how[one.name])
        for one in fields(How)
    ]

    @functools.wraps(command)
    def called(**given: Any) -> None:
        how = How(**{one.name: given.pop(one.name) for one in options})
        command(**given, how=how)

    called.__signature__ = signature(command).replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in (*own, *options)} | {"return": None}
    return called
