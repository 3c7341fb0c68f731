"""What the control state can change, and which part of the server applies it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, get_args

from fallback.chain import StageName
from server.inference.breaker import Mode

if TYPE_CHECKING:
    from fallback.chain import Chain
    from server.inference.breaker import Breaker
    from server.inference.replica import Replica

CHAIN: Final = "chain"
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
    """The subject of a replica's breaker."""
    return f"breaker/{replica}"


def drain_subject(replica: str) -> str:
    """The subject of a replica's being drained."""
    return f"drain/{replica}"


def one_of(*values: str) -> Callable[[str], str]:
    """A check for a few values."""
    return lambda value: "" if value in values else f"must be one of {', '.join(values)}"


def breaker_subjects(breakers: Mapping[str, Breaker]) -> dict[str, Subject]:
    """The mode of each replica's breaker, as subjects."""

    def subject(breaker: Breaker) -> Subject:
        modes = one_of(*(mode.value for mode in Mode))
        return Subject(Mode.AUTOMATIC.value, modes, lambda value, seconds: breaker.force(Mode(value), seconds))

    return {breaker_subject(name): subject(breaker) for name, breaker in breakers.items()}


def drain_subjects(replicas: Mapping[str, Replica]) -> dict[str, Subject]:
    """Whether each replica is drained."""

    def subject(replica: Replica) -> Subject:
        def apply(value: str, _seconds: float | None) -> None:
            replica.drained = value == ON

        return Subject(OFF, one_of(ON, OFF), apply)

    return {drain_subject(name): subject(replica) for name, replica in replicas.items()}


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
