"""Options that many commands share."""

from __future__ import annotations

import getpass
import os
import re
from pathlib import Path
from typing import Annotated, Final

import typer

UNREACHABLE: Final = 3
"""Exit code when no server could be reached, or when none was named and no stack runs."""
DECISION_TARGET: Final = "PRETRADE_TARGET"
ADMIN_TARGET: Final = "PRETRADE_ADMIN_TARGET"
"""Variables that name the ports of a server, as `--target` does."""
Directory = Annotated[
    Path,
    typer.Option("--dir", envvar="PRETRADE_LOCAL_DIR", help="Directory of the running stack (`pretrade up --dir`)."),
]
"""The option of every command that looks for a stack."""
Target = Annotated[
    str | None, typer.Option("--target", help="HOST:PORT instead of the stack's.", envvar=DECISION_TARGET)
]
AdminTarget = Annotated[
    str | None, typer.Option("--target", help="HOST:PORT instead of the stack's.", envvar=ADMIN_TARGET)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _user() -> str:
    """Who types: the name that the system has for this user, or the number where it has none, as in some containers."""
    try:
        return os.environ.get("USER") or getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


USER = _user()
_SPAN: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SPAN_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def span_seconds(text: str) -> float | None:
    """Seconds in a span of time with its unit: `90s`, `10m`, `2h`, `1d`; None for every other text."""
    match = _SPAN.fullmatch(text)
    return float(match[1]) * _SPAN_SECONDS[match[2]] if match else None


def seconds(text: str | float) -> float:
    """Seconds in a span of time as people write it: `90`, `90s`, `10m`, `2h`, `1d`."""
    span = span_seconds(str(text)) or span_seconds(f"{text}s")
    if not span:
        raise typer.BadParameter("must be a span of time like 90, 90s, 10m, 2h or 1d")
    return span


Author = Annotated[
    str, typer.Option(help="Who asks, for the audit. A server with credentials records the caller instead.")
]
Reason = Annotated[str, typer.Option(help="Why, for the audit.")]
For = Annotated[
    float | None,
    typer.Option("--for", parser=seconds, metavar="TIME", help="Reverts by itself after this time: 90, 10m, 2h, 1d."),
]
Expect = Annotated[
    int | None, typer.Option("--expect", metavar="VERSION", help="Only if this is the control state's version.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Model = Annotated[str, typer.Option("--model", help="The model that is meant, by its name in the server's settings.")]
DEFAULT_MODEL: Final = "default"
"""The model that is meant where a command names no other."""


def every_order_of(model: str) -> str:
    """What a champion decides, for people: a model besides the default one has only what the map gives it."""
    return "every order" if model == DEFAULT_MODEL else f"every order of the model {model}"
