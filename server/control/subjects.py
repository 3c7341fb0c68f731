"""What the control state can change, and which part of the server applies it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, get_args

from fallback.chain import StageName
from server.control import alert_rules
from server.inference.breaker import Mode
from server.inference.model_map import read_rules

if TYPE_CHECKING:
    from fallback.chain import Chain
    from server.control.alert_rules import UserAlerts
    from server.inference.model_map import ModelMap
    from server.inference.pool import Role
    from server.inference.replica import Replica

CHAIN: Final = "chain"
ALERT_RULES: Final = "alert_rules"
"""Its value is a JSON list of rules; empty for none."""
MODEL_MAP: Final = "model_map"
"""Its value is a JSON list of rules; empty for none."""
ON, OFF = "on", "off"
STAGES: Final[tuple[StageName, ...]] = get_args(StageName)


@dataclass(frozen=True, slots=True)
class Subject:
    """Something that can be set to a value."""

    default: str
    """Value while no other is set."""
    check: Callable[[str], str]
    """What is wrong with a value, naming the rule; empty when it may be set."""
    apply: Callable[[str, float | None], None]
    """Applies a value, for this many seconds or until another value comes."""
    words: Callable[[str], str] = str
    """A value for people."""


def flag_subject(name: str) -> str:
    """The subject of a flag."""
    return f"flag/{name}"


def breaker_subject(replica: str) -> str:
    """The subject of a replica's breaker, or of those of a role."""
    return f"breaker/{replica}"


def drain_subject(replica: str) -> str:
    """The subject of being drained, of a replica or a role."""
    return f"drain/{replica}"


def one_of(*values: str) -> Callable[[str], str]:
    """A check for a few values."""
    return lambda value: "" if value in values else f"must be one of {', '.join(values)}"


def breaker_subjects(roles: Iterable[Role]) -> dict[str, Subject]:
    """The mode of each endpoint's breaker, as subjects; and of all breakers of a role that has several.

    An endpoint's own mode comes first; where that is automatic, the mode of its role holds.
    """
    subjects: dict[str, Subject] = {}
    modes = one_of(*(mode.value for mode in Mode))

    def add(name: str, apply: Callable[[Mode, float | None], None]) -> None:
        subjects[breaker_subject(name)] = Subject(
            Mode.AUTOMATIC.value, modes, lambda value, seconds: apply(Mode(value), seconds)
        )

    for role in roles:
        together = _Together(role)
        for name in role.names:
            add(name, partial(together.force_one, name))
        if role.several:
            add(role.name, together.force_all)
        role.on_join(together.force_new)
    return subjects


def drain_subjects(roles: Iterable[Role]) -> dict[str, Subject]:
    """Whether each endpoint is drained, and whether all of a role that has several are."""
    subjects: dict[str, Subject] = {}

    def add(name: str, apply: Callable[[bool], None]) -> None:
        subjects[drain_subject(name)] = Subject(OFF, one_of(ON, OFF), lambda value, _seconds: apply(value == ON))

    for role in roles:
        together = _Together(role)
        for name in role.names:
            add(name, partial(together.drain_one, name))
        if role.several:
            add(role.name, together.drain_all)
        role.on_join(together.drain_new)
    return subjects


class _Together:
    """What was said of the endpoints of one role, of each by its name and of all together."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self._mode = Mode.AUTOMATIC
        self._modes: dict[str, Mode] = {}
        self._drained = False
        self._drains: set[str] = set()

    def force_one(self, name: str, mode: Mode, seconds: float | None) -> None:
        self._modes[name] = mode
        if mode is Mode.AUTOMATIC:
            mode, seconds = self._mode, None  # the role's own end comes with another value
        for replica in self._role.replicas:
            if replica.name == name:
                replica.breaker.force(mode, seconds)

    def force_all(self, mode: Mode, seconds: float | None) -> None:
        self._mode = mode
        for replica in self._role.replicas:
            if self._modes.get(replica.name, Mode.AUTOMATIC) is Mode.AUTOMATIC:
                replica.breaker.force(mode, seconds)

    def force_new(self, replica: Replica) -> None:
        """What holds for an endpoint that joins; its end comes with another value."""
        mode = self._modes.get(replica.name, Mode.AUTOMATIC)
        replica.breaker.force(self._mode if mode is Mode.AUTOMATIC else mode)

    def drain_one(self, name: str, drained: bool) -> None:
        (self._drains.add if drained else self._drains.discard)(name)
        for replica in self._role.replicas:
            self.drain_new(replica)

    def drain_all(self, drained: bool) -> None:
        self._drained = drained
        for replica in self._role.replicas:
            self.drain_new(replica)

    def drain_new(self, replica: Replica) -> None:
        """What holds for an endpoint that joins."""
        replica.drained = self._drained or replica.name in self._drains


def chain_subjects(chain: Chain, default: tuple[StageName, ...]) -> dict[str, Subject]:
    """Which stages may answer, in which order: names with commas between."""

    def check(value: str) -> str:
        names = value.split(",")
        if set(names) <= set(STAGES) and len(set(names)) == len(names):
            return ""
        return f"must be some of {', '.join(STAGES)}, each at most once"

    def apply(value: str, _seconds: float | None) -> None:
        names = value.split(",")
        chain.ask_in_order(tuple(sorted((stage for stage in STAGES if stage in names), key=names.index)))

    return {CHAIN: Subject(",".join(default), check, apply)}


def model_map_subjects(model_map: ModelMap) -> dict[str, Subject]:
    """Which named model decides which orders.

    A model that this server does not have is no mistake here: other servers may have it, and the map is one for all.
    """

    def check(value: str) -> str:
        try:
            read_rules(value)
        except ValueError as error:
            return str(error)
        return ""

    def in_words(value: str) -> str:
        return "; ".join(map(str, read_rules(value))) or "the default model for every order"

    return {MODEL_MAP: Subject("", check, lambda value, _seconds: model_map.set(read_rules(value)), in_words)}


def alert_rule_subjects(alerts: UserAlerts) -> dict[str, Subject]:
    """The alert rules that users set."""

    def check(value: str) -> str:
        try:
            alert_rules.read_rules(value)
        except ValueError as error:
            return str(error)
        return ""

    def in_words(value: str) -> str:
        return "; ".join(map(str, alert_rules.read_rules(value))) or "none"

    return {
        ALERT_RULES: Subject("", check, lambda value, _seconds: alerts.set(alert_rules.read_rules(value)), in_words)
    }
