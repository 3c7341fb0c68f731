"""The edge of `AdminService`: on-call's view of this server and hands on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration

from feature_cache.codec import BookState
from feature_cache.features import VERSION
from feature_cache.l1 import FeatureCache
from feature_cache.report import InstrumentReport, ReportReader
from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.admin.v1 import admin_pb2_grpc
from server.admission import Admission
from server.audit.journal import Journal
from server.control.state import FLAGS, ControlChangedError, ControlState, UnknownFlagError
from server.health import Health
from server.inference.breaker import Mode, State
from server.inference.replica import Replica
from server.metrics import DecisionMetrics
from server.security.identity import CALLER, MAX_NAME, author
from server.slot import Slot

_Context = grpc.aio.ServicerContext[object, object]

_LONGEST_SECONDS = 7 * 86_400
_OTHERS_SECONDS = 0.5
"""How long another process may take to say how it is."""
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
_BOOKS = {
    BookState.UNKNOWN: pb.BOOK_STATE_UNKNOWN,
    BookState.VALID: pb.BOOK_STATE_VALID,
    BookState.LOCKED: pb.BOOK_STATE_LOCKED,
}
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
        reports: ReportReader,
        instruments: tuple[str, ...],
        max_feature_age_seconds: float,
        health: Health,
        metrics: DecisionMetrics,
        admission: Admission,
        slot: Slot | None,
        clock: Callable[[], float],
    ) -> None:
        self._instance_id = instance_id
        self._control = control
        self._replicas = {replica.name: replica for replica in replicas}
        self._journal = journal
        self._unshipped = unshipped
        self._feature_cache = feature_cache
        self._reports = reports
        self._instruments = instruments
        self._max_feature_age_seconds = max_feature_age_seconds
        self._health = health
        self._metrics = metrics
        self._admission = admission
        self._slot = slot
        self._clock = clock
        self._started = clock()

    async def GetStatus(self, request: pb.GetStatusRequest, context: _Context) -> pb.GetStatusResponse:
        """Everything on one page."""
        reports = {} if request.this_process_only else await self._reports.read(self._instruments)
        return pb.GetStatusResponse(
            instance_id=self._instance_id,
            ready=self._health.ready,
            trading_state=self._control.trading_state,
            replicas=[_replica_status(replica) for replica in self._replicas.values()],
            flags=[self._control.flag(name) for name in FLAGS],
            features=[self._feature_status(instrument, reports.get(instrument)) for instrument in self._instruments],
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
            control_version=self._control.version,
            processes=await self._processes(request.this_process_only),
            process_count=1 if self._slot is None else self._slot.processes,
        )

    async def _processes(self, this_one_only: bool) -> list[pb.ProcessStatus]:
        """This process, and what the others of the server say of themselves."""
        slot = self._slot
        this = pb.ProcessStatus(
            index=0 if slot is None else slot.index,
            instance_id=self._instance_id,
            answered=True,
            ready=self._health.ready,
            uptime=_duration(self._clock() - self._started),
            decisions=sum(self._metrics.by_source().values()),
            in_flight=self._admission.in_flight,
            unshipped=self._unshipped(),
            restarts=0 if slot is None else slot.restarts,
            control_version=self._control.version,
        )
        if this_one_only or slot is None:
            return [this]
        others = [index for index in range(slot.processes + 1) if index != slot.index]
        answers = await asyncio.gather(*(_ask(slot.admin_address(index), index) for index in others))
        return sorted((this, *filter(None, answers)), key=lambda process: process.index)

    async def SetBreaker(self, request: pb.SetBreakerRequest, context: _Context) -> pb.SetBreakerResponse:
        """Forces a breaker, or hands it back."""
        await _require_author(author(request.author), request.reason, context)
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
        try:
            await self._control.force_breaker(
                replica.name, mode, expires_in, author(request.author), request.reason, _expected_version(request)
            )
        except ControlChangedError as error:
            await _abort(context, grpc.StatusCode.ABORTED, str(error))
        return pb.SetBreakerResponse(replica=_replica_status(replica))

    async def ListFlags(self, request: pb.ListFlagsRequest, context: _Context) -> pb.ListFlagsResponse:
        """Every flag."""
        return pb.ListFlagsResponse(
            flags=[self._control.flag(name) for name in FLAGS],
            trading_state=self._control.trading_state,
            control_version=self._control.version,
        )

    async def SetFlag(self, request: pb.SetFlagRequest, context: _Context) -> pb.SetFlagResponse:
        """Sets one flag."""
        await _require_author(author(request.author), request.reason, context)
        try:
            flag = await self._control.set_flag(
                request.name, request.enabled, author(request.author), request.reason, _expected_version(request)
            )
        except ControlChangedError as error:
            await _abort(context, grpc.StatusCode.ABORTED, str(error))
        except UnknownFlagError:
            await _abort(context, grpc.StatusCode.NOT_FOUND, f"name: one of {', '.join(FLAGS)}")
        return pb.SetFlagResponse(flag=flag)

    async def SetTradingState(
        self, request: pb.SetTradingStateRequest, context: _Context
    ) -> pb.SetTradingStateResponse:
        """Sets the trading state."""
        await _require_author(author(request.author), request.reason, context)
        if request.state not in (pb.TRADING_STATE_ACTIVE, pb.TRADING_STATE_REDUCING, pb.TRADING_STATE_HALTED):
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "state: must be ACTIVE, REDUCING or HALTED")
        try:
            previous = await self._control.set_trading_state(
                request.state, author(request.author), request.reason, _expected_version(request)
            )
        except ControlChangedError as error:
            await _abort(context, grpc.StatusCode.ABORTED, str(error))
        return pb.SetTradingStateResponse(previous=previous, state=self._control.trading_state)

    def _feature_status(self, instrument: str, report: InstrumentReport | None) -> pb.FeatureStatus:
        status = pb.FeatureStatus(instrument=instrument)
        if report is not None:
            status.book = _BOOKS[report.state]
            status.book_reason = report.unknown_because
            status.vector_version = report.vector_version
            status.worker = report.worker
            status.book_losses = report.losses
            if report.lag_records is not None:
                status.lag_records = report.lag_records
        entry = self._feature_cache.get(instrument)
        if entry is None:
            status.problem = "no features"
            return status
        # The vector's own state is newer than the report.
        status.book = _BOOKS[entry.snapshot.state]
        status.vector_version = VERSION  # every vector of another version is refused
        status.sequence = entry.snapshot.sequence
        age = entry.age_seconds(self._clock())
        status.age.CopyFrom(_duration(age))
        if entry.snapshot.state is BookState.UNKNOWN:
            status.problem = "book unknown"
        else:
            status.book_reason = ""
            if age > self._max_feature_age_seconds:
                status.problem = "stale"
        status.usable = not status.problem
        return status


async def _ask(address: str, index: int) -> pb.ProcessStatus | None:
    """What the process in a place says of itself; None when there is none."""
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            status = await admin_pb2_grpc.AdminServiceStub(channel).GetStatus(
                pb.GetStatusRequest(this_process_only=True), timeout=_OTHERS_SECONDS
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return None
            return pb.ProcessStatus(index=index, problem=f"{error.code().name}: {error.details()}")
    answer = status.processes[0]
    answer.answered = False
    return answer


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


def _expected_version(request: pb.SetBreakerRequest | pb.SetFlagRequest | pb.SetTradingStateRequest) -> int | None:
    return request.expected_control_version if request.HasField("expected_control_version") else None


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration


async def _require_author(who: str, reason: str, context: _Context) -> None:
    """Every change says who and why; who is known is not asked."""
    if not 0 < len(who) <= (64 if CALLER.get() is None else MAX_NAME):
        await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "author: must be 1 to 64 characters")
    if not 0 < len(reason) <= 256:
        await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "reason: must be 1 to 256 characters")


async def _abort(context: _Context, code: grpc.StatusCode, message: str) -> NoReturn:
    await context.abort(code, message)
