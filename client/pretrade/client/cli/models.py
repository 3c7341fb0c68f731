"""The group `pretrade models`: commands that ask a running server, and those of `pretrade-server` for its store."""

from __future__ import annotations

from typing import Any, Final

import typer

from pretrade.client.cli.lazy import Command, LazyGroup

_SERVED, _STORED = "Of a running server", "In the model store"
_OURS: Final = "pretrade.client.cli.model_versions"

COMMANDS: Final = {
    "list": Command(_SERVED, "List every version in the registry, the newest first, with where it is loaded.", _OURS),
    "load": Command(_SERVED, "Load a version beside what is served. It gets no orders by that.", _OURS),
    "alias": Command(_SERVED, "Point an alias at a version. That of the champion makes the version decide.", _OURS),
    "map": Command(
        _SERVED,
        "Show which model decides which orders, or set it. The first rule that fits an order holds. Asks first.",
        "pretrade.client.cli.model_map",
    ),
    "add": Command(_STORED, "Add a model that was trained elsewhere: ONNX, XGBoost, LightGBM, scikit-learn, Torch."),
    "combine": Command(_STORED, "Make one version of several: the weighted mean of their scores, or a stack."),
    "show": Command(_STORED, "Show what a version says of itself."),
    "export": Command(_STORED, "Copy a version with its card and metadata into a folder."),
    "remove": Command(_STORED, "Take a version out of the store. Its decisions can then no longer be replayed."),
}
"""By name, in the order of the help. Those without a module are commands of `pretrade-server`."""


class ModelCommands(LazyGroup):
    """The commands for models."""

    known = COMMANDS

    def find(self, name: str) -> Any:
        """The command of that name, of ours or of an entry point.

        Raises:
            SystemExit: It is a command of `pretrade-server`, which is not installed.
        """
        if name not in COMMANDS or COMMANDS[name].module:
            return super().find(name)
        from pretrade.client.cli.main import added  # noqa: PLC0415 - which loads this module by its name

        return added(f"models.{name}")


app = typer.Typer()
_models = typer.Typer(
    name="models", cls=ModelCommands, no_args_is_help=True, help="List, load, add, combine, export and remove models."
)
app.add_typer(_models)


@_models.callback()
def models() -> None:
    """List, load, add, combine, export and remove models."""
