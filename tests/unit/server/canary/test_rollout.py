"""A canary's way, judged by one process and applied by two; in virtual time, with scripted model servers."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.cases import new_case
from support.scripted_replica import Script, ScriptedReplica, answers, fails, hangs
from support.virtual_time import until

from fallback.budget import BudgetSettings
from fallback.order import Case
from feature_cache import features
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.canary.burn import Objective, SloSettings
from server.canary.events import EventLog
from server.canary.evidence import Verdict
from server.canary.markouts import Markouts
from server.canary.pairs import PairRecorder
from server.canary.plan import Canary
from server.canary.rollout import CanaryError, Rollout
from server.canary.routing import CanaryRouting
from server.canary.settings import CanarySettings
from server.composition.canary import listen
from server.errors import ChangeInDoubtError, ChangeRefusedError
from server.inference.champion import Champion
from server.inference.outcome import BatchFailedError, Outcome
from server.inference.retry_budget import RetryBudget, RetrySettings
from server.inference.shadow import Pairs, Shadow
from server.inference.wire import ModelIdentity, ScoreBatch
from server.journal.journal import Journal, JournalSettings
from server.models.deployment import Deployment, DeploymentError
from server.models.loading import ModelLoader
from server.models.management import LoadError
from server.models.markout import Markout
from server.models.registry import ModelRecord, Registry

OLD, NEW = "aa" * 8, "bb" * 8
SETTINGS = CanarySettings(
    steps=(0.05, 0.25, 0.5, 1.0),
    dwell_seconds=5,
    patience_seconds=300,
    keep_previous_seconds=10,
    min_orders=10,
    independent_seconds=0.1,
    min_pairs=30,
    min_outcomes=0,
    max_fallback_share=0.1,
    max_error_excess=0.1,
)
WALL_SECONDS = 1_700_000_000.0


def scores(version: str, of: Callable[[float], float], after_seconds: float = 0.001) -> Script:
    """A model whose score is a function of the row's first feature."""

    async def script(rows: list[bytes]) -> ScoreBatch:
        await asyncio.sleep(after_seconds)
        first = (float(np.frombuffer(row, dtype="<f4")[0]) for row in rows)
        return ScoreBatch(ModelIdentity("model", version, 0.5, 0), np.array([of(x) for x in first], dtype=np.float32))

    return script


class ScriptedRegistry(Registry):
    """Two sound versions without archives; `set_alias` is remembered."""

    def __init__(self) -> None:
        super().__init__(Path("nowhere"))
        self.set: dict[str, str] = {}
        self.labels: dict[str, Markout] = {}

    def usable(self, version: str) -> ModelRecord:
        nothing = np.empty((0, features.N_FEATURES), dtype=np.float32), np.empty(0, dtype=np.float32)
        label = self.labels.get(version, Markout())
        return ModelRecord(version, "model", "xgboost", features.MF1.version, 0.5, 0.0, 0, *nothing, markout=label)

    def set_alias(self, alias: str, version: str) -> str | None:
        self.set[alias] = version
        return None


class Entries(Journal):
    """Keeps what is appended; it has no thread and no file, which know no virtual time."""

    def __init__(self) -> None:
        super().__init__(JournalSettings())
        self.entries: list[packet_pb2.JournalEntry] = []
        self.writable = True

    def append(self, entry: bytes, *, even_if_full: bool = False) -> asyncio.Future[bool]:
        self.entries.append(packet_pb2.JournalEntry.FromString(entry))
        written: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        written.set_result(True)
        return written


class ScriptedLoader(ModelLoader):
    """Loads in no time, or not at all; `tests/integration/test_model_loading.py` has the real one load."""

    def __init__(self) -> None:
        super().__init__({}, "", 1.0)
        self.versions: dict[str, set[str]] = {"primary": {OLD}, "secondary": {OLD}, "challenger": set()}
        self.broken = False

    def manages(self, replica: str) -> bool:
        return True

    async def load(self, replica: object, record: ModelRecord) -> None:
        await asyncio.sleep(0.1)
        if self.broken:
            raise LoadError("no memory")
        self.versions[replica.name].add(record.version)  # type: ignore[attr-defined]

    async def unload(self, replica: object, version: str) -> None:
        self.versions[replica.name].discard(version)  # type: ignore[attr-defined]

    async def make_default(self, replica: object, version: str) -> None:
        return None


