"""Which named model decides which orders: rules of patterns over instrument and strategy, the first that fits holds.

A rule has a pattern for the instrument and one for the strategy, as a shell has them for file names: `*` stands for any
text, `?` for one character, `[ab]` for one of several; upper and lower case differ. An order that no rule fits is
decided by the model `default`, which is that of the settings' section `replicas`.

What a rule names is known by every server that shares the control state, or not: one without that model asks no other
in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import translate
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from server.inference.model_names import DEFAULT

if TYPE_CHECKING:
    from fallback.order import Case, Order

RESERVED: Final = frozenset((DEFAULT, "champion", "challenger", "previous", "candidate"))
"""No names for other models: the registry keeps their aliases beside those of the default one."""
ModelName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
"""What a model is called in settings, commands and the audit."""
Pattern = Annotated[str, Field(pattern=r"^[!-~]{1,64}$")]
PATTERN_RULE: Final = "must be a pattern of 1 to 64 characters of ASCII without a space; `?` stands for any other"
MOST_RULES: Final = 100
"""What an instrument and strategy that come for the first time may cost: some 0.1 ms."""
_MOST_CHOSEN: Final = 10_000
"""Pairs of instrument and strategy whose model is remembered: callers may make up strategies."""


class MapRule(BaseModel):
    """Names the model of the orders that it fits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    instrument: Pattern = "*"
    strategy: Pattern = "*"
    model: ModelName

    def __str__(self) -> str:
        return f"{self.instrument} {self.strategy} → {self.model}"

    def hides(self, later: MapRule) -> bool:
        """Whether no order comes past this rule to a later one: its patterns are the same, or stand for every text."""
        return _is_as_wide(self.instrument, later.instrument) and _is_as_wide(self.strategy, later.strategy)


Rules = tuple[MapRule, ...]
_RULES: Final = TypeAdapter(Annotated[Rules, Field(max_length=MOST_RULES)])


def read_rules(rules: str | list[dict[str, str]]) -> Rules:
    """Rules from what the control state has, a JSON list or an empty text, or from their parts.

    Raises:
        ValueError: They break a rule, which the message names.
    """
    try:
        if isinstance(rules, str):
            return _RULES.validate_json(rules) if rules else ()
        return _RULES.validate_python(rules)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        said = PATTERN_RULE if first["loc"][-1:] in (("instrument",), ("strategy",)) else first["msg"]
        raise ValueError(f"rules{f'.{where}' if where else ''}: {said}") from None


def write_rules(rules: Iterable[MapRule]) -> str:
    """Rules as the control state has them; empty for none."""
    listed = tuple(rules)
    return _RULES.dump_json(listed).decode() if listed else ""


class ModelMap:
    """Chooses the model of an order. An order keeps its model until it is decided, whatever becomes of the map."""

    def __init__(self) -> None:
        self.rules: Rules = ()
        """In force."""
        self.reached: frozenset[str] = _reached(())
        """Models that these rules can give an order to."""
        self._choose = _chooser(())

    def set(self, rules: Rules) -> None:
        """Goes by these rules from the next order on."""
        self.rules = rules
        self.reached = _reached(rules)
        self._choose = _chooser(rules)

    def of(self, case: Case) -> str:
        """The name of an order's model; written into the case when it is first asked for."""
        name = case.model
        if not name:
            order = case.order
            name = case.model = self._choose(order.instrument, order.strategy)
        return name

    def groups(self, orders: Iterable[Order]) -> dict[str, list[int]]:
        """The places of some orders, by the names of their models."""
        choose, found = self._choose, dict[str, list[int]]()
        for place, order in enumerate(orders):
            found.setdefault(choose(order.instrument, order.strategy), []).append(place)
        return found

    def of_order(self, instrument: str, strategy: str) -> str:
        """The same for orders that there are none of yet."""
        return self._choose(instrument, strategy)


def _is_as_wide(pattern: str, other: str) -> bool:
    return pattern == other or not pattern.strip("*")


def _reached(rules: Sequence[MapRule]) -> frozenset[str]:
    """The models of the rules, and the default one, that no earlier rule hides."""
    every = (*rules, MapRule(model=DEFAULT))
    return frozenset(
        rule.model for place, rule in enumerate(every) if not any(one.hides(rule) for one in every[:place])
    )


def _chooser(rules: Sequence[MapRule]) -> Callable[[str, str], str]:
    compiled = [(_compiled(rule.instrument), _compiled(rule.strategy), rule.model) for rule in rules]

    @lru_cache(_MOST_CHOSEN)
    def choose(instrument: str, strategy: str) -> str:
        for fits_instrument, fits_strategy, model in compiled:
            if fits_instrument(instrument) and fits_strategy(strategy):
                return model
        return DEFAULT

    return choose


def fits(pattern: str, text: str) -> bool:
    """Whether a pattern stands for a text; an empty one stands for every text."""
    return not pattern or bool(_compiled(pattern)(text))


@lru_cache(2 * MOST_RULES)
def _compiled(pattern: str) -> Callable[[str], object]:
    return re.compile(translate(pattern)).match
