"""What the README, the screen of `pretrade up` and docs/own-afternoon.md have a newcomer type, as it stands there.

One stack serves both pages. The rows that the afternoon needs are made while it starts.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.pages import Command, Terminal, alike, commands_of, python_of
from support.up_command import Up, up

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]
README = (Path(__file__).parents[2] / "README.md").read_text()
AFTERNOON = "own-afternoon.md"
UP = "pretrade up"
NEEDS_THE_STACK = "pretrade models add"
DRIFT, DRIFTED = "pretrade audit drift", 4
"""A command of the afternoon, and its exit code where it has something to say."""
START_SECONDS = 180
"""All parts of the stack start at once, on a machine that may have other work."""
MODELS = "SOURCE_(PRIMARY|SECONDARY|EMBEDDED)"


class Desk(NamedTuple):
    """A newcomer's folder, and the two terminals in it."""

    folder: Path
    command: Up
    terminal: Terminal
    printed: dict[str, str]
    """What each command of the afternoon printed."""

    def type(self, command: str) -> None:
        """Has the terminal run a command of the page, which has to end as it should."""
        self.printed[command], code = self.terminal.run(command)
        assert code == (DRIFTED if command == DRIFT else 0), f"{command}\n{self.printed[command]}"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, model_store: Path) -> Iterator[Desk]:
    """A stack that runs, and the afternoon up to where it needs one."""
    folder = tmp_path_factory.mktemp("desk")
    (sets,), (orders, train, order) = python_of("feature-sets.md"), python_of(AFTERNOON)
    for name, content in {"sets.py": sets, "orders.py": orders, "train.py": train, "order.py": order}.items():
        (folder / name).write_text(content)
    shutil.copytree(model_store, folder / "store")
    (folder / ".pretrade").mkdir()
    before, after = _around(UP)
    exported = dict(one.removeprefix("export ").split("=") for one in before if one.startswith("export "))
    settings = {
        "PRETRADE_FEATURES__FILE": str(folder / exported["PRETRADE_FEATURES__FILE"]),
        "PRETRADE_LOCAL_MODEL_STORE": str(folder / "store"),
        "PRETRADE_LOCAL_START_TIMEOUT_SECONDS": f"{START_SECONDS}",
        "PRETRADE_BUDGET__CAP_SECONDS": "1",  # who decides is what this is about, not how fast
    }
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    terminal = Terminal(folder, os.environ | {"PATH": path, "COLUMNS": "160"})
    try:
        with up(folder / ".pretrade", **settings) as command:
            found = Desk(folder, command, terminal, {})
            for typed in [*before, *after[: _place(NEEDS_THE_STACK, after)]]:
                found.type(typed)
            decision = str(command.wait_until_up(START_SECONDS).endpoints.decision)
            (folder / "order.py").write_text(order.replace("127.0.0.1:7001", decision))
            yield found
    finally:
        terminal.close()


@pytest.fixture(scope="module")
def printed(desk: Desk) -> dict[str, str]:
    """What all commands of the afternoon printed."""
    _, after = _around(UP)
    for typed in after[_place(NEEDS_THE_STACK, after) :]:
        desk.type(typed)
    return desk.printed


def _around(command: str) -> tuple[list[str], list[str]]:
    """The commands of the afternoon before this one and after it."""
    typed = [one.text for one in commands_of(AFTERNOON)]
    place = _place(command, typed)
    return typed[:place], typed[place + 1 :]


def _place(beginning: str, typed: list[str]) -> int:
    return next(place for place, one in enumerate(typed) if one.startswith(beginning))


def test_replicas_and_explainer_are_warm_before_anybody_asks(desk: Desk) -> None:
    log = (desk.command.directory / "logs" / "server.log").read_text()
    # gRPC's library writes lines of its own, for example when a slow replica has had enough of its pings.
    entries = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    warm = {entry["replica"] for entry in entries if entry["event"] == "replica is warm"}
    assert warm == {"primary", "secondary", "challenger"}
    running = [" ".join(child.cmdline()) for child in desk.command.children()]
    assert any("server.models.model_process" in one for one in running)


def test_the_python_example_is_decided_by_a_model(desk: Desk) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "127.0.0.1:7001" in example
    code = example.replace("127.0.0.1:7001", str(desk.command.wait_until_up().endpoints.decision))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"ACTION_(TRADE|NO_TRADE) {MODELS} [0-9a-f-]{{36}}\n", done.stdout), done.stdout


def test_the_command_that_up_prints_has_a_limit_near_the_mid_and_is_decided_by_a_model(desk: Desk) -> None:
    assert re.search(r"The mid of BTCUSDT\.SIM is [0-9,.]+\. In another terminal", desk.command.output)
    (line,) = (line for line in desk.command.output.splitlines() if " decide " in line)
    _, *arguments = shlex.split(line)
    assert "--limit" in arguments
    asked = [sys.executable, "-m", "local", *arguments, "--json"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    decision = json.loads(done.stdout)
    assert re.fullmatch(MODELS, decision["source"]), decision
    assert "REASON_CODE_PRICE_COLLAR" not in decision["reasons"]
    assert decision["order_ref"] == "cli", "the names are those of the contract"


@pytest.mark.parametrize("command", [one for one in commands_of(AFTERNOON) if one.shown], ids=lambda one: one.text)
def test_a_command_of_the_afternoon_prints_what_the_page_shows(printed: dict[str, str], command: Command) -> None:
    lines = [_by_a_model(line) for line in printed[command.text].splitlines()]
    for shown in command.shown:
        assert any(_by_a_model(shown) in line for line in lines), (shown, printed[command.text])


def _by_a_model(line: str) -> str:
    """Without saying which replica was quick enough on a busy machine, nor what the model made of the market."""
    return re.sub(r"(NO_)?TRADE", "TRADE", re.sub("PRIMARY|SECONDARY|EMBEDDED", "MODEL", alike(line)))


def test_the_caller_brings_one_feature_and_the_model_sees_all_six(printed: dict[str, str]) -> None:
    (shown,) = (text for command, text in printed.items() if command.endswith("--explain"))
    _, _, explained = shown.partition("sampled_shapley")
    for feature in ("spread_bps", "imbalance_l5", "weighted_mid_bps", "momentum_bps", "flow", "urgency"):
        (row,) = (line for line in explained.splitlines() if f" {feature} " in line)
        assert re.search(r"[+-]\d+\.\d{4}", row), row
        assert "undefined" not in row, row
    assert re.search(r" urgency +│ +0\.9 ", explained), explained
