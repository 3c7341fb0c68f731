"""The `pretrade` command."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any, Final

import pytest
import typer.main
from typer.testing import CliRunner

from pretrade.client.cli import main
from pretrade.client.cli.commands import COMMANDS
from pretrade.client.cli.main import app


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


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("aiokafka", "worker"),
        ("prometheus_client.core", "server"),
        ("torch", "models"),  # and not that of torchserve or torch-model-archiver, whose names begin alike
        ("optuna", "search"),
        ("sklearn", "local"),  # whose package has another name
        ("nobody_knows", "local"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    def lacks() -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(main, "app", lacks)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == f"{module} is missing: pip install 'pretrade-server[{extra}]'"


def test_an_installation_that_is_broken_is_not_taken_for_one_that_lacks_an_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def breaks() -> None:
        raise ModuleNotFoundError("No module named 'server.nowhere'", name="server.nowhere")

    monkeypatch.setattr(main, "app", breaks)
    with pytest.raises(ModuleNotFoundError):
        main.main()


def test_an_installation_whose_list_of_commands_is_of_another_version_says_so() -> None:
    gone = EntryPoint("bench-of-yesterday", "local.bench.cli:app", "pretrade.commands")
    with pytest.raises(SystemExit, match="install it again"):
        main._loaded(gone)


def loaded_by(*words: str) -> set[str]:
    """The modules that are loaded when a command has run in a process of its own."""
    code = (
        f"import atexit, sys; atexit.register(lambda: print('loaded', *sys.modules, file=sys.stderr)); "
        f"sys.argv = ['pretrade', *{words!r}]; from pretrade.client.cli.main import main; main()"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("PRETRADE_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    return set(done.stderr.rpartition("loaded ")[2].split())


HEAVY: Final = {"server", "local", "feature_cache", "torchserve", "loadtest", "sqlalchemy", "numpy", "structlog"}
"""What no command of the client needs."""
CALLING: Final = {"grpc", "google.protobuf", "rich.live"}
"""What a command needs when it calls a server, and its help does not. (Typer itself loads pydantic.)"""
OURS: Final = [name for name, command in COMMANDS.items() if command.module]


def test_the_help_loads_no_command() -> None:
    loaded = loaded_by("--help")
    assert "pretrade.client.cli.commands" in loaded
    assert not {"pydantic", *(command.module for command in COMMANDS.values() if command.module)} & loaded
    assert not (HEAVY | CALLING) & loaded


@pytest.mark.parametrize("name", OURS)
def test_the_help_of_a_command_of_the_client_loads_nothing_that_calls_a_server(name: str) -> None:
    loaded = loaded_by(name, "--help")
    assert COMMANDS[name].module in loaded
    assert not (HEAVY | CALLING) & loaded


@pytest.mark.parametrize(
    "words",
    ["status --once", "state", "flag", "breaker", "chain", "changes", "replica list", "decide BTCUSDT.SIM buy 1"],
)
def test_a_command_of_the_client_loads_nothing_that_serves(words: str) -> None:
    loaded = loaded_by(*words.split(), "--target", "127.0.0.1:9")
    assert "grpc" in loaded, "it ran, and looked for its server"
    assert not HEAVY & loaded


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_line_of_a_command_in_the_help_is_the_first_paragraph_of_its_own(name: str) -> None:
    commands: Any = typer.main.get_command(app)
    help_of_its_own = commands.load(name).help
    assert " ".join(help_of_its_own.split("\n\n")[0].split()) == COMMANDS[name].summary
