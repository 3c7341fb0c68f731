"""The servicer of a process that reads the audit; `server/audit/reading/reading.py` is who asks it.

Whatever is asked is answered in a thread of its own kind, one question at a time: a slow database holds up neither
watchers nor explanations.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import grpc
import grpc.aio
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.timestamp_pb2 import Timestamp

from feature_cache.bars.store import BarStore
from feature_cache.features import MF1
from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import audit_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.wire.reading import reading_pb2
from server.audit.reading.check import AuditCheck
from server.audit.reading.explain import Explainer
from server.audit.reading.heard import headline
from server.audit.reading.journals import Journals
from server.audit.reading.query import AuditQuery
from server.audit.reading.reading import Question, Task
from server.audit.replay.replay import Replay, Replayer
from server.drift.summary import Summary, metadata_of, of_model, summarise
from server.errors import AuditUnavailableError, ModelUnknownError
from server.journal.reply_status import REPLIED
from server.models.archive import ModelStore
from server.models.markout import Markout, markout_of
from server.rpc.bars import page_of
from server.rpc.call import Call
from server.rpc.events import json_of
from server.timing.pace import Pace

R = TypeVar("R")
T = TypeVar("T")


class Lane(Generic[R]):
    """A thread that answers one kind of question, with something to read by that belongs to it alone.

    Args:
        opened: Makes what it reads by, in the thread, for the first question.
    """

    def __init__(self, opened: Callable[[], R]) -> None:
        self._opened = opened
        self._thread = ThreadPoolExecutor(1)
        self._reader: R | None = None

    async def ask(self, answer: Callable[[R], T]) -> T:
        """What `answer` returns or raises, in its turn. Cancelled before its turn, it is not called."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, answer)

    def _answer(self, answer: Callable[[R], T]) -> T:
        if self._reader is None:
            self._reader = self._opened()
        return answer(self._reader)


class ReadingServicer:
    """Answers every `Question`, in a method of its name.

    Args:
        task: What to read.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._store = ModelStore([] if task.model_store is None else [task.model_store])
        self._lookups = Lane(self._query)
        self._watching = Lane(lambda: Journals(task.journal))
        self._comparing = Lane(self._query)
        self._checking = Lane(lambda: AuditCheck(self._query(), task.journal, self._horizon_seconds))
        self._replays = Lane(lambda: Replays(self._query(), self._store))
        self._explanations = Lane(lambda: _Explanations(self._query(), self._store, task.models))
        self._bars = Lane(lambda: BarStore(task.bars_database_url or task.database_url))

    def _query(self) -> AuditQuery:
        return AuditQuery(self._task.database_url, self._task.journal)

    def _horizon_seconds(self, version: str) -> float:
        """Of the label that a model has learnt; the default where its archive is not here."""
        try:
            return markout_of(metadata_of(self._store.find(version).files)).horizon_seconds
        except ModelUnknownError:
            return Markout().horizon_seconds

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the methods, with the messages of the contract."""
        for question in Question:
            service, name = question.removeprefix("/").split("/")
            method = descriptor_pool.Default().FindMethodByName(f"{service}.{name}")
            handler = grpc.unary_unary_rpc_method_handler(
                getattr(self, name),
                message_factory.GetMessageClass(method.input_type).FromString,
                message_factory.GetMessageClass(method.output_type).SerializeToString,
            )
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler}),))

    async def GetDecision(self, request: audit_pb2.GetDecisionRequest, call: Call) -> audit_pb2.GetDecisionResponse:
        """One decision with what was reported of it."""
        return await self._lookups.ask(lambda query: _decision(query, request.decision_id))

    async def ListDecisions(
        self, request: audit_pb2.ListDecisionsRequest, call: Call
    ) -> audit_pb2.ListDecisionsResponse:
        """One page."""
        return await self._lookups.ask(lambda query: query.page(request.filter, request.page_size, request.page_token))

    async def ReplayDecision(
        self, request: audit_pb2.ReplayDecisionRequest, call: Call
    ) -> audit_pb2.ReplayDecisionResponse:
        """A decision computed anew."""
        return await self._replays.ask(lambda replays: replays.replay(request.decision_id))

    async def ExplainDecision(
        self, request: audit_pb2.ExplainDecisionRequest, call: Call
    ) -> audit_pb2.ExplainDecisionResponse:
        """Why a model scored a decision as it did."""
        explanation = await self._explanations.ask(lambda explanations: explanations.explain(request.decision_id))
        return audit_pb2.ExplainDecisionResponse(explanation=explanation)

    async def NextEvents(self, request: reading_pb2.NextEventsRequest, call: Call) -> reading_pb2.NextEventsResponse:
        """What the journals hold beyond a cursor, some rows of it."""
        step = await self._watching.ask(lambda journals: journals.after(request.watch))
        return reading_pb2.NextEventsResponse(
            events=[json_of(event) if request.as_json else event.SerializeToString() for event in step.events],
            cursor=step.cursor,
            more=step.more,
            cursors=[event.cursor for event in step.events],
        )

    async def NewestDecisions(
        self, request: reading_pb2.NewestDecisionsRequest, call: Call
    ) -> reading_pb2.NewestDecisionsResponse:
        """The newest decision of each instrument."""
        return await self._lookups.ask(lambda query: _newest(query, request))

    async def ListChanges(self, request: admin_pb2.ListChangesRequest, call: Call) -> admin_pb2.ListChangesResponse:
        """Control changes, the newest first."""
        return await self._lookups.ask(lambda query: query.changes(request))

    async def FindOutcome(self, request: reading_pb2.FindOutcomeRequest, call: Call) -> reading_pb2.FindOutcomeResponse:
        """The outcome that is on record already."""
        found = await self._lookups.ask(lambda query: query.recorded(request.outcome))
        return reading_pb2.FindOutcomeResponse(outcome=found)

    async def CompareDrift(self, request: reading_pb2.CompareDriftRequest, call: Call) -> admin_pb2.DriftStatus:
        """Recent decisions beside what their model learnt from."""
        return await self._comparing.ask(lambda query: _drift(query, self._store, request))

    async def CheckAudit(self, request: reading_pb2.CheckAuditRequest, call: Call) -> reading_pb2.CheckAuditResponse:
        """What the audit says of itself."""
        return await self._checking.ask(lambda check: check.check(request.champions))

    async def ListBars(self, request: admin_pb2.ListBarsRequest, call: Call) -> admin_pb2.ListBarsResponse:
        """One page of bars."""
        return await self._bars.ask(lambda store: page_of(store, request))

    async def WarmUp(self, request: reading_pb2.WarmUpRequest, call: Call) -> reading_pb2.WarmUpResponse:
        """Has a model ready to explain."""
        await self._explanations.ask(lambda explanations: explanations.warm_up(request.model_version))
        return reading_pb2.WarmUpResponse()


