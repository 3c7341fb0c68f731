"""What a newcomer types first, as it stands in the README and on the screen of `pretrade up`: a model decides it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.up_command import Up, up

pytestmark = pytest.mark.stack
README = (Path(__file__).parents[2] / "README.md").read_text()
START_SECONDS = 180
"""All parts of the stack start at once, on a machine that may have other work."""
MODELS = "SOURCE_(PRIMARY|SECONDARY|EMBEDDED)"


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, model_store: Path) -> Iterator[Up]:
    patient = {"PRETRADE_LOCAL_START_TIMEOUT_SECONDS": f"{START_SECONDS}"}
    with up(tmp_path_factory.mktemp("up"), PRETRADE_LOCAL_MODEL_STORE=str(model_store), **patient) as command:
        command.wait_until_up(START_SECONDS)
        yield command


def test_replicas_and_explainer_are_warm_before_anybody_asks(command: Up) -> None:
    log = (command.directory / "logs" / "server.log").read_text()
    # gRPC's library writes lines of its own, for example when a slow replica has had enough of its pings.
    entries = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    warm = {entry["replica"] for entry in entries if entry["event"] == "replica is warm"}
    assert warm == {"primary", "secondary", "challenger"}
    running = [" ".join(child.cmdline()) for child in command.children()]
    assert any("server.models.model_process" in one for one in running)


def test_the_python_example_is_decided_by_a_model(command: Up) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "127.0.0.1:7001" in example
    code = example.replace("127.0.0.1:7001", str(command.wait_until_up().endpoints.decision))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"ACTION_(TRADE|NO_TRADE) {MODELS} [0-9a-f-]{{36}}\n", done.stdout), done.stdout


def test_the_command_that_up_prints_has_a_limit_near_the_mid_and_is_decided_by_a_model(command: Up) -> None:
    assert re.search(r"The mid of BTCUSDT\.SIM is [0-9,.]+\. In another terminal", command.output), command.output
    (line,) = (line for line in command.output.splitlines() if " decide " in line)
    _, *arguments = shlex.split(line)
    assert "--limit" in arguments
    asked = [sys.executable, "-m", "local", *arguments, "--json"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    decision = json.loads(done.stdout)
    assert re.fullmatch(MODELS, decision["source"]), decision
    assert "REASON_CODE_PRICE_COLLAR" not in decision["reasons"]
    assert decision["order_ref"] == "cli", "the names are those of the contract"
