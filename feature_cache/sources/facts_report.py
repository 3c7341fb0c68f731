"""The table of `pretrade market-facts`, and the tapes that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from feature_cache.sources.market_facts import FACTS, RECORDED, Fact, Tape, facts, medians, tape
from feature_cache.sources.session import read_session, session_files
from feature_cache.sources.simulator import INSTRUMENTS, simulate


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


def table(sessions: Sequence[Tape], recorded: Tape | None) -> Table:
    """A row for each statistic, with the recorded figure, that of `recorded`, and the simulated ones."""
    shown = Table(title=f"Simulated sessions against {RECORDED}", title_justify="left")
    headers = ["statistic", "recorded", *(["here"] if recorded else []), "simulated", "lowest", "highest"]
    for header in [*headers, "tolerance", ""]:
        shown.add_column(header, justify="left" if header == "statistic" else "right", no_wrap=header == "statistic")
    here = None if recorded is None else facts(recorded)
    found = [facts(session) for session in sessions]
    middle = medians(found)
    for fact in FACTS:
        values = [each[fact.name] for each in found]
        computed = [] if here is None else [_text(here[fact.name])]
        shown.add_row(
            fact.name,
            _text(fact.recorded),
            *computed,
            *map(_text, (middle[fact.name], min(values), max(values))),
            _tolerance(fact),
            "met" if fact.met(middle[fact.name]) else "[red]missed[/]",
        )
    return shown


def verdict(sessions: Sequence[Tape]) -> str:
    """How many of the statistics are met, for people."""
    middle = medians([facts(session) for session in sessions])
    met = sum(fact.met(middle[fact.name]) for fact in FACTS)
    return f"{met} of {len(FACTS)} met by the median of {len(sessions)} sessions"


def _tolerance(fact: Fact) -> str:
    return f"× or ÷ {fact.tolerance:g}" if fact.ratio else f"± {fact.tolerance:g}"


def _text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