class Process:
    """One server process: model servers, routing, shadow and rollout, without a transport."""

    def __init__(self, control: Control, journal: Journal, settings: CanarySettings) -> None:
        self.clock = asyncio.get_running_loop().time
        self.loader, self.registry = ScriptedLoader(), ScriptedRegistry()
        good = scores(OLD, lambda x: x)
        self.primary, self.secondary = (ScriptedReplica(name, good) for name in ("primary", "secondary"))
        self.challenger = ScriptedReplica("challenger", scores(NEW, lambda x: x))
        for replica in (self.primary, self.secondary):
            replica.model = ModelIdentity("model", OLD, 0.5, 0)
        budget = BudgetSettings()
        retry = RetryBudget(RetrySettings(), self.clock)
        champion = Champion(self.primary, self.secondary, retry, False, budget, self.clock, lambda: 0.5)
        self.objective = Objective(SloSettings(), budget.cap_seconds)
        self.routing = CanaryRouting(
            self.challenger, champion, lambda: self.primary.latency.p95, budget, self.objective, self.clock
        )
        cache = FeatureCache("redis://unused", FeatureCacheSettings(), ("BTCUSDT.BINANCE",))
        ids = (f"{number:08}" for number in itertools.count())
        champions = (self.primary, self.secondary)
        self.deployment = Deployment(
            self.registry,
            self.loader,
            champions,
            None,
            control.set_champion,
            settings.keep_previous_seconds,
            self.clock,
        )
        self.markouts = markouts = Markouts(cache, self.clock)
        self.rollout = Rollout(
            settings=settings,
            slo=SloSettings(),
            processes=2,
            deployment=self.deployment,
            challenger=self.challenger,
            routing=self.routing,
            markouts=markouts,
            set_canary=control.set_canary,
            objective=self.objective,
            events=EventLog(journal, lambda: next(ids), "server-1", lambda: int(self.wall() * 1e9)),
            recorder=PairRecorder(journal, lambda: int(self.wall() * 1e9)),
            clock=self.clock,
        )
        listen(self.rollout, self.deployment, markouts, self.routing, self.challenger, champions)
        self.shadow = Shadow(
            [self.challenger],
            (self.primary, self.secondary),
            on_trial=lambda replica: self.routing.canary is not None,
            observe=self.rollout.observe_pair,
            observe_together=self.rollout.observe_pairs,
            observe_decision=self.rollout.observe_decision,
        )
        self.sources: list[pb.Source.ValueType] = []
        self._tasks: list[asyncio.Task[None]] = []

    def wall(self) -> float:
        return WALL_SECONDS + self.clock()

    async def trade(self, per_second: float = 100.0) -> None:
        """Orders of a thousand flows, until cancelled."""
        for number in itertools.count():
            await asyncio.sleep(1 / per_second)
            task = asyncio.create_task(self._order(number))
            self._tasks = [one for one in self._tasks if not one.done()] + [task]

    def case(self, strategy: str, **order: Any) -> Case:
        """An order of this moment, with the features of this moment: the market moves a hundred times a second."""
        sequence = int(self.clock() * 100)
        values = np.zeros(features.N_FEATURES, dtype=np.float32)
        values[0] = random.Random(sequence).random()
        asked: dict[str, Any] = {"arrived": self.clock(), "strategy": strategy, "values": values, "sequence": sequence}
        return new_case(**asked | order)

    async def _order(self, number: int) -> None:
        await self.decide(self.case(f"s{number % 1_000}"), number)

    async def decide(self, case: Case, number: int) -> None:
        """The way of an order, as far as a canary has a part in it."""
        answer = await self.routing.answer(case)
        self.objective.note(case, answer is not None)
        if answer is None:
            return
        self.sources.append(answer.source)
        assert self.clock() < case.budget.deadline
        self.shadow.mirror([(case, answer, f"decision-{number}")])

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for replica in (self.primary, self.secondary, self.challenger):
            await replica.batcher.close()


