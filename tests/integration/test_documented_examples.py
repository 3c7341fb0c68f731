"""What the README, the screen of `pretrade up`, docs/own-afternoon.md and the clients' pages have a newcomer type.

One stack serves all pages. The afternoon itself takes minutes; that its commands are known is always tested.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from support.pages import DOCS, Command, Terminal, alike, commands_of, complaint_about, programs_of, python_of
from support.up_command import Up, up

from fallback.order import MODEL_SOURCES
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]
README = (Path(__file__).parents[2] / "README.md").read_text()
AFTERNOON = "own-afternoon.md"
CLIENT, JS_CLIENT, TEN_MINUTES = "client-python.md", "client-js.md", "ten-minutes.md"
WORD = re.compile(r"\b[A-Z][A-Z_]{3,}\b")
"""A word of the contract: which one depends on the market."""
UP = "pretrade up"
DRIFT, DRIFTED = "pretrade audit drift", 4
"""A command of the afternoon, and its exit code where it has something to say."""
START_SECONDS = 180
"""All parts of the stack start at once, on a machine that may have other work."""
CALLERS, ORDERS = 32, 200
"""Callers that ask at once, and how many orders of each strategy they have between them."""
MODELS = "SOURCE_(PRIMARY|SECONDARY|EMBEDDED)"


class Desk(NamedTuple):
    """A newcomer's folder, and the two terminals in it."""

    folder: Path
    command: Up
    terminal: Terminal
    printed: list[tuple[Command, str]]
    """What each command of the afternoon printed, in their order."""

    def type(self, command: Command) -> None:
        """Has the terminal run a command of the page, which has to end as it should."""
        text, code = self.terminal.run(command.text)
        assert code == (DRIFTED if command.text == DRIFT else 0), f"{command.text}\n{text}"
        self.printed.append((command, text))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, model_store: Path) -> Iterator[Desk]:
    """A stack that runs, as the afternoon's page has it started."""
    folder = tmp_path_factory.mktemp("desk")
    (sets,), (orders, train, order) = python_of("feature-sets.md"), python_of(AFTERNOON)
    for name, content in {"sets.py": sets, "orders.py": orders, "train.py": train, "order.py": order}.items():
        (folder / name).write_text(content)
    shutil.copytree(model_store, folder / "store")
    (folder / ".pretrade").mkdir()
    before, _ = _around(UP)
    exports = (shlex.split(one.text)[1] for one in before if one.text.startswith("export "))
    exported = dict(one.split("=", 1) for one in exports)
    settings = exported | {
        "PRETRADE_FEATURES__FILE": str(folder / exported["PRETRADE_FEATURES__FILE"]),
        "PRETRADE_LOCAL_MODEL_STORE": str(folder / "store"),
        "PRETRADE_LOCAL_START_TIMEOUT_SECONDS": f"{START_SECONDS}",
        "PRETRADE_BUDGET__CAP_SECONDS": "1",  # who decides is what this is about, not how fast
    }
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    terminal = Terminal(folder, os.environ | {"PATH": path, "COLUMNS": "160"})
    try:
        with up(folder / ".pretrade", **settings) as command:
            decision = str(command.wait_until_up(START_SECONDS).endpoints.decision)
            (folder / "order.py").write_text(order.replace("127.0.0.1:7001", decision))
            yield Desk(folder, command, terminal, [])
    finally:
        terminal.close()


@pytest.fixture(scope="module")
def printed(desk: Desk) -> list[tuple[Command, str]]:
    """What the commands of the afternoon printed, in their order."""
    before, after = _around(UP)
    for typed in [*before, *after]:
        desk.type(typed)
    return desk.printed


def _around(command: str) -> tuple[list[Command], list[Command]]:
    """The commands of the afternoon before this one and after it."""
    typed = commands_of(AFTERNOON)
    place = [one.text for one in typed].index(command)
    return typed[:place], typed[place + 1 :]


