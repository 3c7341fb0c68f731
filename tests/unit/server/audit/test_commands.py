"""The group `pretrade audit`, whose help loads no database driver."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from server.audit.commands import COMMANDS, app


def loaded_by(code: str) -> set[str]:
    script = f"import sys; {code}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_line_of_a_command_in_the_help_is_the_first_paragraph_of_its_own(name: str) -> None:
    group: Any = typer.main.get_group(app)
    assert " ".join(group.load(name).help.split("\n\n")[0].split()) == COMMANDS[name].summary


def test_the_help_names_every_command_and_loads_none() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert [name for name in COMMANDS if f" {name} " not in shown.output] == []
    loaded = loaded_by("import server.audit.commands")
    assert not {"sqlalchemy", "psycopg", "numpy", "grpc", *(one.module for one in COMMANDS.values())} & loaded


def test_listing_decisions_loads_neither_models_nor_migrations_nor_what_serves() -> None:
    loaded = loaded_by("import server.audit.review")
    assert "sqlalchemy" in loaded
    assert not {"alembic", "numpy", "redis", "pybreaker", "server.models.archive"} & loaded


def test_a_misspelt_command_is_answered_with_the_nearest_one() -> None:
    found = CliRunner().invoke(app, ["lst"], env={"COLUMNS": "200"})
    assert (found.exit_code, "Did you mean 'list'" in found.output) == (2, True)
