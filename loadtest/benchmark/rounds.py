"""One round: one load on one server, by the generator that suits both.

h2load makes the closed loops, where it is installed and the server's own counts are known. The counts are needed
because h2load takes gRPC errors for successes. `http2.py` makes the open loops of calls. Callers on a gRPC library make
all streams at a rate, and everything on a server that cannot be looked into: its credentials are theirs to show.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Final

import uvloop

from loadtest.benchmark.figures import Round, percentiles_ms
from loadtest.generators import h2load, http2
from loadtest.generators.channel import connected
from loadtest.generators.closed_loop import call_decide, call_decide_batch, call_decide_stream
from loadtest.generators.load import ORDERS, Call, Load, Server, Usage
from loadtest.generators.measurement import Measurement
from loadtest.generators.open_loop import offer
from pretrade.decision.v1 import decision_pb2 as pb

_BY_MODEL: Final = ("PRIMARY", "SECONDARY", "EMBEDDED", "CANARY")


def closed_loop(
    server: Server, load: Load, orders: Sequence[pb.Order], *, seconds: float, deadline_seconds: float
) -> Round:
    """So many calls under way at once.

    Args:
        server: Called.
        load: How.
        orders: For callers in Python; h2load sends the server's `calls`.
        seconds: How long.
        deadline_seconds: Of each call, for callers in Python.

    Raises:
        RuntimeError: The generator failed, or got no answer.
    """
    before, own = _used(server), generator_seconds()
    if before is None or not h2load.is_installed():
        measured = uvloop.run(_call(server, load, orders, seconds, deadline_seconds))
        return _by_callers(server, load, measured, before, generator_seconds() - own)
    call = server.calls[load.call]
    run = h2load.call(server.address, call, load.callers, seconds)
    own, after = generator_seconds() - own, _used(server)
    assert after is not None
    errors = run.failed * call.orders + without_decision(call, run, before, after)
    decisions = max(0, run.answers * call.orders - errors)
    return Round(
        seconds=run.seconds,
        decisions=decisions,
        errors=errors,
        latencies_ms=percentiles_ms(run.latencies),
        cpu_us=_per_decision(after.cpu_seconds - before.cpu_seconds, decisions),
        scored=_scored(before, after),
        generator_cpu_us=_per_decision(own, decisions),
    )


def open_loop(
    server: Server, load: Load, orders: Sequence[pb.Order], *, rate: float, seconds: float, deadline_seconds: float
) -> Round:
    """A fixed rate of orders a second, whatever happens to earlier ones.

    Args:
        server: Called.
        load: How.
        orders: Taken in turn.
        rate: Orders a second.
        seconds: How long.
        deadline_seconds: Of each call, or order of a stream.

    Raises:
        RuntimeError: The generator failed, or got no answer.
    """
    before, own = _used(server), generator_seconds()
    counted = 1.0
    if before is None or load.method == "stream":
        measured = uvloop.run(_offer(server, load, orders, rate, seconds, deadline_seconds))
    else:
        call = server.calls[load.call]
        measured = http2.offer(server.address, call, rate=rate, seconds=seconds, deadline_seconds=deadline_seconds)
        # Its warm-up is not among the decisions, but cost both as much.
        counted = seconds / (seconds + http2.WARM_UP_SECONDS)
    return _by_callers(server, load, measured, before, generator_seconds() - own, counted)


def generator_seconds() -> float:
    """CPU of this process and of the generators that have ended."""
    return sum(sum(resource.getrusage(whose)[:2]) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def without_decision(call: Call, run: h2load.Run, before: Usage, after: Usage) -> int:
    """Orders whose call h2load took for a success, and that got no decision.

    For our servers they follow from the server's own counts: refused orders, or decisions that are missing, since Envoy
    refuses calls that the server never sees. For other servers they follow from the bytes that are missing from answers
    of a known length.
    """
    if before.decisions is not None and after.decisions is not None:
        refused = (after.refused or 0.0) - (before.refused or 0.0)
        missing = run.answers * call.orders - (after.decisions - before.decisions)
        return round(max(refused, missing, 0.0))
    if call.answer_bytes:
        return max(0, run.answers - run.data_bytes // call.answer_bytes) * call.orders
    return 0


async def _call(
    server: Server, load: Load, orders: Sequence[pb.Order], seconds: float, deadline_seconds: float
) -> Measurement:
    callers = {"unary": call_decide, "stream": call_decide_stream, "batch": call_decide_batch}[load.method]
    # Callers in Python share one stream, which has as many orders under way.
    number = load.callers * (ORDERS["stream"] if load.method == "stream" else 1)
    async with connected(server.address) as stub:
        return await callers(stub, orders, callers=number, seconds=seconds, deadline_seconds=deadline_seconds)


async def _offer(
    server: Server, load: Load, orders: Sequence[pb.Order], rate: float, seconds: float, deadline_seconds: float
) -> Measurement:
    async with connected(server.address) as stub:
        return await offer(stub, load.method, orders, rate=rate, seconds=seconds, deadline_seconds=deadline_seconds)


def _by_callers(
    server: Server, load: Load, measured: Measurement, before: Usage | None, own: float, counted: float = 1.0
) -> Round:
    """What callers that see every status found."""
    after = _used(server)
    if not measured.decisions:
        raise RuntimeError(f"{load.name}: {server.name} gave only {dict(measured.errors)}")
    scored = sum(measured.sources[name] for name in _BY_MODEL) / measured.decisions if measured.sources else None
    cpu = scored_by_count = None
    if before is not None and after is not None:
        cpu = _per_decision(counted * (after.cpu_seconds - before.cpu_seconds), measured.decisions)
        scored_by_count = _scored(before, after)
    return Round(
        seconds=measured.seconds,
        decisions=measured.decisions,
        errors=sum(measured.errors.values()),
        latencies_ms=percentiles_ms(measured.latencies),
        cpu_us=cpu,
        scored=scored_by_count if scored_by_count is not None else scored,
        generator_cpu_us=_per_decision(counted * own, measured.decisions),
        statuses=measured.errors,
    )


def _used(server: Server) -> Usage | None:
    return server.usage() if server.usage is not None else None


def _per_decision(seconds: float, decisions: int) -> float | None:
    return 1e6 * seconds / decisions if decisions else None


def _scored(before: Usage, after: Usage) -> float | None:
    if before.decisions is None or after.decisions is None or before.scored is None or after.scored is None:
        return None
    decisions = after.decisions - before.decisions
    return (after.scored - before.scored) / decisions if decisions else None