class Control:
    """The control state of all processes, in a single variable."""

    def __init__(self) -> None:
        self.processes: list[Process] = []
        self.version = 0
        self.champion = ""
        self.canary: Canary | None = None
        self.refuse_steps = False
        self.doubtful = False
        """True while no change is answered. Each is made a second after it was given up."""

    async def set_canary(self, canary: Canary, author: str, reason: str, unchanged: bool) -> admin_pb2.Change:
        if unchanged and self.refuse_steps:
            raise CanaryError("somebody was faster")
        if unchanged and self.doubtful:
            asyncio.get_running_loop().call_later(1.0, self._put_canary, canary)
            raise ChangeInDoubtError("change-1", "Redis does not answer")
        self._put_canary(canary)
        return admin_pb2.Change(version=self.version)

    def _put_canary(self, canary: Canary) -> None:
        self.canary, self.version = canary, self.version + 1
        for process in self.processes:
            process.rollout.apply_canary(canary)

    async def set_champion(self, version: str, author: str, reason: str, unchanged: bool) -> admin_pb2.Change:
        if unchanged and self.refuse_steps:
            raise ChangeRefusedError("without Redis nobody knows")
        if unchanged and self.doubtful:
            asyncio.get_running_loop().call_later(1.0, self._put_champion, version)
            raise ChangeInDoubtError("change-2", "Redis does not answer")
        self._put_champion(version)
        return admin_pb2.Change(version=self.version)

    def _put_champion(self, version: str) -> None:
        self.champion, self.version = version, self.version + 1
        for process in self.processes:
            process.deployment.apply(version)


class World:
    """A control state with two processes, of which the first has the orders."""

    def __init__(self, settings: CanarySettings) -> None:
        self.control = Control()
        self.journal = Entries()
        self.one, self.two = (Process(self.control, self.journal, settings) for _ in range(2))
        self.control.processes = [self.one, self.two]

    def state(self) -> str:
        return self.control.canary.state if self.control.canary is not None else ""

    def events(self) -> list[packet_pb2.CanaryEvent]:
        return [entry.canary_event for entry in self.journal.entries if entry.HasField("canary_event")]

    async def start(self, steps: tuple[float, ...] = SETTINGS.steps) -> None:
        now = self.one.wall()
        await self.one.rollout.start(Canary.start("canary-1", NEW, OLD, steps, "ann", "better", now))


@asynccontextmanager
async def world(settings: CanarySettings = SETTINGS) -> AsyncIterator[World]:
    made = World(settings)
    work: list[Awaitable[None]] = [made.one.trade(), made.one.rollout.run(), made.two.rollout.run()]
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        yield made
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await made.one.close()
        await made.two.close()


async def test_a_good_canary_becomes_the_champion_step_by_step() -> None:
    async with world() as w:
        await w.start()
        began, weights = w.one.clock(), set()
        while w.state() == "running":
            await asyncio.sleep(0.05)
            assert w.control.canary is not None
            weights.add(w.control.canary.weight)
        assert (w.state(), w.control.champion) == ("promoted", NEW)
        assert w.one.clock() - began >= 4 * SETTINGS.dwell_seconds
        assert weights - {0.0} == set(SETTINGS.steps)
        for process in (w.one, w.two):
            await until(lambda process=process: process.primary.wanted_version == NEW)  # type: ignore[misc]
            assert process.routing.canary is None
        assert w.one.registry.set == {"champion": NEW, "previous": OLD}
        assert w.one.loader.versions["primary"] == {OLD, NEW}, "the old one stays for a while"
        assert w.one.challenger.wanted_version is None
        await until(lambda: w.one.loader.versions == {"primary": {NEW}, "secondary": {NEW}, "challenger": {NEW}})


@pytest.mark.long
async def test_a_canary_of_one_strategy_takes_its_steps_there_and_waits_for_an_operator_at_the_last() -> None:
    async with world() as w:
        held = Canary.start("canary-1", NEW, OLD, (0.5, 1.0), "ann", "better", w.one.wall(), strategy="s[0-4]*")
        await w.one.rollout.start(held)
        await until(lambda: w.control.canary is not None and w.control.canary.at_last_step)
        await asyncio.sleep(2 * SETTINGS.patience_seconds)
        assert (w.state(), w.control.champion) == ("running", "")
        assert w.one.rollout.evidence.verdict is Verdict.BETTER_OR_EQUAL
        assert {pb.SOURCE_PRIMARY, pb.SOURCE_CANARY} == set(w.one.sources[-1_000:])
        assert w.control.canary is not None
        await w.one.rollout.promote(w.control.canary, "ann", "it has shown enough")
        assert (w.state(), w.control.champion) == ("promoted", NEW)


