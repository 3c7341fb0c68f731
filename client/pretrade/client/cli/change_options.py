"""The options of every command that changes the control state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

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
