"""The `pretrade` command."""

from __future__ import annotations

from typer.testing import CliRunner

from local.cli import app


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("up", "decide", "status", "breaker", "flag", "state", "audit"):
        assert f" {command} " in result.stdout


def test_the_parts_are_named_in_the_help_of_up() -> None:
    result = CliRunner().invoke(app, ["up", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for part in ("valkey", "broker", "postgres", "primary", "secondary", "challenger", "worker", "server", "market"):
        assert part in result.stdout
