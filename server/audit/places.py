"""Where the commands of the audit look: options that they share, and what they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from server.audit.journal_file import journals_of

DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        envvar="PRETRADE_DATABASE_URL",
        show_envvar=True,
        help="SQLAlchemy URL of the audit database. Default: that of the running stack.",
    ),
]
JournalPath = Annotated[
    Path | None,
    typer.Option(
        "--journal",
        envvar="PRETRADE_JOURNAL__PATH",
        show_envvar=True,
        help="The audit journal. Default: that of the running stack.",
    ),
]
StackDirectory = Annotated[
    Path,
    typer.Option("--dir", envvar="PRETRADE_LOCAL_DIR", show_envvar=True, help="Where `pretrade up` keeps its files."),
]
Models = Annotated[
    Path | None,
    typer.Option(envvar="PRETRADE_REPLAY__MODEL_STORE", show_envvar=True, help="Model store. [the stack's]"),
]
DEFAULT_DIRECTORY: Final = Path(".pretrade")


def targets(database_url: str | None, journal: Path | None, directory: Path) -> tuple[str | None, Path | None]:
    """Where to look: what was asked for, else the stack that runs in `directory`, else the journal it left there."""
    if database_url is not None or journal is not None:
        return database_url, journal
    left = directory / "server" / "journal.sqlite"
    try:
        endpoints = json.loads((directory / "stack.json").read_text())["endpoints"]
    except (OSError, ValueError, KeyError) as error:
        if any(journal.exists() for journal in journals_of(left)):
            typer.echo(f"no stack runs in {directory}: its database is not reachable, here is its journal", err=True)
            return None, left
        raise failure(f"no stack runs in {directory}: name --database-url or --journal") from error
    return endpoints.get("database_url"), Path(endpoints["journal"]) if endpoints.get("journal") else None


def failure(error: object) -> typer.Exit:
    """Says what went wrong; to be raised."""
    typer.echo(f"pretrade audit: {error}", err=True)
    return typer.Exit(1)


def model_store(directory: Path) -> Path:
    """The models of the stack that runs in `directory`, or that ran there."""
    return Path(_endpoints(directory).get("model_store") or directory / "models")


def admin_target(target: str | None, directory: Path) -> str:
    """`HOST:PORT` of the admin port: what was asked for, else that of the stack that runs in `directory`."""
    found = target or _endpoints(directory).get("admin")
    if not found:
        raise failure(f"no server runs in {directory}: start one with `pretrade up`, or give --target")
    return str(found)


def _endpoints(directory: Path) -> dict[str, Any]:
    """What the running stack wrote down; nothing when none runs."""
    try:
        endpoints: dict[str, Any] = json.loads((directory / "stack.json").read_text())["endpoints"]
    except (OSError, ValueError, KeyError):
        return {}
    return endpoints
