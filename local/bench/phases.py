"""What `pretrade bench` measures, in phases: each has a stack of its own, with the servers that it compares.

The embedded broker keeps its log in memory and slows with it, and a server that idles beside the others takes some of
their cores. Phases keep both small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from loadtest.benchmark.targets import EMBEDDED, EMBEDDED_OS, ENVOY, GRPC_AIO
from loadtest.generators.load import LARGE_BATCH, METHODS, Load, Method, Plan

ECHO_ENVOY: Final = "echo Envoy"
ECHO_GRPC_AIO: Final = "echo grpc.aio"
TORCHSERVE: Final = "TorchServe"
FASTAPI: Final = "FastAPI"
BEFORE: Final = {ENVOY: "Envoy before", EMBEDDED: "embedded before"}
"""The servers of an older commit, by those of today that they are held against."""
_ROUNDS: Final = 5
_SECONDS: Final = 0.8
_COST_SECONDS: Final = 8.0


@dataclass(frozen=True, slots=True)
class Phase:
    """Some servers beside each other, and what they are loaded with."""

    name: str
    servers: Sequence[str]
    plan: Plan
    costs: Sequence[str] = ()
    """The servers whose CPU is shown by process and thread."""
    cost_seconds: float = _COST_SECONDS
    """For how long that is watched, under 64 callers."""


def phases(*, quick: bool, rounds: int | None, seconds: float | None, deadline_seconds: float) -> list[Phase]:
    """All of them in less than ten minutes, or the gist in one phase of less than two.

    Args:
        quick: Whether to be short.
        rounds: Of each loop.
        seconds: Of a closed loop in one round, on one server. An open one takes two and a half times as long.
        deadline_seconds: Of each order, where the generator sets one.
    """
    lengths = _Lengths(quick, rounds, seconds, deadline_seconds)
    every = (ENVOY, EMBEDDED, EMBEDDED_OS, ECHO_ENVOY, TORCHSERVE, FASTAPI)
    compared = tuple(name for name in every if name != EMBEDDED_OS)  # its journal matters to a lone caller
    one_by_one = [Load("unary", callers=1, servers=every), *_callers(compared, quick=quick)]
    batches, streams = _batches(compared, quick=quick), _streams(compared, quick=quick)
    rates = _rates((ENVOY,), (EMBEDDED,))
    portable = [Load("unary", callers=64, servers=(GRPC_AIO, ECHO_GRPC_AIO))]
    measured = (ENVOY, EMBEDDED)
    if quick:
        closed = [*one_by_one, *batches, *streams, *portable]
        servers = (*every, GRPC_AIO, ECHO_GRPC_AIO)
        return [Phase("all", servers, lengths.plan(closed, rates), measured, lengths.cost_seconds)]
    shares = [Load(method, share=0.5) for method in METHODS]
    portable.insert(0, Load("unary", callers=1))
    portable += [Load("unary", callers=256), Load("batch", callers=4), Load("stream", callers=4)]
    return [
        Phase("one by one", every, lengths.plan(one_by_one)),
        Phase("batches and streams", compared, lengths.plan([*batches, *streams])),
        Phase("at a rate, and CPU", measured, lengths.plan([], [*rates, *shares]), measured, lengths.cost_seconds),
        Phase("the portable edge", (GRPC_AIO, ECHO_GRPC_AIO), lengths.plan(portable, shares)),
    ]


def phases_against(*, quick: bool, rounds: int | None, seconds: float | None, deadline_seconds: float) -> list[Phase]:
    """What an older commit is held against: its servers, those of today and the echo, in the same rounds.

    The arguments are those of `phases`.
    """
    lengths = _Lengths(quick, rounds, seconds, deadline_seconds)
    measured = (ENVOY, BEFORE[ENVOY], EMBEDDED, BEFORE[EMBEDDED])
    every = (*measured, ECHO_ENVOY)
    closed = [Load("unary", callers=1, servers=every), *_callers(every, quick=quick)]
    closed += [*_batches(every, quick=quick), *_streams(every, quick=quick)]
    rates = _rates((ENVOY, BEFORE[ENVOY]), (EMBEDDED, BEFORE[EMBEDDED]))
    if quick:
        return [Phase("old and new", every, lengths.plan(closed, rates), measured, lengths.cost_seconds)]
    return [
        Phase("old and new", every, lengths.plan(closed)),
        Phase("old and new at a rate, and CPU", measured, lengths.plan([], rates), measured, lengths.cost_seconds),
    ]


@dataclass(frozen=True, slots=True)
class _Lengths:
    """How long everything is to be; see `phases`."""

    quick: bool
    rounds: int | None
    asked_seconds: float | None
    deadline_seconds: float

    @property
    def seconds(self) -> float:
        return self.asked_seconds or (0.6 if self.quick else _SECONDS)

    @property
    def cost_seconds(self) -> float:
        return min(_COST_SECONDS, (5.0 if self.quick else 10.0) * self.seconds)

    def plan(self, closed: Sequence[Load], opened: Sequence[Load] = ()) -> Plan:
        return Plan(
            closed,
            opened,
            rounds=self.rounds or (1 if self.quick else _ROUNDS),
            seconds=self.seconds,
            open_seconds=2.5 * self.seconds,
            deadline_seconds=self.deadline_seconds,
        )


def _callers(servers: Sequence[str], *, quick: bool) -> list[Load]:
    return [Load("unary", callers=number, servers=tuple(servers)) for number in ((64, 256) if quick else (16, 64, 256))]


def _batches(servers: Sequence[str], *, quick: bool) -> list[Load]:
    large = Load("batch", 4, orders=LARGE_BATCH, servers=tuple(servers))
    return [*_of_four("batch", servers, quick=quick), large]


def _streams(servers: Sequence[str], *, quick: bool) -> list[Load]:
    return _of_four("stream", servers, quick=quick)


def _of_four(method: Method, servers: Sequence[str], *, quick: bool) -> list[Load]:
    return [Load(method, callers=number, servers=tuple(servers)) for number in ((4,) if quick else (1, 4))]


def _rates(usual: tuple[str, ...], embedded: tuple[str, ...]) -> list[Load]:
    return [
        Load("unary", rate=1_000, servers=usual),
        Load("unary", rate=2_000, servers=usual),
        Load("unary", rate=5_000, servers=embedded),
    ]
