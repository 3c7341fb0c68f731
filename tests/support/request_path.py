"""The request path from servicer to journal with its real parts, and a stage that answers when a test lets it."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, cast

from fallback.budget import BudgetSettings
from fallback.cached_score import CachedScores, CachedScoreSettings
from fallback.chain import Chain
from fallback.guards import Guards, GuardSettings
from fallback.order import Answer, Case
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from feature_cache.token_bucket import TokenBuckets
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.canary.burn import Objective, SloSettings
from server.control.file import ControlFile
from server.control.state import ControlSettings, ControlState
from server.decision.admission import Admission, AdmissionSettings
from server.decision.convert import OrderReader
from server.decision.following import Observers
from server.decision.idempotency import IdempotencyWindow
from server.decision.left_keys import LeftKeys
from server.decision.markets import Markets
from server.decision.metrics import DecisionMetrics
from server.decision.packets import PacketWriter
from server.decision.plane import DataPlane
from server.decision.recorder import Recording
from server.decision.replies import Replies
from server.decision.reports import DecisionReports
from server.decision.shared_keys import SharedKeys, make_memory
from server.inference.batcher import BatcherSettings
from server.inference.embedded_check import EmbeddedCheck, EmbeddedSettings
from server.inference.shadow import Shadow
from server.journal.entries import entry_of, singly
from server.journal.journal import Journal, JournalSettings
from server.journal.journal_file import JournalReader
from server.journal.reply_status import REPLIED, unconfirmed_status
from server.rpc.call import Call
from server.rpc.call_context import CallContexts
from server.rpc.decision import DecisionServicer
from server.rpc.stream import StreamSettings
from server.security.orders import OrderAccess
from server.security.refusals import Refusals
from server.timing.loop_lag import LoopLag
from support.scripted_replica import ScriptedReplica, answers

INSTRUMENT = "BTCUSDT.BINANCE"
PATIENT = BudgetSettings(cap_seconds=10, audit_reserve_seconds=1, reply_reserve_seconds=0.1)
"""Nothing depends on being quick."""


class Gate:
    """A stage that says ABSTAIN, of so many orders as a test lets through."""

    def __init__(self) -> None:
        self.open = asyncio.Semaphore(1_000_000)
        self.asked = 0

    async def answer(self, case: Case) -> Answer | None:
        self.asked += 1
        await self.open.acquire()
        return Answer(pb.ACTION_ABSTAIN, pb.SOURCE_NONE, pb.REASON_CODE_NO_SOURCE)


class RequestPath:
    """A servicer, and what is behind it."""

    def __init__(
        self, journal: Journal, budget: BudgetSettings, max_in_flight: int, keys: SharedKeys, left: LeftKeys
    ) -> None:
        loop = asyncio.get_running_loop()
        self.ahead_seconds = 0.0
        """How far the path's clock is ahead of the event loop's: a test moves it, and what it waits for still comes."""

        def clock() -> float:
            return loop.time() + self.ahead_seconds

        ids = (f"decision-{number}" for number in itertools.count())
        control = ControlState(
            ControlSettings(shadow=False),
            ControlFile(journal.settings.path.with_name("control.json")),
            {},
            journal,
            "server-1",
            lambda: next(ids),
            time.time_ns,
            clock,
        )
        self.journal = journal
        self.clock = clock
        self.gate = Gate()
        self.metrics = DecisionMetrics()
        self.replies = Replies(journal, clock)
        self.replica = ScriptedReplica("secondary", answers(0.75), BatcherSettings())
        objective = Objective(SloSettings(), budget.cap_seconds)
        check = EmbeddedCheck(self.replica, EmbeddedSettings(), lambda: 0.5, clock)
        self.admission = Admission(AdmissionSettings(), clock)
        self.dataplane = DataPlane(
            admission=self.admission,
            idempotency=IdempotencyWindow(clock, keys, left.resolve),
            markets=Markets(FeatureCache("redis://unused", FeatureCacheSettings(), (INSTRUMENT,)), 1.0, clock),
            chain=Chain({"model": self.gate, "cached_score": self.gate, "rules": self.gate}, ("rules",), clock),
            cached_scores=CachedScores(CachedScoreSettings(), clock),
            guards=Guards(GuardSettings(), lambda: control.trading_state, clock, time.time),
            shadow=Shadow([self.replica]),
            recording=Recording(
                journal,
                self.replies,
                PacketWriter("server-1", "hash", "os", control),
                lambda count: list(itertools.islice(ids, count)),
            ),
            control=control,
            observers=Observers(self.metrics, objective, DecisionReports(()), LoopLag(clock), check),
            budget_settings=budget,
            clock=clock,
        )
        explaining: Any = None  # nobody asks for an explanation
        self.servicer = DecisionServicer(
            self.dataplane,
            OrderReader((INSTRUMENT,)),
            self.metrics,
            StreamSettings(max_in_flight=max_in_flight),
            CallContexts(),
            DecisionReports(()),
            explaining,
            clock,
            OrderAccess(
                TokenBuckets(math.inf, 1.0, clock),
                Refusals(journal.append, TokenBuckets(0.0, 1.0, clock), "", time.time_ns),
            ),
        )

    def call(self, timeout_seconds: float | None = None) -> Call:
        """A call whose caller waits so long from now on; None for ever."""
        return Call(None if timeout_seconds is None else self.clock() + timeout_seconds, ())

    async def decide(self, order: pb.Order, timeout_seconds: float | None = None) -> pb.Decision:
        """A unary call, whose reply is heard."""
        reply = await self.servicer.Decide(pb.DecideRequest(order=order), self.call(timeout_seconds))
        self.servicer.sent(reply)
        return pb.DecideResponse.FromString(reply.wire).decision

    def stream(self, *orders: pb.Order) -> AsyncGenerator[Any]:
        """The answers of a stream that its caller does not end."""
        answers: Any = self.servicer.DecideStream(_requests(orders), self.call())
        return cast("AsyncGenerator[Any]", answers)

    async def settled_on_disk(self) -> None:
        """Returns when it is on disk how far replies are settled, as far as they are."""
        await self.journal.flush()

    async def settled(self) -> None:
        """Returns when every decision's reply is known and every note durable."""
        async with asyncio.timeout(10):
            while self.replies.owed or self.replies.waiting:  # noqa: ASYNC110 - plain attributes
                await asyncio.sleep(0.001)


