"""The edge of `AdminService`: on-call's view of this server and hands on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration

from feature_cache.codec import BookState
from feature_cache.l1 import FeatureCache
from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.admin.v1 import admin_pb2_grpc
from server.audit.journal import Journal
from server.control.state import FLAGS, ControlState, UnknownFlagError
from server.health import Health
from server.inference.breaker import Mode, State
from server.inference.replica import Replica
from server.metrics import DecisionMetrics

_Context = grpc.aio.ServicerContext[object, object]

_LONGEST_SECONDS = 7 * 86_400
_STATES = {
    State.CLOSED: pb.BREAKER_STATE_CLOSED,
    State.OPEN: pb.BREAKER_STATE_OPEN,
    State.HALF_OPEN: pb.BREAKER_STATE_HALF_OPEN,
}
_MODES = {
    pb.BREAKER_MODE_AUTOMATIC: Mode.AUTOMATIC,
    pb.BREAKER_MODE_FORCED_OPEN: Mode.FORCED_OPEN,
    pb.BREAKER_MODE_FORCED_CLOSED: Mode.FORCED_CLOSED,
    pb.BREAKER_MODE_METRICS_ONLY: Mode.METRICS_ONLY,
}
_MODE_MESSAGES = {mode: message for message, mode in _MODES.items()}
_ROLES = {
    "primary": pb.REPLICA_ROLE_PRIMARY,
    "secondary": pb.REPLICA_ROLE_SECONDARY,
    "challenger": pb.REPLICA_ROLE_CHALLENGER,
}


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Serves `AdminService`."""

    def __init__(
        self,
        *,
        instance_id: str,
        control: ControlState,
        replicas: tuple[Replica, ...],
        journal: Journal,
        unshipped: Callable[[], int],
        feature_cache: FeatureCache,
        instruments: tuple[str, ...],
        max_feature_age_seconds: float,
        health: Health,
        metrics: DecisionMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._instance_id = instance_id
        self._control = control
        self._replicas = {replica.name: replica for replica in replicas}
        self._journal = journal
        self._unshipped = unshipped
        self._feature_cache = feature_cache
        self._instruments = instruments
        self._max_feature_age_seconds = max_feature_age_seconds
        self._health = health
        self._metrics = metrics
        self._clock = clock
        self._started = clock()

    async def GetStatus(self, request: pb.GetStatusRequest, context: _Context) -> pb.GetStatusResponse:
        """Everything on one page."""
        return pb.GetStatusResponse(
            instance_id=self._instance_id,
            ready=self._health.ready,
            trading_state=self._control.trading_state,
            replicas=[_replica_status(replica) for replica in self._replicas.values()],
            flags=[self._control.flag(name) for name in FLAGS],
            features=[self._feature_status(instrument) for instrument in self._instruments],
            audit=pb.AuditStatus(
                writable=not self._journal.problem,
                written=self._journal.written,
                unshipped=self._unshipped(),
                last_error=self._journal.problem,
            ),
            sources=[
                pb.SourceCount(source=source, decisions=count) for source, count in self._metrics.by_source().items()
            ],
            components=[
                pb.ComponentHealth(name=name, healthy=not problem, detail=problem)
                for name, problem in self._health.problems().items()
            ],
            uptime=_duration(self._clock() - self._started),
        )

    async def SetBreaker(self, request: pb.SetBreakerRequest, context: _Context) -> pb.SetBreakerResponse:
        """Forces a breaker, or hands it back."""
        await _require_author(request.author, request.reason, context)
        replica = self._replicas.get(request.replica)
        if replica is None:
            await _abort(context, grpc.StatusCode.NOT_FOUND, f"replica: one of {', '.join(self._replicas)}")
        mode = _MODES.get(request.mode)
        if mode is None:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "mode: must be one of the breaker modes")
        expires_in = None
        if request.HasField("expires_in"):
            expires_in = request.expires_in.seconds + request.expires_in.nanos / 1e9
            if not 0 < expires_in <= _LONGEST_SECONDS:
                await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "expires_in: must be > 0 and at most 7 days")
        previous = replica.breaker.mode
        replica.breaker.force(mode, expires_in)
        value = mode.value if expires_in is None else f"{mode.value} for {expires_in:g} s"
        await self._control.record(f"breaker/{replica.name}", previous.value, value, request.author, request.reason)
        return pb.SetBreakerResponse(replica=_replica_status(replica))

    async def ListFlags(self, request: pb.ListFlagsRequest, context: _Context) -> pb.ListFlagsResponse:
        """Every flag."""
        return pb.ListFlagsResponse(
            flags=[self._control.flag(name) for name in FLAGS], trading_state=self._control.trading_state
        )

    async def SetFlag(self, request: pb.SetFlagRequest, context: _Context) -> pb.SetFlagResponse:
        """Sets one flag."""
        await _require_author(request.author, request.reason, context)
        try:
            flag = await self._control.set_flag(request.name, request.enabled, request.author, request.reason)
        except UnknownFlagError:
            await _abort(context, grpc.StatusCode.NOT_FOUND, f"name: one of {', '.join(FLAGS)}")
        return pb.SetFlagResponse(flag=flag)

    async def SetTradingState(
        self, request: pb.SetTradingStateRequest, context: _Context
    ) -> pb.SetTradingStateResponse:
        """Sets the trading state."""
        await _require_author(request.author, request.reason, context)
        if request.state not in (pb.TRADING_STATE_ACTIVE, pb.TRADING_STATE_REDUCING, pb.TRADING_STATE_HALTED):
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "state: must be ACTIVE, REDUCING or HALTED")
        previous = await self._control.set_trading_state(request.state, request.author, request.reason)
        return pb.SetTradingStateResponse(previous=previous, state=self._control.trading_state)

    def _feature_status(self, instrument: str) -> pb.FeatureStatus:
        entry = self._feature_cache.get(instrument)
        if entry is None:
            return pb.FeatureStatus(instrument=instrument, problem="no features")
        age = entry.age_seconds(self._clock())
        problem = ""
        if entry.snapshot.state is BookState.UNKNOWN:
            problem = "book unknown"
        elif age > self._max_feature_age_seconds:
            problem = "stale"
        return pb.FeatureStatus(
            instrument=instrument,
            usable=not problem,
            problem=problem,
            age=_duration(age),
            sequence=entry.snapshot.sequence,
        )


def _replica_status(replica: Replica) -> pb.ReplicaStatus:
    return pb.ReplicaStatus(
        name=replica.name,
        role=_ROLES[replica.name],
        endpoint=replica.endpoint,
        breaker_state=_STATES[replica.breaker.state],
        breaker_mode=_MODE_MESSAGES[replica.breaker.mode],
        healthy=replica.healthy,
        model_version=replica.model.version if replica.model else "",
        in_flight=replica.batcher.in_flight,
        abandoned=replica.batcher.abandoned,
        queued=replica.batcher.queued,
        p50=_duration(replica.latency.p50),
        p95=_duration(replica.latency.p95),
        batches=replica.batcher.batches,
        rows=replica.batcher.rows,
        shed=replica.batcher.shed,
        outcomes={outcome.value: count for outcome, count in replica.outcomes.items()},
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration


async def _require_author(author: str, reason: str, context: _Context) -> None:
    """Every change says who and why."""
    if not 0 < len(author) <= 64:
        await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "author: must be 1 to 64 characters")
    if not 0 < len(reason) <= 256:
        await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "reason: must be 1 to 256 characters")


async def _abort(context: _Context, code: grpc.StatusCode, message: str) -> NoReturn:
    await context.abort(code, message)