@pytest.mark.long
def test_replicas_and_explainer_are_warm_before_anybody_asks(desk: Desk) -> None:
    log = (desk.command.directory / "logs" / "server.log").read_text()
    # gRPC's library writes lines of its own, for example when a slow replica has had enough of its pings.
    entries = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    warm = {entry["replica"] for entry in entries if entry["event"] == "replica is warm"}
    assert warm == {"primary", "secondary", "challenger"}
    running = [" ".join(child.cmdline()) for child in desk.command.children()]
    assert any("server.models.model_process" in one for one in running)


@pytest.mark.long
def test_the_python_example_is_decided_by_a_model(desk: Desk) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "127.0.0.1:7001" in example
    code = example.replace("127.0.0.1:7001", str(desk.command.wait_until_up().endpoints.decision))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"(TRADE|NO_TRADE) {MODELS.removeprefix('SOURCE_')} [0-9a-f-]{{36}}\n", done.stdout), (
        done.stdout
    )


@pytest.mark.long
@pytest.mark.parametrize(("program", "shown"), [*programs_of(CLIENT), *programs_of(TEN_MINUTES)])
def test_the_python_programs_of_a_page_print_what_it_shows(desk: Desk, program: str, shown: str) -> None:
    _check_program(desk, [sys.executable, "-c"], program, shown)


@pytest.mark.long
@pytest.mark.parametrize(("program", "shown"), [*programs_of(JS_CLIENT, "js"), *programs_of(TEN_MINUTES, "js")])
def test_the_node_programs_of_a_page_print_what_it_shows(desk: Desk, js_client: Path, program: str, shown: str) -> None:
    _check_program(desk, ["node", "--input-type=module", "-e"], program, shown, js_client)


@pytest.mark.long
def test_the_curl_commands_of_the_ten_minutes_print_what_they_show(desk: Desk) -> None:
    asked = [command for command in commands_of(TEN_MINUTES) if command.text.startswith("curl ")]
    assert len(asked) == 4
    http = str(desk.command.wait_until_up().endpoints.http_url).removeprefix("http://")
    for command in asked:
        typed = command.text.replace("127.0.0.1:7004", http).replace(".pretrade/", f"{desk.command.directory}/")
        text, code = desk.terminal.run(typed + " && echo")
        (shown,) = (_whatever_the_market(line) for line in command.shown)
        assert code == 0, text
        assert shown in _whatever_the_market(text), (command.text, text)


@pytest.mark.long
def test_what_the_ten_minutes_have_installed_runs_their_programs(desk: Desk, js_client: Path, tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, os.environ)
    try:
        for text in (one.text for one in commands_of(TEN_MINUTES) if not one.text.startswith("curl ")):
            there = re.sub(r" (\./client\S*|\.ci/js)", lambda found: f" {js_client.parents[1] / found[1]}", text)
            printed, code = terminal.run(there)
            assert code == 0, (text, printed)
    finally:
        terminal.close()
    for language, argv in (("python", ["caller/bin/python", "-c"]), ("js", ["node", "--input-type=module", "-e"])):
        for program, shown in programs_of(TEN_MINUTES, language):
            _check_program(desk, argv, program, shown, tmp_path)


