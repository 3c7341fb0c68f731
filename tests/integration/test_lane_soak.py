"""The Envoy edge with its lane under floods, resets, slow messages and drains: nothing is left of them."""

from __future__ import annotations

import itertools
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import psutil
import pytest
from support import flood
from support.decision_server import free_in_allocator
from support.flood import Flood
from support.harness import eventually
from support.server_group import Callers, Group, order, server_group
from support.wire import Caller, framed, leave_at_any_moment

from pretrade.decision.v1 import decision_pb2 as pb
from server.envoy import lane

pytestmark = [pytest.mark.stack, pytest.mark.long]

PROCESSES: Final = 2
"""One after the other: each is drained while it is asked."""
CYCLES: Final = 6
RATES: Final = (None, 5_000.0, 20_000.0)
"""Calls a second of the floods of a cycle; None: a closed loop."""
FLOOD_SECONDS: Final = 1.5
MEMORY_GROWTH_BYTES: Final = 10 * 1024 * 1024
"""Between the first half of the cycles and the last: some 200,000 calls, so a leak of 50 bytes a call fails. Less may
be arenas of Python's allocator that the highest of the floods so far has left."""
MESSAGE: Final = pb.DecideRequest(order=order()).SerializeToString()


@dataclass(frozen=True, slots=True)
class Held:
    """What the process that decides holds when nobody asks it."""

    memory_bytes: int
    files: int
    tasks: int

    @classmethod
    def by(cls, group: Group, place: int) -> Self:
        (pid,) = group.pids()
        process = psutil.Process(pid)
        used = process.memory_info().rss - free_in_allocator(process)
        return cls(used, process.num_fds(), int(group.metric("pretrade_event_loop_tasks", place=place)))


def slow_messages(address: str) -> None:
    """Calls whose messages are so slow to come that they leave the lane, and one that never comes."""
    message = framed(MESSAGE)
    with Caller(address) as caller:
        streams = [caller.begin() for _ in range(20)]
        caller.flush()
        caller.read(lambda: False, 0.05)
        for stream in streams[1:]:
            caller.send(stream, message, end=True)
        caller.read(lambda: all(caller.replies[stream].ended for stream in streams), 5.0)
        assert all(caller.replies[stream].ended for stream in streams)


def wait_until_idle(group: Group, place: int) -> None:
    """Waits until no call is under way and every row is shipped."""
    names = ("pretrade_in_flight", "pretrade_replies_owed", "pretrade_shipper_unshipped")
    eventually(lambda: [group.metric(name, place=place) for name in names], lambda counts: not any(counts))


@pytest.mark.skipif(bool(lane.missing()), reason="there is no lane here")
def test_floods_resets_slow_messages_and_drains_leave_nothing_behind(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    with server_group(tmp_path, 1, PRETRADE_GRPC__EDGE="envoy", PRETRADE_GRPC__READ_SECONDS="0.5") as group:
        for _ in range(PROCESSES):
            (place,), held = group.processes(), []
            for _ in range(CYCLES):
                for rate in RATES:
                    flood.run(Flood(group.decision, MESSAGE.hex(), FLOOD_SECONDS, 100, rate=rate))
                    leave_at_any_moment(group.decision, itertools.repeat(framed(MESSAGE)), chance)
                    slow_messages(group.decision)
                wait_until_idle(group, place)
                held.append(Held.by(group, place))
            first, last = held[: CYCLES // 2], held[CYCLES // 2 :]
            print(f"seed {seed}: {[round(one.memory_bytes / 2**20, 1) for one in held]} MiB, {held[-1]}")
            grown = statistics.median(one.memory_bytes for one in last) - statistics.median(
                one.memory_bytes for one in first
            )
            assert grown < MEMORY_GROWTH_BYTES
            assert held[-1].files <= max(one.files for one in first) + 4
            assert held[-1].tasks <= max(one.tasks for one in first) + 4
            assert group.metric("pretrade_lane_calls_total", place=place, answered_by="lane") > 1_000 * CYCLES
            with Callers(group.decision) as callers:
                callers.wait_for_more(100)
                group.replace()
                callers.wait_for_more(100)
            assert not callers.errors
            # One that still drains would send the next flood away.
            eventually(group.pids, lambda pids: len(pids) == 1)