async def test_what_the_challenger_served_before_its_canary_it_serves_afterwards() -> None:
    async with world() as w:
        w.one.challenger.model = ModelIdentity("model", NEW, 0.5, 0)
        w.one.loader.versions["challenger"] = {NEW}
        await w.start()
        assert w.control.canary is not None
        await w.one.rollout.end(w.control.canary, "aborted", "ann", "not now")
        await asyncio.sleep(1.0)
        assert w.one.loader.versions["challenger"] == {NEW}


@pytest.mark.parametrize(
    ("script", "guilty"),
    [
        (scores(NEW, lambda x: 1 - x), {"rank", "disagreement", "score_shift"}),
        (scores(NEW, lambda x: x, after_seconds=0.022), {"slow"}),
        (fails(Outcome.MODEL_ERROR), {"errors", "fallback"}),
        (hangs, {"errors", "fallback"}),
        (answers(0.7, version="cc" * 8), {"fallback"}),
    ],
    ids=["inverted", "late", "fails", "hangs", "other-version"],
)
async def test_a_bad_canary_is_out_within_seconds_in_every_process(script: Script, guilty: set[str]) -> None:
    async with world() as w:
        w.one.challenger.script = script
        began = w.one.clock()
        await w.start(steps=(0.25, 1.0))
        await until(lambda: w.state() == "rolled_back")
        assert w.one.clock() - began <= 10
        for process in (w.one, w.two):
            assert process.routing.canary is None
            assert process.challenger.wanted_version is None
        assert w.control.champion == ""
        started, ended = w.events()
        assert (started.event, ended.event, ended.author) == ("started", "rolled_back", "server")
        assert {check.name for check in ended.checks if check.verdict == "worse"} & guilty
        assert 0 <= w.one.rollout.decisions - ended.orders <= 2, "only those that it was asked for at that moment"
        assert len(w.one.rollout.affected) == w.one.rollout.decisions
        await asyncio.sleep(1)  # for those that it was asked for at that moment
        answered_before = w.one.rollout.decisions
        await asyncio.sleep(30)
        assert w.state() == "rolled_back", "nobody but an operator begins again"
        assert w.one.rollout.decisions == answered_before
        assert set(w.one.sources[-100:]) == {pb.SOURCE_PRIMARY}
        await until(lambda: NEW not in w.one.loader.versions["challenger"])


