"""A page of the documentation as something that can be run: its files, and its commands in their order."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import typer.main
from typer.core import TyperGroup
from typer.exceptions import TyperException

from pretrade.client.cli.main import app

DOCS: Final = Path(__file__).parents[2] / "docs"
_BLOCK: Final = re.compile(r"```(python|console)\n(.*?)```", re.DOTALL)
_PROGRAM: Final = r"```{}\n(.*?)```\n(?:(?!```).)*?```text\n(.*?)```"
_MARK: Final = "-- ended with"
_VARIES: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|\b[0-9a-f]{16}\b|[+-]?\d[\d.,]*")
"""Ids, versions and figures."""
_SOURCES: Final = re.compile(r"\((?:[A-Z_]+ # ?)+\)")
"""Which sources decided how often: on a busy machine a later stage decides now and then."""


@dataclass(frozen=True)
class Command:
    """One line after a prompt."""

    text: str
    shown: tuple[str, ...]
    """What the page shows of its output."""


def python_of(page: str) -> list[str]:
    """The Python files of a page, in their order."""
    return [text for kind, text in _BLOCK.findall((DOCS / page).read_text()) if kind == "python"]


def programs_of(page: str, language: str = "python") -> list[tuple[str, str]]:
    """The programs of a page in one language, each with what the page shows of its output."""
    return re.findall(_PROGRAM.format(language), (DOCS / page).read_text(), re.DOTALL)


def commands_of(page: str) -> list[Command]:
    """All commands of a page, in their order."""
    blocks = [text for kind, text in _BLOCK.findall((DOCS / page).read_text()) if kind == "console"]
    return [
        Command(first, tuple(shown))
        for block in blocks
        for first, *shown in (one.splitlines() for one in block.removeprefix("$ ").split("\n$ "))
    ]


def alike(text: str) -> str:
    """A text without what differs from run to run: ids, figures, sources, and how wide a table is."""
    return _SOURCES.sub("(#)", " ".join(_VARIES.sub("#", text).split()))


def complaint_about(arguments: list[str]) -> str | None:
    """What the tool would say against these arguments, without running the command."""
    command, parent = typer.main.get_command(app), None
    try:
        while isinstance(command, TyperGroup):
            parent = command.make_context(command.name, arguments, parent=parent)
            _, found, arguments = command.resolve_command(parent, [*parent._protected_args, *parent.args])
            assert found is not None
            command = found
        command.make_context(command.name, arguments, parent=parent)
    except TyperException as error:
        return str(error)
    return None


class Terminal:
    """A shell in which one command follows the other, as somebody types them.

    Args:
        directory: Where it starts.
        environment: Its variables, all of them.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._shell = subprocess.Popen(
            ["bash", "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=environment,
            text=True,
        )

    def run(self, command: str) -> tuple[str, int]:
        """What a command prints, and its exit code. Its own input is empty."""
        stdin = self._shell.stdin
        assert stdin is not None
        stdin.write(f'{{ {command}\n}} < /dev/null\necho "{_MARK} $?"\n')
        stdin.flush()
        lines = list(self._lines())
        code = int(lines.pop().rpartition(" ")[2])
        return "\n".join(lines), code

    def _lines(self) -> Iterator[str]:
        """Up to the mark, which is the last one."""
        stdout = self._shell.stdout
        assert stdout is not None
        for line in stdout:
            yield line.rstrip("\n")
            if line.startswith(_MARK):
                return
        raise AssertionError("the shell has ended")

    def close(self) -> None:
        """Ends the shell, and whatever still runs in it."""
        self._shell.kill()
        self._shell.communicate()
