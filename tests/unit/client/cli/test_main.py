"""The `pretrade` command."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from typer.testing import CliRunner

from pretrade.client.cli import main
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


def test_a_command_of_the_client_loads_nothing_that_serves() -> None:
    code = (
        "import sys; from pretrade.client.cli.main import app; app(['decide', '--help'], standalone_mode=False); "
        "print(*sys.modules, file=sys.stderr)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split()
    assert "pretrade.client.cli.decide" in loaded
    assert not {"server", "local", "feature_cache", "sqlalchemy", "numpy", "structlog"} & set(loaded)
