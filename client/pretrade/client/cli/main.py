"""The `pretrade` command: its own commands, and those that `pretrade-server` adds."""

from __future__ import annotations

import os
import re
from collections import Counter
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, requires
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.markup import escape
from typer.core import TyperGroup

from pretrade.client import credentials
from pretrade.client.cli import canary, decide, steering
from pretrade.client.proxies import spare_this_machine

_GROUP: Final = "pretrade.commands"
"""Entry points of this group add commands: the name is the command's, the object a `typer.Typer` that holds it."""
_SERVER: Final = "pretrade-server"
_PANELS: Final = {
    "Run it on this machine": ("up", "demo", "kill", "trial-credentials"),
    "Ask and steer a server": (
        *("decide", "status", "state", "breaker", "flag", "chain", "changes"),
        *("replica", "config", "audit"),
    ),
    "Market data": ("features", "ingest", "replay", "simulate"),
    "Models": ("train", "card", "canary-demo", "models", "canary", "dataset"),
    "Measure": (
        *("soak", "bench", "bench-compare", "bench-costs", "bench-flips"),
        *("bench-features", "bench-lookups", "bench-serving"),
    ),
}
"""What the help lists the commands under, and their order. It names those of `pretrade-server` as well, so that the
help is the same however they are installed, and so that one that is not installed can say where it is to be had."""
_PANEL_OF: Final = {name: panel for panel, names in _PANELS.items() for name in names}
_REQUIREMENT: Final = re.compile(r"([a-z0-9-]+).*; extra == '([a-z]+)'")
_OURS: Final = ("fallback", "feature_cache", "loadtest", "local", "pretrade", "server", "torchserve")


class Commands(TyperGroup):
    """Our own commands, and those that other distributions add.

    Nothing of another distribution is looked for while a command of our own runs. A command of another distribution
    loads the one entry point that has its name, and only the help loads them all.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all commands, in the order of the help."""
        names = {*self.commands, *entry_points(group=_GROUP).names}
        known = [name for name in _PANEL_OF if name in names]
        return [*known, *sorted(names.difference(known))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; None when there is none.

        Raises:
            SystemExit: It is a command of `pretrade-server`, which is not installed.
        """
        if cmd_name not in self.commands:
            self.commands.update((cmd_name, _loaded(entry)) for entry in entry_points(group=_GROUP, name=cmd_name))
        if cmd_name in self.commands:
            command: Any = self.commands[cmd_name]
            command.rich_help_panel = _PANEL_OF.get(cmd_name)
            return command
        if cmd_name in _PANEL_OF and not ctx.resilient_parsing:
            raise SystemExit(f"`pretrade {cmd_name}` is part of {_SERVER}: pip install '{_SERVER}[local]'")
        for name in self.list_commands(ctx):  # for what Typer says of a name that is close to one of them
            self.get_command(ctx, name)
        return None


app = typer.Typer(
    name="pretrade",
    cls=Commands,
    help="Trade, no trade, or abstain? Answered for every order inside its deadline, with proof of why.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for group in (decide.app, steering.app, canary.app):
    app.add_typer(group)


@app.callback()
def connection(
    tls_ca: Annotated[
        Path | None,
        typer.Option(envvar=credentials.CA, help="CA file for the server's certificate; every call then uses TLS."),
    ] = None,
    cert: Annotated[
        Path | None, typer.Option(envvar=credentials.CERTIFICATE, help="File of your client certificate.")
    ] = None,
    key: Annotated[Path | None, typer.Option(envvar=credentials.KEY, help="Its private key.")] = None,
    tls_name: Annotated[
        str | None,
        typer.Option(envvar=credentials.TLS_NAME, help="Name in the server's certificate, if not the host's."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar=credentials.TOKEN_FILE,
            help=f"File of your token. {credentials.TOKEN} may hold the token itself instead.",
        ),
    ] = None,
) -> None:
    """Trade, no trade, or abstain? Answered for every order inside its deadline, with proof of why.

    The options stand before the command and are for those that call a server.
    """
    spare_this_machine()
    given = {
        credentials.CA: tls_ca,
        credentials.CERTIFICATE: cert,
        credentials.KEY: key,
        credentials.TLS_NAME: tls_name,
        credentials.TOKEN_FILE: token_file,
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


def _loaded(entry: EntryPoint) -> Any:
    """The command of an entry point; one that says what is missing where its packages are not installed."""
    holder = typer.Typer(add_completion=False)
    try:
        holder.add_typer(entry.load())
    except ModuleNotFoundError as error:
        remedy = _lacks(error)

        def say() -> None:
            raise SystemExit(remedy)

        anything = {"allow_extra_args": True, "ignore_unknown_options": True}
        holder.command(entry.name, help=escape(remedy), context_settings=anything, add_help_option=False)(say)
    found: Any = typer.main.get_group(holder).commands
    if entry.name not in found:
        raise SystemExit(f"{_SERVER} is another version than its list of commands says: install it again")
    return found[entry.name]


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
    try:
        declared = [_REQUIREMENT.match(line) for line in requires(_SERVER) or ()]
    except PackageNotFoundError:
        declared = []
    found = [(str(one[1]), str(one[2])) for one in declared if one]
    sizes = Counter(extra for _, extra in found)
    package = module.replace("_", "-").lower()
    return min((extra for name, extra in found if name == package), key=sizes.__getitem__, default="local")
