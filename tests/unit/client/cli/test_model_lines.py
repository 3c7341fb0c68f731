"""One line says of the champion how good it is known to be, and of drift what is known: also that too little is."""

from __future__ import annotations

import pytest
from rich.console import Console

from pretrade.admin.v1 import admin_pb2
from pretrade.client.cli.model_lines import champion_line, drift_line


def shown(line: str) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(line)
    return captured.get().strip()


def drift(rows: int, *features: admin_pb2.FeatureDrift) -> admin_pb2.DriftStatus:
    return admin_pb2.DriftStatus(model_version="41c0cf4400112233", rows=rows, features=features)


QUIET = admin_pb2.FeatureDrift(name="spread_bps", psi=0.01, limit=0.2)
MOVED = admin_pb2.FeatureDrift(name="ret_1s_bps", psi=0.91, limit=0.2, drifted=True)
FEW = admin_pb2.FeatureDrift(name="rv_30s_bps", psi=0.3)
AGE = admin_pb2.FeatureDrift(name="book_age_ms", psi=6.17, not_judged="holds the time to the server")


def test_too_few_values_are_not_called_none() -> None:
    assert shown(drift_line(drift(23, FEW, AGE))) == "drift: too few to say: 23 inputs of model 41c0cf44"
    assert shown(drift_line(drift(1, FEW))) == "drift: too few to say: 1 input of model 41c0cf44"


def test_no_drift_is_said_of_what_was_judged() -> None:
    assert shown(drift_line(drift(2_000, QUIET, AGE))) == "drift: none in 2,000 inputs of model 41c0cf44"
    some = shown(drift_line(drift(500, QUIET, FEW, AGE)))
    assert some == "drift: none in 500 inputs of model 41c0cf44, 1 of 2 features: too few to say"


def test_what_drifted_is_named_with_its_limit() -> None:
    text = shown(drift_line(drift(2_000, QUIET, MOVED, FEW, AGE)))
    assert text == "drift in 2,000 inputs of model 41c0cf44: ret_1s_bps 0.91 (limit 0.20)"


def test_without_a_comparison_it_says_why() -> None:
    assert shown(drift_line(admin_pb2.DriftStatus(problem="not [compared] yet"))) == "drift: not [compared] yet"


def test_the_champion_is_named_with_what_its_card_says_and_where_that_is() -> None:
    champion = admin_pb2.ChampionStatus(
        model_version="41c0cf4400112233", standing="does not beat the rules", card="/m/[c].md"
    )
    assert shown(champion_line(champion)) == "champion 41c0cf44: does not beat the rules; card: /m/[c].md"
    champion = admin_pb2.ChampionStatus(model_version="41c0cf4400112233", standing="no card says how good it is")
    assert shown(champion_line(champion)) == "champion 41c0cf44: no card says how good it is"


@pytest.mark.parametrize(
    ("days", "said"),
    [
        (12.34, "expires in 12.3 days"),
        (0.5, "expires in 0.5 days"),
        (-2, "expired 2.0 days ago: its answers are ABSTAIN"),
    ],
)
def test_the_champion_is_named_with_how_long_it_may_still_decide(days: float, said: str) -> None:
    champion = admin_pb2.ChampionStatus(model_version="41c0cf4400112233", standing="beats all")
    champion.expires_in.FromSeconds(round(days * 86_400))
    assert shown(champion_line(champion)) == f"champion 41c0cf44: beats all; {said}"