def _check_program(desk: Desk, argv: list[str], program: str, shown: str, folder: Path | None = None) -> None:
    """Runs a program of a page in a folder, which has to print what the page shows."""
    endpoints = desk.command.wait_until_up().endpoints
    code = program.replace("127.0.0.1:7001", str(endpoints.decision))
    code = code.replace("http://127.0.0.1:7004", str(endpoints.http_url))
    done = subprocess.run([*argv, code], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    printed, expected = ([_whatever_the_market(line) for line in text.splitlines()] for text in (done.stdout, shown))
    assert [line for line in printed if line != "send the order"] == expected


def _whatever_the_market(line: str) -> str:
    """A line without what was decided, by whom, and why."""
    return re.sub(r"'WORD'(, 'WORD')+", "'WORD',", WORD.sub("WORD", alike(line)))


@pytest.mark.parametrize("page", [CLIENT, JS_CLIENT, TEN_MINUTES])
def test_every_program_of_a_page_is_run(page: str) -> None:
    assert [program for program, _ in programs_of(page)] == python_of(page)
    assert len(programs_of(page, "js")) == (DOCS / page).read_text().count("```js\n")


@pytest.mark.long
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


def test_the_commands_of_the_afternoon_are_some_that_the_tool_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = [one for command in commands_of(AFTERNOON) for one in re.findall(r"\bpretrade ([^|)]+)", command.text)]
    assert len(asked) > 10
    for one in asked:
        arguments = shlex.split(one)
        for name in arguments:
            if re.fullmatch(r"\w+\.(py|txt|parquet)", name):
                (tmp_path / name).touch()  # what the commands before it make
        assert complaint_about(arguments) is None, one


@pytest.mark.long
def test_the_commands_of_the_afternoon_print_what_the_page_shows(printed: list[tuple[Command, str]]) -> None:
    assert sum(len(command.shown) for command, _ in printed) > 10
    for command, text in printed:
        lines = [_by_a_model(line) for line in text.splitlines()]
        for shown in command.shown:
            assert any(_by_a_model(shown) in line for line in lines), (command.text, shown, text)


def _by_a_model(line: str) -> str:
    """Without saying which replica was quick enough on a busy machine, nor what the model made of the market."""
    return re.sub(
        r"\b(?:NO_TRADE|TRADE|ABSTAIN)\b", "ACTION", re.sub("PRIMARY|SECONDARY|EMBEDDED", "MODEL", alike(line))
    )


@pytest.mark.long
def test_the_caller_brings_one_feature_and_the_model_sees_all_six(printed: list[tuple[Command, str]]) -> None:
    (shown,) = (text for command, text in printed if command.text.endswith("--explain"))
    _, _, explained = shown.partition("sampled_shapley")
    for feature in ("spread_bps", "imbalance_l5", "weighted_mid_bps", "momentum_bps", "flow", "urgency"):
        (row,) = (line for line in explained.splitlines() if f" {feature} " in line)
        assert re.search(r"[+-]\d+\.\d{4}", row), row
        assert "undefined" not in row, row
    assert re.search(r" urgency +│ +0\.9 ", explained), explained


@pytest.mark.long
@pytest.mark.usefixtures("printed")  # the last of which has the map lead the desk's orders to its own model
def test_two_models_with_different_sets_decide_side_by_side_under_load_and_replay_to_the_bit(desk: Desk) -> None:
    brought = pb.FeatureVector(feature_set_id="numbers", values=[math.nan] * 5 + [0.9])
    orders = {
        "desk": pb.Order(instrument="BTCUSDT.SIM", side=pb.SIDE_SELL, quantity=0.05, strategy="desk", features=brought),
        "other": pb.Order(instrument="BTCUSDT.SIM", side=pb.SIDE_SELL, quantity=0.05, strategy="other"),
    }
    found: dict[str, Counter[str]] = {strategy: Counter() for strategy in orders}
    with (
        grpc.insecure_channel(str(desk.command.wait_until_up().endpoints.decision)) as channel,
        ThreadPoolExecutor(CALLERS) as callers,
    ):
        ask = decision_pb2_grpc.DecisionServiceStub(channel).Decide
        asked = [
            (strategy, callers.submit(ask, pb.DecideRequest(order=order), timeout=10))
            for _ in range(ORDERS)
            for strategy, order in orders.items()
        ]
        for strategy, reply in asked:
            decision = reply.result().decision
            found[strategy][decision.model_version if decision.source in MODEL_SOURCES else "none"] += 1
    (own, _), (default, _) = (next(iter(found[strategy].most_common(1))) for strategy in ("desk", "other"))
    assert own != default
    for strategy, version in (("desk", own), ("other", default)):
        assert found[strategy].keys() <= {version, "none"}, found
        replayed, code = desk.terminal.run(
            f"pretrade audit replay --since 5m --by-model {version} --strategy {strategy}"
        )
        assert code == 0, replayed
        assert "0 different" in replayed, replayed
