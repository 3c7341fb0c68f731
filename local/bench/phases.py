"""What `pretrade bench` measures, in phases: each has a stack of its own, with the servers that it compares.

The embedded broker keeps its log in memory and slows with it, and a server that idles beside the others takes some of
their cores. Phases keep both small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from loadtest.benchmark.targets import EMBEDDED, EMBEDDED_OS, ENVOY, GRPC_AIO
from loadtest.generators.load import LARGE_BATCH, METHODS, Load, Plan

ECHO_ENVOY: Final = "echo Envoy"
ECHO_GRPC_AIO: Final = "echo grpc.aio"
TORCHSERVE: Final = "TorchServe"
FASTAPI: Final = "FastAPI"
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
    seconds = seconds or (0.6 if quick else _SECONDS)
    cost_seconds = min(_COST_SECONDS, (5.0 if quick else 10.0) * seconds)

    def plan(closed: Sequence[Load], opened: Sequence[Load] = ()) -> Plan:
        return Plan(
            closed,
            opened,
            rounds=rounds or (1 if quick else _ROUNDS),
            seconds=seconds,
            open_seconds=2.5 * seconds,
            deadline_seconds=deadline_seconds,
        )

    every = (ENVOY, EMBEDDED, EMBEDDED_OS, ECHO_ENVOY, TORCHSERVE, FASTAPI)
    compared = tuple(name for name in every if name != EMBEDDED_OS)  # its journal matters to a lone caller
    one_by_one = [Load("unary", callers=1, servers=every)]
    numbers = (64, 256) if quick else (16, 64, 256)
    one_by_one += [Load("unary", callers=number, servers=compared) for number in numbers]
    batches = [Load("batch", callers=4, servers=compared), Load("batch", 4, orders=LARGE_BATCH, servers=compared)]
    streams = [Load("stream", callers=4, servers=compared)]
    rates = [
        Load("unary", rate=1_000, servers=(ENVOY,)),
        Load("unary", rate=2_000, servers=(ENVOY,)),
        Load("unary", rate=5_000, servers=(EMBEDDED,)),
    ]
    portable = [Load("unary", callers=64, servers=(GRPC_AIO, ECHO_GRPC_AIO))]
    measured = (ENVOY, EMBEDDED)
    if quick:
        closed = [*one_by_one, *batches, *streams, *portable]
        return [Phase("all", (*every, GRPC_AIO, ECHO_GRPC_AIO), plan(closed, rates), measured, cost_seconds)]
    batches.insert(0, Load("batch", callers=1, servers=compared))
    streams.insert(0, Load("stream", callers=1, servers=compared))
    shares = [Load(method, share=0.5) for method in METHODS]
    portable.insert(0, Load("unary", callers=1))
    portable += [Load("unary", callers=256), Load("batch", callers=4), Load("stream", callers=4)]
    return [
        Phase("one by one", every, plan(one_by_one)),
        Phase("batches and streams", compared, plan([*batches, *streams])),
        Phase("at a rate, and CPU", measured, plan([], [*rates, *shares]), measured, cost_seconds),
        Phase("the portable edge", (GRPC_AIO, ECHO_GRPC_AIO), plan(portable, shares)),
    ]
