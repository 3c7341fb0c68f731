"""The `pretrade` command: its own commands, and those that `pretrade-server` adds."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from pretrade.client import credential_variables as variables
from pretrade.client.cli.commands import COMMANDS
from pretrade.client.cli.lazy import LazyGroup, commands_of
from pretrade.client.proxies import spare_this_machine

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_GROUP: Final = "pretrade.commands"
"""Entry points of this group add commands: the name is the command's, the object a `typer.Typer` that holds it."""
_SERVER: Final = "pretrade-server"
_REQUIREMENT: Final = re.compile(r"([a-z0-9-]+).*; extra == '([a-z]+)'")
_OURS: Final = ("fallback", "feature_cache", "loadtest", "local", "pretrade", "server", "torchserve")


class Commands(LazyGroup):
    """Our own commands, and those that `pretrade-server` adds."""

    known = COMMANDS

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of the commands that are installed, in the order of the help."""
        added = {name for name in _added() if "." not in name}  # the others are of a group of ours
        known = [name for name, command in COMMANDS.items() if command.module or name in added]
        return [*known, *sorted(added.difference(known))]

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that is called, and its arguments.

        Raises:
            SystemExit: It is a command of `pretrade-server`, which is not installed.
        """
        if args[0] in COMMANDS and self.load(args[0]) is None and not ctx.resilient_parsing:
            raise SystemExit(_not_ours(args[0]))
        return super().resolve_command(ctx, args)

    def find(self, name: str) -> Any:
        """The command of that name, of ours or of an entry point."""
        if name in COMMANDS and COMMANDS[name].module:
            return super().find(name)
        entry = _added().get(name)
        return None if entry is None else _loaded(entry)


app = typer.Typer(
    name="pretrade",
    cls=Commands,
    help="Trade, no trade, or abstain? Answered for every order inside its deadline, with proof of why.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def connection(
    tls_ca: Annotated[
        Path | None,
        typer.Option(envvar=variables.CA, help="CA file for the server's certificate; every call then uses TLS."),
    ] = None,
    cert: Annotated[
        Path | None, typer.Option(envvar=variables.CERTIFICATE, help="File of your client certificate.")
    ] = None,
    key: Annotated[Path | None, typer.Option(envvar=variables.KEY, help="Its private key.")] = None,
    tls_name: Annotated[
        str | None,
        typer.Option(envvar=variables.TLS_NAME, help="Name in the server's certificate, if not the host's."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar=variables.TOKEN_FILE,
            help=f"File of your token. {variables.TOKEN} may hold the token itself instead.",
        ),
    ] = None,
) -> None:
    """Trade, no trade, or abstain? Answered for every order inside its deadline, with proof of why.

    The options stand before the command and are for those that call a server.
    """
    spare_this_machine()
    given = {
        variables.CA: tls_ca,
        variables.CERTIFICATE: cert,
        variables.KEY: key,
        variables.TLS_NAME: tls_name,
        variables.TOKEN_FILE: token_file,
    }
    for name, value in given.items():
        if value is not None:
            os.environ[name] = str(value)


def main() -> None:
    """Entry point of the command."""
    try:
        app()
    except ModuleNotFoundError as error:
        raise SystemExit(_lacks(error)) from error


def added(name: str) -> Any:
    """A command of `pretrade-server` in a group of ours, `group.command`.

    Raises:
        SystemExit: It is not installed.
    """
    entry = _added().get(name)
    if entry is None:
        raise SystemExit(_not_ours(name.replace(".", " ")))
    return _loaded(entry)


def _not_ours(command: str) -> str:
    return f"`pretrade {command}` is part of {_SERVER}: pip install '{_SERVER}[local]'"


def _added() -> Mapping[str, EntryPoint]:
    """The entry points of `pretrade-server` by the names of their commands; none where it is not installed."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return {entry.name: entry for entry in distribution(_SERVER).entry_points if entry.group == _GROUP}
    except PackageNotFoundError:
        return {}


def _loaded(entry: EntryPoint) -> Any:
    """The command of an entry point.

    Raises:
        SystemExit: A package that it needs is missing, or the installation is of another version.
    """
    try:
        found = commands_of(entry.load())
    except ModuleNotFoundError as error:
        raise SystemExit(_lacks(error)) from error
    name = entry.name.rpartition(".")[2]
    if name not in found:
        raise SystemExit(f"{_SERVER} is another version than its list of commands says: install it again")
    return found[name]


def _lacks(error: ModuleNotFoundError) -> str:
    """The missing package, and the extra that contains it.

    Raises:
        ModuleNotFoundError: It is a module of ours: the installation is broken, and lacks no extra.
    """
    module = str(error.name).partition(".")[0]
    if module in _OURS:
        raise error
    return f"{error.name} is missing: pip install '{_SERVER}[{_extra_of(module)}]'"


def _extra_of(module: str) -> str:
    """The smallest extra with the module's package; `local`, which has nearly all, if the names differ."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        declared = [_REQUIREMENT.match(line) for line in requires(_SERVER) or ()]
    except PackageNotFoundError:
        declared = []
    found = [(str(one[1]), str(one[2])) for one in declared if one]
    sizes = Counter(extra for _, extra in found)
    package = module.replace("_", "-").lower()
    return min((extra for name, extra in found if name == package), key=sizes.__getitem__, default="local")
