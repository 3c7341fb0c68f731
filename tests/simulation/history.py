"""What callers and operators did and heard, and what the transport took: the history that the checks go by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import grpc

from pretrade.decision.v1 import decision_pb2 as pb


@dataclass(slots=True, eq=False)
class Asked:
    """One order as its caller saw it."""

    ref: str
    caller: str
    server: str
    kind: str
    """`unary`, `batch` or `stream`."""
    order: pb.Order
    sent_at: float
    deadline: float | None
    """Instant after which the caller listens no more; None for ever."""
    heard_at: float | None = None
    """When it heard a decision or an error of this order's own."""
    decision: pb.Decision | None = None
    error: str = ""
    """Status of the call or reason of the order's error; empty with a decision, or when nothing was heard."""


@dataclass(slots=True, eq=False)
class Handed:
    """A decision that a server handed to the transport."""

    at: float
    decision_id: str
    server: str


@dataclass(slots=True, eq=False)
class Operation:
    """A change that an operator asked for."""

    reason: str
    """Its own: no other change has it."""
    server: str
    subject: str
    value: str
    asked_at: float
    request: Any = None
    ended_at: float | None = None
    change: Any = None
    """The answer, when it was acknowledged."""
    code: grpc.StatusCode | None = None
    """The status otherwise."""
    details: str = ""

    @property
    def acknowledged(self) -> bool:
        """True when the operator was told that it is made."""
        return self.change is not None

    @property
    def refused(self) -> bool:
        """True when the operator was told that it is not made."""
        return self.code in _REFUSALS


_REFUSALS = frozenset(
    (
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.UNAUTHENTICATED,
    )
)


@dataclass(slots=True, eq=False)
class Watch:
    """What a watcher of a service's health heard."""

    server: str
    service: str
    began_at: float
    heard: list[tuple[float, bool]] = field(default_factory=list)
    """When, and whether it was SERVING."""
    ended_at: float = float("inf")


@dataclass(slots=True)
class Spell:
    """A time in which something held."""

    what: str
    began: float
    ended: float = float("inf")


@dataclass(slots=True)
class History:
    """Everything that was recorded."""

    asked: list[Asked] = field(default_factory=list)
    handed: list[Handed] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    watches: list[Watch] = field(default_factory=list)
    """Of those who read."""
    lives: dict[str, list[Spell]] = field(default_factory=dict)
    """When each server was serving."""
    control_states: list[tuple[float, str, str]] = field(default_factory=list)
    """Every control state that a disk kept: when, where, its JSON."""
    apart: dict[str, list[Spell]] = field(default_factory=dict)
    """When each server could not be sure of Redis."""
    clock_wrong_since: dict[str, float] = field(default_factory=dict)
    """When each server's wall clock first stepped. It may hold the vectors that come then to be of the future."""
    faults: list[tuple[float, str]] = field(default_factory=list)
    slow: list[tuple[int, Spell]] = field(default_factory=list)
    """When which endpoint of the primary's pool was slow."""
    down: list[tuple[int, Spell]] = field(default_factory=list)
    """When which of them did not answer."""
    stalled: list[Spell] = field(default_factory=list)
    """When an event loop stood still."""

    def was_apart(self, server: str, began: float, ended: float) -> bool:
        """Whether a server could not be sure of Redis at any time between two instants."""
        return any(spell.began <= ended and spell.ended >= began for spell in self.apart.get(server, ()))
