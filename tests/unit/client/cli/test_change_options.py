"""The options that every change has: Typer must see each of them, and a command gets them as one value."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from pretrade.client.cli.change_options import REASON, How
from pretrade.client.cli.option_groups import spreads_options
from pretrade.client.cli.options import USER


def app_of(seen: list[tuple[str, How]]) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @spreads_options
    def steer(name: Annotated[str, typer.Argument()] = "primary", *, how: How) -> None:
        """Steer something."""
        seen.append((name, how))

    return app


def test_a_command_has_its_own_options_and_those_of_every_change() -> None:
    seen: list[tuple[str, How]] = []
    given = ["secondary", "--author", "ann", "--reason", "new kernel", "--expect", "7", "--dry-run", "-y", "--json"]
    result = CliRunner().invoke(app_of(seen), given)
    assert result.exit_code == 0, result.output
    ((name, how),) = seen
    assert (name, how.author, how.reason, how.expect) == ("secondary", "ann", "new kernel", 7)
    assert how.dry_run
    assert how.yes
    assert how.as_json


def test_what_is_not_given_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRETRADE_ADMIN_TARGET", raising=False)
    seen: list[tuple[str, How]] = []
    assert CliRunner().invoke(app_of(seen), []).exit_code == 0
    ((name, how),) = seen
    assert (name, how) == ("primary", How(directory=how.directory))
    assert (how.author, how.reason, how.expect, how.yes) == (USER, REASON, None, False)


def test_help_is_that_of_the_command() -> None:
    shown = CliRunner().invoke(app_of([]), ["--help"]).output
    assert "Steer something." in shown
    assert "--how" not in shown
