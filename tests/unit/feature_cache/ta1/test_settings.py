from __future__ import annotations

import pytest
from pydantic import SecretStr, ValidationError

from feature_cache.ta1.settings import Ta1Settings


def test_the_star_stands_for_all_instruments_that_are_not_named_but_not_for_the_partner_itself() -> None:
    settings = Ta1Settings(partners={"ETHUSDT.SIM": "SOLUSDT.SIM", "*": "BTCUSDT.SIM"})
    assert settings.partner_of("ETHUSDT.SIM") == "SOLUSDT.SIM"
    assert settings.partner_of("XRPUSDT.SIM") == "BTCUSDT.SIM"
    assert settings.partner_of("BTCUSDT.SIM") is None
    assert Ta1Settings().partner_of("ETHUSDT.SIM") is None


@pytest.mark.parametrize(
    ("partners", "rule"),
    [
        ({"ETHUSDT": "BTCUSDT.SIM"}, r"'ETHUSDT' must be SYMBOL\.VENUE"),
        ({"ETHUSDT.SIM": "BTC"}, r"partner of ETHUSDT\.SIM, 'BTC', must be SYMBOL\.VENUE"),
        ({"ETHUSDT.SIM": "ETHUSDT.SIM"}, "cannot be its own partner"),
    ],
)
def test_a_partner_that_makes_no_sense_is_refused(partners: dict[str, str], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        Ta1Settings(partners=partners)


def test_the_database_of_bars_must_be_one_that_is_supported() -> None:
    assert Ta1Settings(bars_database_url=SecretStr("sqlite:///bars.db")).bars_database_url is not None
    with pytest.raises(ValidationError, match="must begin with sqlite://"):
        Ta1Settings(bars_database_url=SecretStr("mysql://x/y"))