@pytest.mark.parametrize("in_columns", [True, False])
async def test_rows_are_evidence_once_for_each_state_of_the_market(
    in_columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world() as w:
        await w.start()
        await until(lambda: w.one.routing.canary is not None)
        judged: list[float] = []
        rollout = w.one.rollout
        monkeypatch.setattr(rollout.evidence, "observe_pair", lambda name, pair: judged.append(pair.canary_score))

        def see(version: str, *rows: tuple[pb.Side.ValueType, int, float]) -> None:
            ids, names = [str(place) for place in range(len(rows))], ["ETHUSDT.BINANCE"] * len(rows)
            sides, sequences, says = zip(*rows, strict=True)
            views: list[Any] = [SimpleNamespace(mid=1.0, snapshot=SimpleNamespace(sequence=one)) for one in sequences]
            pairs = Pairs(ids, names, sides, views, OLD, 0.5, says, version, 0.5, says, 0.001)
            if in_columns:
                rollout.observe_pairs(pairs)
            else:
                for pair in pairs.each():
                    rollout.observe_pair(pair)

        see(NEW, (pb.SIDE_BUY, 7, 0.1), (pb.SIDE_BUY, 7, 0.2), (pb.SIDE_SELL, 7, 0.3), (pb.SIDE_BUY, 8, 0.4))
        see(NEW, (pb.SIDE_BUY, 8, 0.5), (pb.SIDE_SELL, 9, 0.6))
        see("cc" * 8, (pb.SIDE_BUY, 10, 0.7))
        assert judged == [0.1, 0.3, 0.4, 0.6]


async def test_a_canary_that_turns_bad_late_is_out_as_soon() -> None:
    async with world() as w:
        await w.start()
        await until(lambda: w.control.canary is not None and w.control.canary.weight == 0.5)
        turned = w.one.clock()
        w.one.challenger.script = scores(NEW, lambda x: 1 - x)
        await until(lambda: w.state() == "rolled_back")
        assert w.one.clock() - turned <= 10


@pytest.mark.parametrize("same", [True, False])
async def test_a_canary_is_judged_by_its_own_label(same: bool) -> None:
    async with world() as w:
        short = Markout(horizon_seconds=0.5, delay_seconds=0.2)
        for process in (w.one, w.two):
            process.registry.labels = {NEW: short, OLD: short if same else Markout()}
        await w.start()
        await until(lambda: w.one.routing.canary is not None)
        assert w.one.markouts.label == short
        assert ("brier" in w.one.rollout.evidence.checks) == same


async def test_a_process_without_evidence_obeys_and_does_not_judge() -> None:
    async with world() as w:
        await w.start()
        await until(lambda: w.two.routing.canary is not None)
        assert w.two.challenger.wanted_version == NEW
        await until(lambda: w.control.canary is not None and w.control.canary.step == 1)
        assert w.two.routing.canary is not None
        assert w.two.routing.canary.step == 1
        assert w.two.rollout.events.counts == {}


@pytest.mark.long
async def test_nobody_takes_a_step_that_the_control_state_refuses() -> None:
    async with world() as w:
        await w.start()
        w.control.refuse_steps = True
        await asyncio.sleep(60)
        assert w.control.canary is not None
        assert (w.state(), w.control.canary.step) == ("running", 0)


async def test_a_held_canary_stays_where_it_is_and_is_still_watched() -> None:
    async with world() as w:
        await w.start()
        assert w.control.canary is not None
        await w.control.set_canary(w.control.canary.weighted(0.1, True, w.one.wall()), "ann", "wait", False)
        await asyncio.sleep(40)
        assert w.control.canary.weight == 0.1
        w.one.challenger.script = scores(NEW, lambda x: 1 - x)
        await until(lambda: w.state() == "rolled_back")


async def test_what_cannot_be_proven_ends_when_patience_is_over() -> None:
    settings = SETTINGS.model_copy(update={"patience_seconds": 60.0, "min_outcomes": 1_000})
    async with world(settings) as w:
        await w.start()
        await asyncio.sleep(59)
        assert w.state() == "running"
        await until(lambda: w.state() == "rolled_back")
        assert "not proven within 60 s" in w.events()[-1].reason
        assert w.events()[-1].verdict == "no evidence"


async def test_a_burning_error_budget_ends_it() -> None:
    async with world() as w:
        await w.start()
        await asyncio.sleep(4)
        w.one.objective.missed += 500
        began = w.one.clock()
        await until(lambda: w.state() == "rolled_back")
        assert w.one.clock() - began <= 3
        assert "the error budget burns: 50x" in w.events()[-1].reason


async def test_a_canary_that_cannot_be_loaded_does_not_begin() -> None:
    async with world() as w:
        w.one.loader.broken = True
        with pytest.raises(LoadError):
            await w.start()
        assert w.state() == ""
        w.one.loader.broken = False
        await w.start()
        with pytest.raises(CanaryError, match="under way"):
            await w.start()
        assert w.control.canary is not None
        await w.one.rollout.end(w.control.canary, "aborted", "ann", "enough")
        with pytest.raises(CanaryError, match="is the champion"):
            await w.one.rollout.start(Canary.start("two", OLD, OLD, (1.0,), "ann", "again", 0.0))


async def test_a_process_whose_replica_has_not_loaded_it_gives_it_no_orders_yet() -> None:
    async with world() as w:
        w.two.loader.broken = True
        await w.start(steps=(0.5, 1.0))
        await asyncio.sleep(4)
        assert w.one.routing.canary is not None
        assert w.two.routing.canary is None
        w.two.loader.broken = False
        await until(lambda: w.two.routing.canary is not None)


async def test_a_champion_that_a_replica_has_not_loaded_leaves_it_with_the_old_one() -> None:
    async with world() as w:
        w.two.loader.broken = True
        await w.one.deployment.make_champion(NEW, "ann", "straight on")
        await until(lambda: w.one.primary.wanted_version == NEW)
        assert w.two.primary.wanted_version is None
        w.two.loader.broken = False
        await until(lambda: w.two.primary.wanted_version == NEW)
        await w.one.deployment.make_champion(OLD, "ann", "back")
        await until(lambda: w.one.primary.wanted_version == w.two.secondary.wanted_version == OLD)
        assert w.one.registry.set == {"champion": OLD, "previous": NEW}


async def test_scores_of_a_version_decide_until_it_is_rolled_back_and_not_a_moment_longer() -> None:
    async with world() as w:
        deployment = w.one.deployment
        assert deployment.decides(OLD), "what the replicas serve"
        assert not deployment.decides(NEW)
        w.one.secondary.model = ModelIdentity("model", NEW, 0.5, 0)
        assert deployment.decides(NEW), "one replica was given another version by somebody else"
        await deployment.make_champion(NEW, "ann", "better")
        assert deployment.decides(NEW)
        assert not deployment.decides(OLD)
        deployment.apply(OLD)
        assert w.one.primary.wanted_version != OLD, "the replica is not switched yet"
        assert (deployment.decides(OLD), deployment.decides(NEW)) == (True, False)


POISON = 2.0
"""First feature of rows on which the canary of the next tests fails."""


async def almost_good(rows: list[bytes]) -> ScoreBatch:
    """A canary that is slower than the champion, though not slow, and that one caller could make look bad."""
    first = [float(np.frombuffer(row, dtype="<f4")[0]) for row in rows]
    await asyncio.sleep(0.004)
    if POISON in first:
        raise BatchFailedError(Outcome.MODEL_ERROR, "the handler raised")
    differing = [x - 0.1 if is_doubtful(x) else x for x in first]
    return ScoreBatch(ModelIdentity("model", NEW, 0.5, 0), np.array(differing, dtype=np.float32))


def is_doubtful(first: float) -> bool:
    """True for one row in fifty: on those the models differ."""
    return 0.5 <= first < 0.52


def poisonous(process: Process, strategy: str) -> list[Case]:
    """Features of the caller's own that the canary fails on and the champion does not."""
    own = np.zeros(features.N_FEATURES, dtype=np.float32)
    own[0] = POISON
    return [process.case(strategy, values=own, caller_features=own)]


def impatient(process: Process, strategy: str) -> list[Case]:
    """Time enough for the champion, and for a canary only if it is as quick."""
    return [process.case(strategy, timeout_seconds=0.011)]


def hopeless(process: Process, strategy: str) -> list[Case]:
    """No time for any model."""
    return [process.case(strategy, timeout_seconds=1e-9)]


def insistent(process: Process, strategy: str) -> list[Case]:
    """The same question many times, at those moments when the two models happen to differ."""
    case = process.case(strategy)
    assert case.features is not None
    return [process.case(strategy) for _ in range(50)] if is_doubtful(case.features[0]) else []


def unanswerable(process: Process, strategy: str) -> list[Case]:
    """An instrument that the server has no features of."""
    return [process.case(strategy, problem=pb.REASON_CODE_FEATURES_MISSING)]


@pytest.mark.long
@pytest.mark.parametrize("evil", [poisonous, impatient, hopeless, insistent, unanswerable])
async def test_no_single_caller_can_roll_a_canary_back(evil: Callable[[Process, str], list[Case]]) -> None:
    async with world() as w:
        champion = scores(OLD, lambda x: min(x, 1.0))
        w.one.primary.script = w.one.secondary.script = champion
        w.one.challenger.script = almost_good
        await w.start(steps=(0.5, 1.0))
        async with asyncio.TaskGroup() as orders:
            for number in range(10_000):
                for case in evil(w.one, f"evil-{number % 100}"):
                    orders.create_task(w.one.decide(case, 1_000_000 + number))
                await asyncio.sleep(1 / 300)
        assert w.state() in ("running", "promoted"), w.events()[-1].reason
        assert w.control.canary is not None
        assert w.control.canary.step >= 1, "nor can it hold the canary up"


async def test_pairs_are_kept_with_who_decided() -> None:
    async with world() as w:
        await w.start(steps=(0.5, 1.0))
        await asyncio.sleep(10)
    pairs = [pair for entry in w.journal.entries for pair in entry.score_pairs.pairs]
    assert len(pairs) > 500
    assert {pair.challenger_decided for pair in pairs} == {True, False}
    assert {(pair.champion_version, pair.challenger_version) for pair in pairs} == {(OLD, NEW)}
    assert len({pair.decision_id for pair in pairs}) == len(pairs)


async def test_a_promotion_that_crosses_a_rollback_is_taken_back() -> None:
    async with world() as w:
        await w.start(steps=(0.5, 1.0))
        running = w.control.canary
        assert running is not None
        # One process has just made it the champion when the other finds it worse.
        await w.two.deployment.make_champion(NEW, "server", "proven")
        await until(lambda: w.one.primary.wanted_version == NEW)
        await w.one.rollout.end(running, "rolled_back", "server", "worse")
        await until(lambda: w.one.primary.wanted_version == w.two.secondary.wanted_version == OLD)
        assert (w.state(), w.control.champion) == ("rolled_back", OLD)


async def test_a_canary_that_ends_while_it_is_loaded_for_promotion_does_not_become_the_champion() -> None:
    async with world() as w:
        await w.start(steps=(0.5, 1.0))
        running = w.control.canary
        assert running is not None
        promotion = asyncio.create_task(w.two.rollout.promote(running, "ann", "now"))
        await asyncio.sleep(0.05)
        await w.one.rollout.end(running, "rolled_back", "server", "worse")
        with pytest.raises(DeploymentError, match="no longer wanted"):
            await promotion
        assert (w.state(), w.control.champion) == ("rolled_back", "")


async def test_nobody_promotes_what_the_control_state_refuses_and_the_promotion_is_tried_again() -> None:
    async with world() as w:
        await w.start(steps=(1.0,))
        w.control.refuse_steps = True
        await asyncio.sleep(30)
        assert (w.state(), w.control.champion) == ("running", "")
        w.control.refuse_steps = False
        await until(lambda: w.state() == "promoted")
        assert w.control.champion == NEW


async def test_of_two_canaries_that_are_begun_at_once_one_begins() -> None:
    async with world() as w:
        begun = await asyncio.gather(w.start(), w.start(), return_exceptions=True)
        assert {type(one) for one in begun} == {type(None), CanaryError}
        assert [event.event for event in w.events()] == ["started"]


async def test_a_step_whose_answer_was_lost_is_kept_with_its_evidence_when_it_turns_out_to_have_been_made() -> None:
    async with world() as w:
        await w.start()
        w.control.doubtful = True
        await until(lambda: w.control.canary is not None and w.control.canary.step == 1)
        w.control.doubtful = False
        advanced = [event for event in w.events() if event.event == "advanced"]
        assert [(event.previous_weight, event.weight) for event in advanced] == [(0.05, 0.25)]
        assert advanced[0].orders > 0


async def test_a_step_that_was_overtaken_while_nobody_knew_of_it_is_not_kept() -> None:
    async with world() as w:
        await w.start()
        w.control.doubtful = True
        await until(lambda: bool(w.one.rollout._in_doubt))
        w.control.doubtful = False
        assert w.control.canary is not None
        await w.one.rollout.end(w.control.canary, "aborted", "ann", "enough")
        assert [event.event for event in w.events()] == ["started", "aborted"]


async def test_a_promotion_whose_answer_was_lost_has_all_that_follows_when_it_turns_out_to_have_been_made() -> None:
    async with world() as w:
        await w.start((1.0,))
        w.control.doubtful = True
        await until(lambda: w.control.champion == NEW)
        w.control.doubtful = False
        await until(lambda: w.state() == "promoted")
        assert w.one.registry.set == {"champion": NEW, "previous": OLD}, "the way back is known"
        await until(lambda: w.one.loader.versions["primary"] == {NEW})
        assert [event.event for event in w.events()] == ["started", "promoted"]


async def test_the_evidence_is_kept_as_it_grew_from_when_it_gets_its_orders_on_and_anew_for_the_next() -> None:
    async with world() as w:
        assert not w.one.rollout.history.at_ns, "there is no canary"
        await w.start()
        await until(lambda: len(w.one.rollout.history.at_ns) > 3)
        history = w.one.rollout.history
        assert history.at_ns[0] >= WALL_SECONDS * 1e9
        assert history.checks["rank"].samples[0] < history.checks["rank"].samples[-1]
        assert set(history.weight) == {0.05}
        running = w.control.canary
        assert running is not None
        await w.one.rollout.end(running, "aborted", "ann", "enough")
        kept = list(history.at_ns)
        await asyncio.sleep(3.0)
        assert w.one.rollout.history.at_ns == kept, "it stays to be looked at, and grows no more"
        second = Canary.start("canary-2", NEW, OLD, SETTINGS.steps, "ann", "again", w.one.wall())
        await w.one.rollout.start(second)
        await until(lambda: bool(w.one.rollout.history.at_ns))
        assert w.one.rollout.history.at_ns[0] > kept[-1]
