"""A server of which all is modelled but how it admits: it runs in virtual time, and says how many orders it decided.

Admission, the gate's limits and how a batch is taken up are the real ones. What decides is a core that takes so long
for a turn and for each order in it. A call that the gate refuses takes a little of the same core, and its caller asks
again at once.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Final, NamedTuple, cast

from fallback.order import Order
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.admission import Admission, AdmissionSettings
from server.decision.convert import OrderReader
from server.decision.metrics import DecisionMetrics
from server.decision.pending_slice import PendingSlice
from server.envoy.gate import CallLimits, UnderWay
from server.errors import DeadlineError, PretradeError
from server.rpc.call import Call
from server.rpc.call_context import CallContexts
from server.rpc.decision import DecisionServicer
from server.rpc.stream import StreamSettings
from support.virtual_time import VirtualTimeLoop

ALLOWED_SECONDS: Final = 0.2
_TURN_ORDERS: Final = 64
_TURN_SECONDS: Final = 2e-3
_ORDER_SECONDS: Final = 60e-6
_REFUSAL_SECONDS: Final = 35e-6
_ROUND_TRIP_SECONDS: Final = 2e-4
_LOOK_SECONDS: Final = 0.1
CAPACITY: Final = _TURN_ORDERS / (_TURN_SECONDS + _TURN_ORDERS * _ORDER_SECONDS)
"""Orders a second, if every turn has as many as it can."""
_INSTRUMENT: Final = "BTCUSDT.BINANCE"


class _Queued(NamedTuple):
    """An order that waits for the core."""

    arrived: float
    allowed: float
    """Seconds from then."""
    future: asyncio.Future[Any]


class ModelledServer:
    """One server and its callers.

    Args:
        loop: Has the time.
        settings: Of admission.
    """

    def __init__(self, loop: VirtualTimeLoop, settings: AdmissionSettings) -> None:
        self._loop = loop
        self.admission = Admission(settings, loop.time)
        self._limits = CallLimits(settings, self.admission)
        self._most = settings.max_in_flight
        self._calls: dict[Call, None] = {}
        self._queue: deque[_Queued] = deque()
        self._work = asyncio.Event()
        self._owed_seconds = 0.0
        self.slowness = 1.0
        """How many times as long everything takes."""
        self.decided_orders = self.refused_orders = 0
        """Orders."""
        unused: Any = None
        dataplane: Any = self
        access: Any = SimpleNamespace(charge=lambda _: None, check_strategy=lambda *_: None)
        reports: Any = SimpleNamespace(failed=lambda *_: None, traced=lambda context: context)
        orders = OrderReader((_INSTRUMENT,))
        self._servicer = DecisionServicer(
            dataplane,
            orders,
            DecisionMetrics(),
            StreamSettings(),
            CallContexts(),
            reports,
            unused,
            loop.time,
            access,
        )
        self._reader = orders

    async def run(self, callers: int, orders: int, seconds: float, deadline_seconds: float | None = None) -> float:
        """Has so many callers ask for so many orders at a time; orders decided a second."""
        decided, end = self.decided_orders, self._loop.time() + seconds
        helpers = [self._loop.create_task(work) for work in (self._decide(), self._steer())]
        asking = [self._loop.create_task(self._ask(orders, end, deadline_seconds)) for _ in range(callers)]
        await asyncio.gather(*asking)
        for helper in helpers:
            helper.cancel()
        return (self.decided_orders - decided) / seconds

    async def _ask(self, orders: int, end: float, deadline_seconds: float | None) -> None:
        one = pb.Order(instrument=_INSTRUMENT, side=pb.SIDE_BUY, quantity=1.0, strategy="test")
        wire = pb.DecideBatchRequest(orders=[one] * orders).SerializeToString()
        while (now := self._loop.time()) < end:
            await asyncio.sleep(_ROUND_TRIP_SECONDS)
            if len(self._calls) >= self._most:
                self.refused_orders += orders
                self._owed_seconds += _REFUSAL_SECONDS
                continue
            call = Call(None if deadline_seconds is None else now + deadline_seconds, ())
            self._calls[call] = None
            try:
                reply = await self._servicer.DecideBatch(self._reader.batch(wire), call)
            except PretradeError:
                self.refused_orders += orders
            else:
                results = pb.DecideBatchResponse.FromString(reply.wire).results
                decided = sum(result.HasField("decision") for result in results)
                self.decided_orders += decided
                self.refused_orders += orders - decided
            finally:
                del self._calls[call]

    async def _steer(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            weights = [call.orders for call in self._calls]
            batches = sum(weight > 1 for weight in weights)
            found = self._limits.update(UnderWay(len(weights), sum(weights), 0, batches))
            self._most = next(iter(found.values()))

    async def _decide(self) -> None:
        for _ in itertools.count():
            while not self._queue:
                self._work.clear()
                await self._work.wait()
            turn = [self._queue.popleft() for _ in range(min(_TURN_ORDERS, len(self._queue)))]
            owed, self._owed_seconds = self._owed_seconds, 0.0
            await asyncio.sleep(self.slowness * (owed + _TURN_SECONDS + len(turn) * _ORDER_SECONDS))
            self._end(turn)

    def _end(self, turn: Sequence[_Queued]) -> None:
        now = self._loop.time()
        for arrived, allowed, future in turn:
            if now - arrived < allowed:
                future.set_result(SimpleNamespace(wire=b"", order_ref=""))
                self.admission.answered([(now - arrived, allowed)])
            else:
                future.set_exception(DeadlineError("DEADLINE_EXCEEDED", "too late"))
                self.admission.dropped(allowed)
        self.admission.leave(len(turn))

    # What a servicer asks of a data plane.

    def has_places_at_once(self, orders: int) -> bool:
        """See `DataPlane`."""
        return self.admission.has_places_at_once(orders)

    def has_places(self, orders: int) -> bool:
        """See `DataPlane`, as for all that follow."""
        return self.admission.has_places(orders)

    async def places(self, orders: int, deadline: float | None, *, has_begun: bool) -> int:
        left = math.inf if deadline is None else deadline - self._loop.time()
        return await self.admission.places(orders, 0.5 * left, has_begun=has_begun)

    def unheard(self, _decided: object, _cause: str) -> None:
        pass

    def refused(self, orders: int) -> PretradeError:
        return self.admission.refused(orders)

    def begin_together(self, orders: Sequence[Order], arrived: float, deadline: float | None) -> PendingSlice | None:
        if not self.admission.admit_together(len(orders)):
            return None
        begun = PendingSlice(len(orders))
        begun.alone.update((place, cast(Any, self._enter(arrived, deadline))) for place in range(len(orders)))
        return begun

    def begin(self, order: Order, arrived: float, deadline: float | None, *, in_company: bool) -> asyncio.Future[Any]:
        assert in_company
        self.admission.admit(order.reduce_only)
        return self._enter(arrived, deadline)

    def _enter(self, arrived: float, deadline: float | None) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        allowed = ALLOWED_SECONDS if deadline is None else min(ALLOWED_SECONDS, deadline - arrived)
        self._queue.append(_Queued(arrived, allowed, future))
        self._work.set()
        return future
