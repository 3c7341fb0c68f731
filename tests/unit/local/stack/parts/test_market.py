from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from feature_cache.sources.simulated.scenarios import ScenarioName
from local.stack.parts.market import argv
from pretrade.client.stack_file import Endpoints

NOTHING: dict[str, Any] = {each.name: None for each in fields(Endpoints)}
NOWHERE = Endpoints(**NOTHING)


@pytest.mark.parametrize("scenario", ScenarioName)
def test_a_simulated_market_is_of_the_scenario_that_was_chosen(scenario: ScenarioName) -> None:
    endpoints = replace(NOWHERE, kafka_bootstrap_servers="127.0.0.1:1", instruments=("A.SIM",))
    command = argv(endpoints, None, "1", scenario)
    assert command[command.index("--scenario") + 1] == scenario.value
    assert command[command.index("--instruments") + 1] == "A.SIM"


def test_a_recorded_market_has_no_scenario(tmp_path: Path) -> None:
    endpoints = replace(NOWHERE, kafka_bootstrap_servers="127.0.0.1:1", instruments=("A.BINANCE",))
    assert "--scenario" not in argv(endpoints, tmp_path, "1", ScenarioName.CALM)