@asynccontextmanager
async def request_path(
    path: Path, budget: BudgetSettings = PATIENT, max_in_flight: int = 256, shared: int | None = None, **changes: object
) -> AsyncIterator[RequestPath]:
    """One on a journal in this directory. It shares a memory of keys, if one is given, with a process in slot 1.

    The journal of that slot is in the directory `1` beside this one.
    """
    path.mkdir(exist_ok=True)  # noqa: ASYNC240 - nothing else runs yet
    fields = {"path": path / "journal.db", "retry_min_seconds": 0.01, "retry_max_seconds": 0.05, **changes}
    memory = shared or make_memory(1_000)
    loop, paths = asyncio.get_running_loop(), list[RequestPath]()
    keys = SharedKeys(memory, 60.0, lambda: paths[0].clock() if paths else loop.time())
    left = LeftKeys(keys, 60.0, lambda slot: path.with_name(str(slot)) / "journal.db")
    try:
        async with Journal(JournalSettings.model_validate(fields), left=left.take_over) as journal:
            made = RequestPath(journal, budget, max_in_flight, keys, left)
            paths.append(made)
            try:
                async with made.replies:
                    yield made
            finally:
                await made.replica.batcher.close()
    finally:
        if shared is None:
            os.close(memory)


def order(ref: str, **changes: Any) -> pb.Order:
    fields: dict[str, Any] = {
        "order_ref": ref,
        "instrument": INSTRUMENT,
        "side": pb.SIDE_BUY,
        "quantity": 1.0,
        "strategy": "test",
    }
    return pb.Order(**(fields | changes))


def statuses(path: Path) -> dict[str, str]:
    """What the journal in this directory says of each order's reply, by reference; the last word holds."""
    refs: dict[str, str] = {}
    found: dict[str, str] = {}
    for entry in entries(path):
        if entry.HasField("decision"):
            refs[entry.decision.decision.decision_id] = entry.decision.order.order_ref
            found[entry.decision.order.order_ref] = REPLIED
        elif entry.HasField("reply_unconfirmed"):
            found[refs[entry.reply_unconfirmed.decision_id]] = unconfirmed_status(entry.reply_unconfirmed.cause)
        elif entry.HasField("reply_heard"):
            found[refs[entry.reply_heard.decision_id]] = REPLIED
    return found


def left_by_kill(path: Path, copy: Path) -> Path:
    """The journal in a directory as it would be after the death of its process now; a directory that holds it."""
    copy.mkdir()
    for file in path.glob("journal.db*"):
        shutil.copy(file, copy)
    (copy / "journal.db-shm").unlink(missing_ok=True)  # of the memory that processes share nothing survives
    return copy


def entries(path: Path) -> list[packet_pb2.JournalEntry]:
    """What the journal in this directory holds, each decision by itself."""
    with closing(JournalReader(path / "journal.db")) as journal:
        rows = journal.rows_after(journal.anchor().position, -1)
    return [entry for row in rows for entry in singly(entry_of(row.entry))]


async def _requests(orders: tuple[pb.Order, ...]) -> AsyncIterator[pb.Order]:
    for one in orders:
        yield one
    await asyncio.Event().wait()
