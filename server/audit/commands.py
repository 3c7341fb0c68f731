"""The group `pretrade audit`: its help loads none of its commands, and each command loads what it needs.

The commands read the audit database and the journal files directly, or call a running server. The table names the
module of a command, and not its function, so that the help of `pretrade audit` needs no database driver.
"""

from __future__ import annotations

from typing import Final

import typer

from pretrade.client.cli.lazy import Command, LazyGroup

_FIND, _PROVE, _JUDGE, _KEEP = "Look up", "Prove", "Judge", "Maintain"

COMMANDS: Final = {
    "show": Command(
        _FIND,
        "Show everything about one decision: order, answer, reasons, features, cost, outcomes, evidence.",
        "server.audit.cli",
    ),
    "list": Command(
        _FIND,
        "List decisions, the newest first: what the callers heard, and what was decided.",
        "server.audit.review",
    ),
    "watch": Command(
        _FIND, "Print decisions of a running server as they become durable, until Ctrl-C.", "server.audit.review"
    ),
    "refusals": Command(
        _FIND,
        "List calls that were refused for their credentials, roles or rates, the newest first.",
        "server.audit.label",
    ),
    "verify": Command(
        _PROVE,
        "Check that no row of the audit was changed and none is missing, in the database and in the journals.",
        "server.audit.cli",
    ),
    "replay": Command(
        _PROVE,
        "Recompute decisions from their packets, and show the first difference; or decide them with another model.",
        "server.audit.review",
    ),
    "outcome": Command(
        _JUDGE,
        "Record the outcome of an order. Repeating it changes nothing; a different outcome is refused.",
        "server.audit.review",
    ),
    "label": Command(
        _JUDGE,
        "Label decisions by what the market did next, store the labels, and report precision, coverage, calibration.",
        "server.audit.label",
    ),
    "drift": Command(
        _JUDGE,
        "Compare the features and scores of recent decisions with the training data of their model (PSI).",
        "server.drift.cli",
    ),
    "export": Command(
        _KEEP,
        "Write whole days as Parquet, one file for each day and instrument. Repeating it writes the same files.",
        "server.audit.cli",
    ),
    "migrate": Command(
        _KEEP,
        "Create the tables of the audit database, or upgrade them to this version. A starting server does the same.",
        "server.audit.cli",
    ),
    "ship": Command(
        _KEEP,
        "Ship the journals of a server that is gone, from its volume into the database, and close them.",
        "server.audit.cli",
    ),
    "write-off": Command(
        _KEEP,
        "Give up the lost end of a journal, or its beginning. `verify` then reports that and continues.",
        "server.audit.cli",
    ),
}
"""By name, in the order of the help."""


class AuditCommands(LazyGroup):
    """The commands of the audit."""

    known = COMMANDS


app = typer.Typer(
    name="audit",
    cls=AuditCommands,
    epilog="Exit code 3: no database, journal or server was named, and no stack runs here.",
    no_args_is_help=True,
)


@app.callback()
def audit() -> None:
    """Look decisions up, recompute and export them, and verify that none was changed."""
