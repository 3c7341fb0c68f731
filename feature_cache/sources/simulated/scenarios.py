"""Markets of a kind, by name, for the demo and for tests. What happens in one happens again every twenty seconds."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

FIRST_SECONDS: Final = 10.0
"""When the thing that a scenario is about happens first, after the start of the market."""
EVERY_SECONDS: Final = 20.0


class ScenarioName(enum.StrEnum):
    """Scenarios on the command line."""

    NORMAL = "normal"
    CALM = "calm"
    NEWS_JUMP = "news-jump"
    FLASH_CRASH = "flash-crash"
    ONE_SIDED_FLOW = "one-sided-flow"
    VENUE_OUTAGE = "venue-outage"


@dataclass(frozen=True, slots=True)
class Scenario:
    """How a market differs from the normal one."""

    description: str
    volatility: float = 1.0
    """Every move of the value is this many times larger."""
    pace: float = 1.0
    """Every rate of orders is this many times higher."""
    buyers: float = 0.5
    """Share of the uninformed that buy."""
    news_bps: float = 0.0
    """The value jumps by this much, up or down."""
    crash_seconds: float = 0.0
    """For so long makers cancel, nobody looks at the value, and takers only sell."""
    outage_seconds: float = 0.0
    """For so long the venue neither trades nor sends anything. Then comes a reset, and a snapshot."""


SCENARIOS: Final[Mapping[ScenarioName, Scenario]] = {
    ScenarioName.NORMAL: Scenario("the market that was fitted to a recorded session"),
    ScenarioName.CALM: Scenario("a third of the volatility, half of the orders", volatility=1 / 3, pace=0.5),
    ScenarioName.NEWS_JUMP: Scenario("the value jumps by 30 bp", news_bps=30.0),
    ScenarioName.FLASH_CRASH: Scenario("makers withdraw for two seconds while takers sell", crash_seconds=2.0),
    ScenarioName.ONE_SIDED_FLOW: Scenario("nine of ten uninformed traders buy", buyers=0.9),
    ScenarioName.VENUE_OUTAGE: Scenario("the venue is silent for five seconds", outage_seconds=5.0),
}


def scenario_of(name: str) -> Scenario:
    """The scenario of this name.

    Raises:
        ValueError: There is none; the message lists the names.
    """
    try:
        return SCENARIOS[ScenarioName(name)]
    except ValueError as error:
        raise ValueError(f"there is no scenario {name!r}; there is {', '.join(ScenarioName)}") from error
