from __future__ import annotations

import pytest

from feature_cache.sources.simulated.scenarios import SCENARIOS, ScenarioName, scenario_of


def test_every_name_has_a_scenario_of_its_own() -> None:
    assert set(SCENARIOS) == set(ScenarioName)
    assert len(set(SCENARIOS.values())) == len(ScenarioName)


def test_an_unknown_name_is_refused_with_a_list_of_the_known_ones() -> None:
    with pytest.raises(ValueError, match="normal, calm, news-jump, flash-crash, one-sided-flow, venue-outage"):
        scenario_of("storm")
