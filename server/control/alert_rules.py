"""Alert rules that users set by `AdminService`: conditions on decisions and features, which Prometheus evaluates.

The server keeps the rules, as a part of the control state, and writes them as a rules file. It never evaluates one: a
rule asks for metrics that the servers export, so that an alert outlives the server that it is about.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from feature_cache.features import MF1

MOST_RULES: Final = 100
_NAME: Final = r"^[a-z][a-z0-9-]{0,47}$"
_TEXT: Final = r"^[ -~]{0,64}$"
_SAID: Final = {
    _NAME: "must be 1 to 48 lower-case letters, digits and hyphens, and begin with a letter",
    _TEXT: "must be at most 64 characters of ASCII",
}
_RUNBOOK: Final = "docs/alerts.md#rules-of-your-own"


class AlertRule(BaseModel):
    """A condition, and how it is told. Exactly one of `action` and `feature` is set, and one of `above` and `below`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=_NAME)]
    """In lower case, so that it is never that of a rule of ours."""
    action: Literal["", "TRADE", "NO_TRADE", "ABSTAIN"] = ""
    """Whose share of decisions is looked at."""
    strategy: Annotated[str, Field(pattern=_TEXT)] = ""
    """Whose decisions; empty for all."""
    window_seconds: Annotated[int, Field(ge=60, le=86_400)] = 300
    """Over which the share is taken."""
    feature: str = ""
    """Whose value is looked at."""
    instrument: Annotated[str, Field(pattern=_TEXT)] = ""
    """Of which instrument; empty for each."""
    above: Annotated[float, Field(allow_inf_nan=False)] | None = None
    below: Annotated[float, Field(allow_inf_nan=False)] | None = None
    for_seconds: Annotated[int, Field(ge=0, le=86_400)] = 0
    """How long the condition has to hold."""
    cooldown_seconds: Annotated[int, Field(ge=0, le=604_800)] = 0
    """How long the alert goes on after the condition has ended, so that one that comes and goes is told once."""
    severity: Literal["page", "ticket"] = "ticket"

    @model_validator(mode="after")
    def _is_one_condition(self) -> AlertRule:
        if bool(self.action) == bool(self.feature):
            raise ValueError("condition: must be either the share of an action or the value of a feature")
        if (self.above is None) == (self.below is None):
            raise ValueError("threshold: must be either above or below a value")
        if self.feature and self.feature not in MF1.index:
            raise ValueError(f"feature: must be one of {', '.join(MF1.names)}")
        if self.action and not 0 <= self.threshold <= 1:
            raise ValueError("threshold: must be from 0 to 1 for a share")
        if self.feature and self.strategy:
            raise ValueError("strategy: belongs to a condition on decisions")
        if self.action and self.instrument:
            raise ValueError("instrument: belongs to a condition on a feature")
        return self

    @property
    def threshold(self) -> float:
        """What is crossed."""
        return self.above if self.above is not None else self.below or 0.0

    def __str__(self) -> str:
        return f"{self.name}: {self._what()} {self._crosses()} ({self.severity})"

    def _what(self) -> str:
        if self.feature:
            return f"{self.feature} of {self.instrument or 'any instrument'}"
        return f"{self.action} share of {f'strategy {self.strategy}' if self.strategy else 'all strategies'}"

    def _crosses(self) -> str:
        lasting = f" for {self.for_seconds} s" if self.for_seconds else ""
        return f"{'above' if self.above is not None else 'below'} {self.threshold:g}{lasting}"

    def as_prometheus(self) -> dict[str, Any]:
        """The rule as Prometheus has it."""
        crosses = f"{'>' if self.above is not None else '<'} {self.threshold!r}"
        what = self._what().replace("{{", '{{ "{{" }}')  # a strategy may be called like the beginning of a template
        if self.feature and not self.instrument:
            what = what.replace("any instrument", "{{ $labels.instrument }}")
        summary = f'{what} is {{{{ printf "%.3g" $value }}}}: {self._crosses()}'
        return {
            "alert": self.name,
            "expr": f"{self._expression()} {crosses}",
            "for": f"{self.for_seconds}s",
            "keep_firing_for": f"{self.cooldown_seconds}s",
            "labels": {"severity": self.severity, "rule": "user"},
            "annotations": {"summary": summary, "runbook_url": _RUNBOOK},
        }

    def _expression(self) -> str:
        if self.feature:
            instrument = f"instrument={json.dumps(self.instrument)}" if self.instrument else ""
            of = ", ".join(filter(None, (f'feature="{self.feature}"', instrument)))
            # Servers differ by moments: the one that is furthest beyond the threshold counts.
            worst = "max" if self.above is not None else "min"
            return f"{worst} by (region, instrument) (pretrade_feature_value{{{of}}})"
        every = f"strategy={json.dumps(self.strategy)}" if self.strategy else ""
        chosen = ", ".join(filter(None, (every, f'action="{self.action}"')))
        counted = "sum by (region) (increase(pretrade_strategy_decisions_total{{{}}}[{}s]))"
        return f"{counted.format(chosen, self.window_seconds)} / {counted.format(every, self.window_seconds)}"


AlertRules = tuple[AlertRule, ...]
_RULES: Final = TypeAdapter(Annotated[AlertRules, Field(max_length=MOST_RULES)])


def read_rule(parts: dict[str, Any]) -> AlertRule:
    """A rule of these parts.

    Raises:
        ValueError: It breaks a rule, which the message names with its field.
    """
    try:
        return AlertRule.model_validate(parts)
    except ValidationError as error:
        raise ValueError(_first(error)) from None


def read_rules(text: str) -> AlertRules:
    """Rules as the control state has them: a JSON list, or an empty text.

    Raises:
        ValueError: They break a rule, which the message names.
    """
    try:
        return _RULES.validate_json(text) if text else ()
    except ValidationError as error:
        raise ValueError(_first(error)) from None


def write_rules(rules: Iterable[AlertRule]) -> str:
    """Rules as the control state has them; empty for none."""
    listed = tuple(rules)
    return _RULES.dump_json(listed, exclude_defaults=True).decode() if listed else ""


def rules_file(rules: Iterable[AlertRule]) -> str:
    """The file for Prometheus: JSON, which is YAML."""
    groups = [{"name": "pretrade-user", "interval": "15s", "rules": [one.as_prometheus() for one in rules]}]
    return f"{json.dumps({'groups': groups}, indent=2)}\n"


class UserAlerts:
    """The rules in force in this process, and what they need to be exported."""

    def __init__(self) -> None:
        self.rules: AlertRules = ()
        """In force, in the order of their names."""

    def set(self, rules: AlertRules) -> None:
        """Goes by these rules from now on."""
        self.rules = tuple(sorted(rules, key=lambda one: one.name))

    @property
    def strategies(self) -> frozenset[str]:
        """The strategies that a rule names."""
        return frozenset(one.strategy for one in self.rules if one.strategy)

    @property
    def features(self) -> tuple[str, ...]:
        """The features that a rule names."""
        return tuple(sorted({one.feature for one in self.rules if one.feature}))


def _first(error: ValidationError) -> str:
    """What is wrong first: the field and the rule."""
    first = error.errors(include_url=False, include_input=False)[0]
    said = _SAID.get(str(first.get("ctx", {}).get("pattern")), first["msg"].removeprefix("Value error, "))
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {said}" if where else said
