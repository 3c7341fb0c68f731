"""The rules that choose an order's model."""

from __future__ import annotations

import pytest
from support.cases import new_case

from server.inference.model_map import MapRule, ModelMap, fits, read_rules, write_rules
from server.inference.model_names import DEFAULT, qualified


def mapped(*rules: tuple[str, str, str]) -> ModelMap:
    model_map = ModelMap()
    model_map.set(tuple(MapRule(instrument=one, strategy=two, model=name) for one, two, name in rules))
    return model_map


def test_the_first_rule_that_fits_holds_and_an_order_that_none_fits_goes_to_the_default_model() -> None:
    model_map = mapped(("BTC*", "sweep-?", "scalper"), ("*", "sweep-?", "slow"), ("ETHUSDT.BINANCE", "*", "eth"))
    assert model_map.of_order("BTCUSDT.BINANCE", "sweep-1") == "scalper"
    assert model_map.of_order("ETHUSDT.BINANCE", "sweep-1") == "slow"
    assert model_map.of_order("ETHUSDT.BINANCE", "twap") == "eth"
    assert model_map.of_order("BTCUSDT.BINANCE", "sweep-10") == DEFAULT
    assert model_map.of_order("btcusdt.binance", "twap") == DEFAULT
    assert ModelMap().of_order("BTCUSDT.BINANCE", "twap") == DEFAULT


def test_the_models_that_get_orders_are_those_of_the_rules_up_to_one_that_fits_every_order() -> None:
    assert ModelMap().reached == {DEFAULT}
    model_map = mapped(("BTC*", "*", "scalper"), ("*", "s*", "slow"))
    assert model_map.reached == {"scalper", "slow", DEFAULT}
    model_map.set(mapped(("BTC*", "*", "scalper"), ("**", "*", "slow"), ("*", "s*", "eth")).rules)
    assert model_map.reached == {"scalper", "slow"}
    model_map.set(mapped(("BTC*", "s*", "scalper"), ("BTC*", "s*", "slow")).rules)
    assert model_map.reached == {"scalper", DEFAULT}, "no order comes past the same patterns"
    model_map.set(())
    assert model_map.reached == {DEFAULT}


def test_an_order_keeps_its_model_whatever_becomes_of_the_map() -> None:
    model_map, case = mapped(("*", "*", "scalper")), new_case()
    assert model_map.of(case) == "scalper"
    model_map.set(())
    assert model_map.of(case) == "scalper"
    assert model_map.of(new_case()) == DEFAULT


def test_orders_that_come_together_are_shared_out_to_their_models_in_their_sequence() -> None:
    model_map = mapped(("*", "s*", "scalper"))
    orders = [new_case(strategy=one).order for one in ("a", "s1", "b", "s2", "s1")]
    assert model_map.groups(orders) == {DEFAULT: [0, 2], "scalper": [1, 3, 4]}


def test_a_pattern_stands_for_whole_texts_and_none_for_all() -> None:
    assert fits("BTC*", "BTCUSDT.SIM")
    assert not fits("BTC", "BTCUSDT.SIM")
    assert fits("[EB]*.SIM", "ETHUSDT.SIM")
    assert fits("", "anything")


def test_rules_are_read_as_they_were_written() -> None:
    rules = mapped(("BTC*", "*", "scalper"), ("*", "a=b:c", "default")).rules
    assert read_rules(write_rules(rules)) == rules
    assert read_rules("") == ()
    assert write_rules(()) == ""


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{}", "rules: Input should be a valid array"),
        ('[{"model": "Scalper"}]', "rules.0.model: String should match"),
        ('[{"instrument": "", "model": "scalper"}]', "rules.0.instrument: must be a pattern of 1 to 64 characters"),
        ('[{"strategy": "x"}]', "rules.0.model: Field required"),
        ('[{"model": "scalper", "venue": "X"}]', "rules.0.venue: Extra inputs"),
        ("[" + ",".join(['{"model": "scalper"}'] * 101) + "]", "rules: Tuple should have at most 100 items"),
    ],
)
def test_what_is_no_map_is_refused_with_the_rule_that_it_breaks(text: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule.replace(".", r"\.")):
        read_rules(text)


def test_a_models_replicas_bear_its_name_unless_it_is_the_default_one() -> None:
    assert qualified("default", "primary-2") == "primary-2"
    assert qualified("scalper", "primary-2") == "scalper/primary-2"
