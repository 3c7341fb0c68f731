"""The table of `pretrade market-facts`, and the tapes that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from feature_cache.sources.market_facts import FACTS, Fact, Tape, medians, tape
from feature_cache.sources.session import read_session, session_files
from feature_cache.sources.simulator import INSTRUMENTS, simulate
from pretrade.client.cli.fitting import Rows


def simulated_tape(seed: int, seconds: float, scenario: str) -> Tape:
    """One simulated session of the first instrument."""
    return tape(simulate(seed, INSTRUMENTS[:1], duration_seconds=seconds, scenario=scenario))


def recorded_tape(data: Path, instrument: str) -> Tape:
    """A recorded session of one instrument.

    Raises:
        feature_cache.sources.session.SessionError: It cannot be read.
        ValueError: It holds no quotes or no trades of the instrument.
    """
    return tape(read_session(session_files([data]), {instrument}))


def table(sessions: Sequence[dict[str, float]], here: dict[str, float] | None) -> Rows:
    """A row for each statistic.

    Args:
        sessions: Statistics of each simulated session.
        here: Those of the user's own recording.
    """
    middle = medians(sessions)
    yours = ["yours>"] if here else []
    shown = Rows("statistic", "recorded>", *yours, "within>", "simulated>", "sessions>", "verdict")
    for fact in FACTS:
        values = [each[fact.name] for each in sessions]
        met = fact.met(middle[fact.name])
        shown.add(
            fact.name,
            _text(fact.recorded),
            *([_text(here[fact.name])] if here else []),
            _tolerance(fact),
            _text(middle[fact.name]),
            f"{_text(min(values))}…{_text(max(values))}",
            "met" if met else Text("missed", style="red"),
        )
    return shown


def verdict(sessions: Sequence[dict[str, float]]) -> str:
    """How many of the statistics are met, for people."""
    middle = medians(sessions)
    met = sum(fact.met(middle[fact.name]) for fact in FACTS)
    return f"{met} of {len(FACTS)} met by the median of {len(sessions)} sessions"


def _tolerance(fact: Fact) -> str:
    return f"×÷ {fact.tolerance:g}" if fact.ratio else f"± {fact.tolerance:g}"


def _text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
