"""What `pretrade decide` says of an order that it cannot send."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner, Result

from pretrade.client.cli.main import app


def decide(*words: str) -> Result:
    return CliRunner().invoke(app, ["decide", *words, "--target", "127.0.0.1:9"], env={"COLUMNS": "200"})


@pytest.mark.parametrize("quantity", ["-0.05", "-1", "-.5"])
def test_a_negative_quantity_is_called_that_and_no_option(quantity: str) -> None:
    found = decide("BTCUSDT.SIM", "buy", quantity)
    assert found.exit_code == 2
    assert f"{quantity} is negative: a quantity is a positive number" in found.output
    assert "No such option" not in found.output


def test_an_option_may_have_a_negative_value_and_a_misspelt_one_is_still_one() -> None:
    assert decide("BTCUSDT.SIM", "buy", "0.05", "--limit", "-1").exit_code == 3
    misspelt = decide("BTCUSDT.SIM", "buy", "0.05", "--limt", "5")
    assert (misspelt.exit_code, "No such option" in misspelt.output) == (2, True)
