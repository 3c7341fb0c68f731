"""Where the commands of the audit look: options that they share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrade.client.cli.options import UNREACHABLE
from pretrade.client.stack_file import NoStackError, running_stack
from server.journal.journal_file import journals_of

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
Models = Annotated[
    Path | None,
    typer.Option(envvar="PRETRADE_REPLAY__MODEL_STORE", show_envvar=True, help="Model store. [the stack's]"),
]


def targets(database_url: str | None, journal: Path | None, directory: Path) -> tuple[str | None, Path | None]:
    """Where to look: what was asked for, else the stack that runs in `directory`, else the journal it left there."""
    if database_url is not None or journal is not None:
        return database_url, journal
    left = directory / "server" / "journal.sqlite"
    try:
        endpoints = running_stack(directory, "--database-url URL or --journal FILE").endpoints
    except NoStackError as error:
        if any(journal.exists() for journal in journals_of(left)):
            typer.echo(f"no stack runs in {directory}: its database is not reachable, here is its journal", err=True)
            return None, left
        raise failure(error, UNREACHABLE) from error
    return endpoints.database_url, Path(endpoints.journal) if endpoints.journal else None


def failure(error: object, code: int = 1) -> typer.Exit:
    """Says what went wrong; to be raised. Ends the command with this exit code."""
    typer.echo(f"pretrade audit: {error}", err=True)
    return typer.Exit(code)


def model_store(directory: Path) -> Path:
    """The models of the stack that runs in `directory`, or that ran there."""
    left = directory / "models"
    try:
        return Path(running_stack(directory, "--models FOLDER").endpoints.model_store or left)
    except NoStackError:
        return left