class Replays:
    """Replays decisions of the audit, with the models of a store."""

    def __init__(self, query: AuditQuery, store: ModelStore) -> None:
        self._query = query
        self._replayer = Replayer(query.settings, query.packet, store.find)

    def replay(self, decision_id: str) -> audit_pb2.ReplayDecisionResponse:
        """The response about one decision; raises as `AuditQuery.get` and `Replayer.replay` do."""
        recorded = self._query.get(decision_id)
        response = response_of(asyncio.run(self._replayer.replay(recorded.packet)))
        if recorded.reply_status != REPLIED:
            response.facts.append(headline(recorded))
        return response


class _Explanations:
    """Explains decisions of the audit."""

    def __init__(self, query: AuditQuery, store: ModelStore, models: int) -> None:
        self._query = query
        self._explainer = Explainer(query.packet, store.find, models)

    def explain(self, decision_id: str) -> pb.Explanation:
        # A decision that was just made is in the journal, whatever the database does.
        recorded = self._query.journals.find(decision_id, {}, []) if decision_id else None
        return self._explainer.explain((recorded or self._query.get(decision_id)).packet)

    def warm_up(self, version: str) -> None:
        self._explainer.warm_up(version)


def response_of(replay: Replay) -> audit_pb2.ReplayDecisionResponse:
    """A replay in the contract's words."""
    response = audit_pb2.ReplayDecisionResponse(
        equal=replay.first_difference is None,
        action=replay.action,
        score=None if math.isnan(replay.score) else replay.score,
        reasons=replay.reasons,
        facts=replay.facts,
    )
    if replay.first_difference is not None:
        difference = replay.first_difference
        response.first_difference.field = difference.field
        response.first_difference.recorded = difference.recorded
        response.first_difference.replayed = difference.replayed
    return response


def drift_status(summary: Summary) -> admin_pb2.DriftStatus:
    """A comparison in the contract's words."""
    features = [
        admin_pb2.FeatureDrift(
            name=one.name,
            psi=one.psi,
            limit=one.limit,
            undefined=one.undefined,
            drifted=one.drifted,
            not_judged=one.not_judged,
        )
        for one in summary.drifts
    ]
    windows = [
        admin_pb2.DriftWindow(
            since=_instant(one.since_ns), rows=one.rows, psi=[one.psi[each.name] for each in features]
        )
        for one in summary.windows
    ]
    return admin_pb2.DriftStatus(
        model_version=summary.model_version,
        problem=summary.problem,
        rows=summary.rows,
        features=features,
        windows=windows,
    )


def _instant(ns: int) -> Timestamp:
    found = Timestamp()
    found.FromNanoseconds(ns)
    return found


def _decision(query: AuditQuery, decision_id: str) -> audit_pb2.GetDecisionResponse:
    response = audit_pb2.GetDecisionResponse(decision=query.get(decision_id))
    if response.decision.packet.feature_set_id == MF1.id:
        response.feature_names.extend(MF1.names)
    try:
        response.outcomes.extend(query.outcomes(decision_id))
    except AuditUnavailableError as error:
        response.incomplete = str(error)
    return response


def _newest(query: AuditQuery, request: reading_pb2.NewestDecisionsRequest) -> reading_pb2.NewestDecisionsResponse:
    response = reading_pb2.NewestDecisionsResponse()
    for instrument in request.instruments:
        wanted = audit_pb2.DecisionFilter(instruments=[instrument], since=request.since)
        page = query.page(wanted, 1, "")
        response.decisions.extend(page.decisions)
        response.incomplete = response.incomplete or page.incomplete
    return response


def _drift(query: AuditQuery, store: ModelStore, request: reading_pb2.CompareDriftRequest) -> admin_pb2.DriftStatus:
    now = time.time_ns()
    wanted = audit_pb2.DecisionFilter()
    wanted.since.FromNanoseconds(now - int(request.window_seconds * 1e9))
    wanted.until.FromNanoseconds(now)
    wanted.model = request.model_version
    rest = Pace().rest  # a comparison comes every minute, and nobody waits for it
    packets = of_model(query.spread(wanted, request.max_decisions, rest=rest), request.model_name)
    return drift_status(
        summarise(packets, lambda version: metadata_of(store.find(version).files), request.model_version, rest=rest)
    )
