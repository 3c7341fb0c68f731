"""A group of commands whose help loads none of them, and which loads the one that is called."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import typer.main
from typer.core import TyperCommand, TyperGroup


class Command(NamedTuple):
    """One command, as its group lists it."""

    panel: str | None
    """The heading that it stands under in the help."""
    summary: str
    """The first paragraph of its own help."""
    module: str = ""
    """The module whose `app` holds it; empty for one that an entry point names."""


class LazyGroup(TyperGroup):
    """A group that knows its commands by a table alone, until one of them is called."""

    known: ClassVar[Mapping[str, Command]]
    """The commands by name, in the order of the help."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of the commands, in the order of the help."""
        return list(self.known)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, as the help lists it; None when there is none."""
        if cmd_name not in self.known:
            return self.load(cmd_name)
        if cmd_name not in self.list_commands(ctx):
            return None
        known = self.known[cmd_name]
        return TyperCommand(cmd_name, help=known.summary, rich_help_panel=known.panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that is called, and its arguments."""
        found = self.load(args[0])
        if found is not None:
            return args[0], found, args[1:]
        if close := get_close_matches(args[0], self.list_commands(ctx)):
            ctx.fail(f"No such command {args[0]!r}. Did you mean {', '.join(map(repr, close))}?")
        return super().resolve_command(ctx, args)

    def load(self, name: str) -> Any:
        """The command of that name with its arguments; None when there is none."""
        if name not in self.commands:
            found = self.find(name)
            if found is None:
                return None
            if name in self.known:
                found.rich_help_panel = self.known[name].panel
            self.commands[name] = found
        return self.commands[name]

    def find(self, name: str) -> Any:
        """Loads the module that holds a command; None when there is no such command."""
        known = self.known.get(name)
        return None if known is None else commands_of(import_module(known.module).app)[name]


def commands_of(app: typer.Typer) -> Mapping[str, Any]:
    """The commands that a `Typer` holds, by name."""
    holder = typer.Typer(add_completion=False)
    holder.add_typer(app)
    return typer.main.get_group(holder).commands
