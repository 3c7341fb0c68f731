"""The edge of `AdminService`: shows operators the state of this server and lets them change it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import grpc
import grpc.aio

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.admin.v1 import admin_pb2_grpc
from server.configuration import Configuration
from server.control.state import ControlState
from server.decision.admission import Admission
from server.decision.metrics import DecisionMetrics
from server.drift.watch import DriftWatch
from server.errors import InvalidChangeError
from server.inference.model_names import DEFAULT
from server.journal.journal import Journal
from server.process.health import Health
from server.process.slot import Slot
from server.rpc.alerts import AlertSteering
from server.rpc.call import Call
from server.rpc.feature_status import FeatureStatuses, MarketParts
from server.rpc.market import MarketReading
from server.rpc.models import ModelSteering
from server.rpc.signals import Signals
from server.rpc.steering import Steering, duration
from server.security import methods
from server.security.identity import known_name, longest_name

SERVICE: Final = pb.DESCRIPTOR.services_by_name["AdminService"].full_name
_OTHERS_SECONDS = 0.5
"""How long another process may take to say how it is."""
_MAX_AUTHOR: Final = 64
_MAX_REASON: Final = 256


@dataclass(frozen=True, slots=True)
class ServingParts:
    """The process that serves."""

    instance_id: str
    health: Health
    metrics: DecisionMetrics
    admission: Admission
    slot: Slot | None
    clock: Callable[[], float]


@dataclass(frozen=True, slots=True)
class RecordParts:
    """The audit, as far as administration asks for it."""

    changes: Callable[[bytes], Awaitable[bytes]]
    journal: Journal
    unshipped: Callable[[], int]
    drift: DriftWatch


class AdminServicer:
    """Serves `AdminService`."""

    def __init__(
        self,
        *,
        control: ControlState,
        configuration: Configuration[Any],
        steering: Steering,
        models: ModelSteering,
        alerts: AlertSteering,
        serving: ServingParts,
        market: MarketParts,
        records: RecordParts,
        signals: Signals,
        market_reading: MarketReading,
    ) -> None:
        self._instance_id = serving.instance_id
        self._control = control
        self._configuration = configuration
        self._steering = steering
        self._models = models
        self._alerts = alerts
        self._signals = signals
        self._market = market_reading
        self._features = FeatureStatuses(market, serving.clock)
        self._changes = records.changes
        self._journal = records.journal
        self._unshipped = records.unshipped
        self._drift = records.drift
        self._health = serving.health
        self._metrics = serving.metrics
        self._admission = serving.admission
        self._slot = serving.slot
        self._clock = serving.clock
        self._started = serving.clock()

    async def GetStatus(self, request: pb.GetStatusRequest, call: Call) -> pb.GetStatusResponse:
        """Everything on one page."""
        default = self._models.default
        features = await self._features.of_mf1(not request.this_process_only)
        return pb.GetStatusResponse(
            instance_id=self._instance_id,
            ready=self._health.ready,
            trading_state=self._control.trading_state,
            replicas=self._steering.replicas(),
            flags=self._steering.flags(),
            features=features,
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
            uptime=duration(self._clock() - self._started),
            control_version=self._control.version,
            processes=await self._processes(request.this_process_only),
            process_count=1 if self._slot is None else self._slot.processes,
            control=self._control.status(),
            chain_stages=self._steering.chain(),
            canary=default.canaries.current(),
            drift=self._drift.states[DEFAULT],
            embedded=pb.EmbeddedStatus(model_version=default.embedded.version, problem=default.embedded.problem),
            champion=await default.canaries.champion(),
            model_map=self._models.rules(),
            models=self._models.others(self._drift.states),
            feature_sets=list(self._features.of_sets()),
        )

    async def _processes(self, this_one_only: bool) -> list[pb.ProcessStatus]:
        """This process, and what the others of the server say of themselves."""
        slot = self._slot
        this = pb.ProcessStatus(
            index=0 if slot is None else slot.index,
            instance_id=self._instance_id,
            answered=True,
            ready=self._health.ready,
            uptime=duration(self._clock() - self._started),
            decisions=sum(self._metrics.by_source().values()),
            in_flight=self._admission.in_flight,
            unshipped=self._unshipped(),
            restarts=0 if slot is None else slot.restarts,
            control_version=self._control.version,
            control_stale=self._control.stale,
            config_hash=self._configuration.settings.config_hash(),
        )
        if this_one_only or slot is None:
            return [this]
        others = [index for index in range(slot.processes + 1) if index != slot.index]
        answers = await asyncio.gather(*(_ask(slot.admin_address(index), index) for index in others))
        return sorted((this, *filter(None, answers)), key=lambda process: process.index)

    async def GetCaller(self, request: pb.GetCallerRequest, call: Call) -> pb.GetCallerResponse:
        """Who asks, and what that caller may do."""
        caller = call.caller
        assert caller is not None, "the admin port always asks for credentials"
        return pb.GetCallerResponse(
            name=caller.name,
            states_author=caller.stands_for_others,
            roles=sorted(caller.grants.roles),
            methods=methods.allowed(caller.grants.roles),
        )

    async def GetControl(self, request: pb.GetControlRequest, call: Call) -> pb.GetControlResponse:
        """Every value that was set."""
        return self._steering.control()

    async def ListChanges(self, request: pb.ListChangesRequest, call: Call) -> pb.ListChangesResponse:
        """The on-call's history."""
        return pb.ListChangesResponse.FromString(await self._changes(request.SerializeToString()))

    async def ListReplicas(self, request: pb.ListReplicasRequest, call: Call) -> pb.ListReplicasResponse:
        """Every replica."""
        return self._steering.replica_list()

    async def DrainReplica(self, request: pb.DrainReplicaRequest, call: Call) -> pb.DrainReplicaResponse:
        """Sends a replica no more orders."""
        return await self._steering.drain(request, _author(request, call))

    async def ResumeReplica(self, request: pb.ResumeReplicaRequest, call: Call) -> pb.ResumeReplicaResponse:
        """Gives a replica its orders back."""
        return await self._steering.resume(request, _author(request, call))

    async def SetBreaker(self, request: pb.SetBreakerRequest, call: Call) -> pb.SetBreakerResponse:
        """Forces a breaker, or hands it back."""
        return await self._steering.set_breaker(request, _author(request, call))

    async def ListFlags(self, request: pb.ListFlagsRequest, call: Call) -> pb.ListFlagsResponse:
        """Every flag."""
        return self._steering.flag_list()

    async def SetFlag(self, request: pb.SetFlagRequest, call: Call) -> pb.SetFlagResponse:
        """Sets one flag."""
        return await self._steering.set_flag(request, _author(request, call))

    async def SetTradingState(self, request: pb.SetTradingStateRequest, call: Call) -> pb.SetTradingStateResponse:
        """Sets the trading state."""
        return await self._steering.set_trading_state(request, _author(request, call))

    async def SetChain(self, request: pb.SetChainRequest, call: Call) -> pb.SetChainResponse:
        """Sets who may answer, in which order."""
        return await self._steering.set_chain(request, _author(request, call))

    async def GetModelMap(self, request: pb.GetModelMapRequest, call: Call) -> pb.GetModelMapResponse:
        """Which model decides which orders."""
        return self._models.get()

    async def SetModelMap(self, request: pb.SetModelMapRequest, call: Call) -> pb.SetModelMapResponse:
        """Sets which model decides which orders."""
        return await self._models.set(request, _author(request, call))

    async def ListAlertRules(self, request: pb.ListAlertRulesRequest, call: Call) -> pb.ListAlertRulesResponse:
        """The alert rules that users set."""
        return self._alerts.list()

    async def SetAlertRule(self, request: pb.SetAlertRuleRequest, call: Call) -> pb.SetAlertRuleResponse:
        """Sets one alert rule."""
        return await self._alerts.set(request, _author(request, call))

    async def DeleteAlertRule(self, request: pb.DeleteAlertRuleRequest, call: Call) -> pb.DeleteAlertRuleResponse:
        """Deletes one alert rule."""
        return await self._alerts.delete(request, _author(request, call))

    async def StartCanary(self, request: pb.StartCanaryRequest, call: Call) -> pb.StartCanaryResponse:
        """Begins to give a model version orders."""
        return await self._models.of(request).start(request, _author(request, call))

    async def SetCanaryWeight(self, request: pb.SetCanaryWeightRequest, call: Call) -> pb.SetCanaryWeightResponse:
        """Sets the canary's share by hand."""
        return await self._models.of(request).set_weight(request, _author(request, call))

    async def PromoteCanary(self, request: pb.PromoteCanaryRequest, call: Call) -> pb.PromoteCanaryResponse:
        """Makes the canary the champion now."""
        return await self._models.of(request).promote(request, _author(request, call))

    async def AbortCanary(self, request: pb.AbortCanaryRequest, call: Call) -> pb.AbortCanaryResponse:
        """Ends the canary."""
        return await self._models.of(request).abort(request, _author(request, call))

    async def GetCanary(self, request: pb.GetCanaryRequest, call: Call) -> pb.GetCanaryResponse:
        """The canary with its evidence."""
        return await self._models.of(request).get(request)

    async def RollBack(self, request: pb.RollBackRequest, call: Call) -> pb.RollBackResponse:
        """Makes the champion's predecessor the champion again."""
        return await self._models.of(request).roll_back(request, _author(request, call))

    async def ListModels(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        """Every version in the registry."""
        return await self._models.list_models()

    async def GetModelCard(self, request: pb.GetModelCardRequest, call: Call) -> pb.GetModelCardResponse:
        """What was measured of a version."""
        return await self._models.card(request)

    async def LoadModel(self, request: pb.LoadModelRequest, call: Call) -> pb.LoadModelResponse:
        """Loads a version into replicas."""
        return await self._models.of(request).load_model(request, _author(request, call))

    async def SetModelAlias(self, request: pb.SetModelAliasRequest, call: Call) -> pb.SetModelAliasResponse:
        """Points an alias at a version."""
        return await self._models.of(request).set_alias(request, _author(request, call))

    async def ListSignals(self, request: pb.ListSignalsRequest, call: Call) -> pb.ListSignalsResponse:
        """What is known of instruments now."""
        return await self._signals.list(request)

    def WatchFeatures(self, request: pb.WatchFeaturesRequest, call: Call) -> AsyncIterator[pb.WatchFeaturesResponse]:
        """Features as they change."""
        return self._signals.watch(request, call)

    async def ListBars(self, request: pb.ListBarsRequest, call: Call) -> pb.ListBarsResponse:
        """One page of an instrument's bars."""
        return await self._market.bars(request)

    async def GetBook(self, request: pb.GetBookRequest, call: Call) -> pb.GetBookResponse:
        """The best levels of an instrument's book."""
        return await self._market.book(request)

    async def ReloadConfiguration(
        self, request: pb.ReloadConfigurationRequest, call: Call
    ) -> pb.ReloadConfigurationResponse:
        """Rereads the configuration file."""
        return await self._configuration.reload(self._control, request, _author(request, call))


class _Change(Protocol):
    """Fields that every request to change something has."""

    @property
    def author(self) -> str: ...

    @property
    def reason(self) -> str: ...


def _author(request: _Change, call: Call) -> str:
    """Who asks for a change. Raises `InvalidChangeError` unless the request says who and why."""
    author = known_name(call.caller, request.author)
    if not 0 < len(author) <= longest_name(call.caller, _MAX_AUTHOR):
        raise InvalidChangeError(f"author: must be 1 to {_MAX_AUTHOR} characters")
    if not 0 < len(request.reason) <= _MAX_REASON:
        raise InvalidChangeError(f"reason: must be 1 to {_MAX_REASON} characters")
    return author


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
