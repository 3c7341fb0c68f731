"""Callers of `Decide` whose calls come by Envoy's lane in bursts, for the benchmark of the decision path.

Envoy's worker runs in the thread of the event loop; the CPU that it takes there is counted apart. In Envoy it has a
thread of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from server.envoy.asgi import GrpcApplication
from server.envoy.lane import Lane

if TYPE_CHECKING:
    from local.bench.fake_envoy import Burst, FakeEnvoy
    from server.decision.metrics import DecisionMetrics
    from server.rpc.decision import DecisionServicer

_MOST_BYTES: Final = 1 << 20
_READ_SECONDS: Final = 5.0


class LaneCallers:
    """Envoy with the lane, and those who call.

    One burst comes in a turn of uvloop, which looks for what the worker has for the lane at the end of each turn.

    Args:
        envoy: The Envoy of this process.
        servicer: Decides.
        metrics: Counts the calls.
        seconds: That a caller waits.
    """

    def __init__(self, envoy: FakeEnvoy, servicer: DecisionServicer, metrics: DecisionMetrics, seconds: int) -> None:
        self._seconds = seconds
        self._envoy = envoy
        clock = time.monotonic
        application = GrpcApplication(_MOST_BYTES, _READ_SECONDS, servicer, metrics, clock, time.time)
        self._lane = Lane(application, servicer, _MOST_BYTES, True, metrics, clock, envoy.filter)
        self._coming: deque[tuple[Burst, int, asyncio.Future[None]]] = deque()
        self._under_way: list[tuple[Burst, asyncio.Future[None]]] = []
        self.worker_seconds = 0.0
        """CPU of the worker so far."""
        self._loop = asyncio.get_running_loop()
        self._looking = [asyncio.create_task(each) for each in (application.run(), self._lane.run())]
        self._lane.open()
        self._loop.add_reader(envoy.wake, self._run)

    def close(self) -> None:
        """Ends what it does; calls that are under way are given up."""
        for each in self._looking:
            each.cancel()
        self._loop.remove_reader(self._envoy.filter.open_lane())
        self._lane.close()
        self._loop.remove_reader(self._envoy.wake)
        for burst, _ in self._under_way:
            burst.forget()
        self._envoy.run()
        self._envoy.filter.take()

    def burst(self, bodies: Sequence[bytes]) -> Burst:
        """Calls with these bodies, which come together."""
        return self._envoy.burst(bodies, grpc_timeout=f"{self._seconds}S")

    async def ask(self, burst: Burst, size: int) -> None:
        """Has so many calls come, and waits until all of them have ended."""
        over = self._loop.create_future()
        self._coming.append((burst, size, over))
        if len(self._coming) == 1:
            self._loop.call_soon(self._begin)
        await over

    def _begin(self) -> None:
        started = time.thread_time()
        burst, size, over = self._coming.popleft()
        if over.cancelled():
            pass
        elif burst.begin() == size:
            self._under_way.append((burst, over))
        else:
            over.set_exception(AssertionError("the lane does not take a call"))
        if self._coming:
            self._loop.call_soon(self._begin)
        self.worker_seconds += time.thread_time() - started

    def _run(self) -> None:
        started = time.thread_time()
        self._envoy.run()
        left = []
        for burst, over in self._under_way:
            if burst.left:
                left.append((burst, over))
            elif not over.done():
                over.set_result(None)
        self._under_way = left
        self.worker_seconds += time.thread_time() - started
