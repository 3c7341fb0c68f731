"""Promotes a canary or rolls it back: each process by its own evidence, all of them through the control state.

A process that finds the canary worse rolls it back on all servers at once. The control state refuses a step if anything
in it has changed meanwhile, so no process takes a step with a canary that another has just rolled back. Only an
operator starts a canary: a version that was rolled back stays out until an operator starts it again.

The version on trial is served by the challenger's replica, separate from the one that decides all other orders. How it
becomes the champion is described in `server/models/deployment.py`.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import structlog

from pretrade.audit.v1 import packet_pb2
from server.canary.burn import BurnRate, Objective, SloSettings
from server.canary.events import EventLog
from server.canary.evidence import Evidence, FirstAttempt, ScoredPair, Verdict
from server.canary.history import EvidenceHistory
from server.canary.markouts import Markouts
from server.canary.pairing import Side
from server.canary.pairs import MOST_IN_ENTRY
from server.canary.plan import Canary, StateName
from server.canary.settings import CanarySettings
from server.errors import ChangeInDoubtError, ControlError
from server.inference.outcome import Outcome
from server.models.deployment import AGAIN_SECONDS, NOT_LOADED, Deployment

if TYPE_CHECKING:
    from pretrade.admin.v1 import admin_pb2
    from pretrade.decision.v1 import decision_pb2 as pb
    from server.canary.pairs import PairRecorder
    from server.canary.routing import CanaryRouting
    from server.inference.pool import Role
    from server.inference.replica import Replica
    from server.inference.shadow import Pair, Pairs

_log = structlog.get_logger(__name__)

SERVER: Final = "server"
"""Author of what no operator did."""
_LOOK_SECONDS: Final = 0.1
_SLOW_LOOK_SECONDS: Final = 1.0
_BURN_WINDOWS_SECONDS: Final = (10, 300, 1_800, 3_600, 21_600)
_AFFECTED: Final = 1_000
"""Newest decisions of the canary whose ids are kept."""
_IN_DOUBT: Final = 64
"""Turns of which it is not known whether they were made. An attempt takes two seconds until that is so."""

SetCanary = Callable[[Canary, str, str, bool], Awaitable["admin_pb2.Change"]]
"""Puts a canary into the control state: it, author, reason, and whether nothing else may have changed meanwhile on any
server."""


class CanaryError(Exception):
    """What was asked for cannot be done as things are."""


class Rollout:
    """The canary as this process sees it.

    No single caller can decide its fate. What callers control is left out of the evidence: rows with their own
    features, batches that failed with such a row in them, orders that allow a model too little time, and a row that is
    asked for again before the market moved, because that is the same observation. See `Objective`, `CanaryRouting` and
    `Replica._begin`.

    Args:
        settings, slo: Limits.
        processes: Those of this server; each judges the canary by evidence of its own.
        deployment: The champion's replicas, and the versions on them.
        challenger: Where the canary is served.
        routing: Gives it its orders.
        markouts: Knows the outcomes of decided rows.
        set_canary: Changes the control state.
        objective: Counts the calls that a model answered in time, and those that none did.
        events: Records the canary's changes of state.
        recorder: Records the pairs; None: they are not recorded.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        settings: CanarySettings,
        slo: SloSettings,
        processes: int,
        deployment: Deployment,
        challenger: Role,
        routing: CanaryRouting,
        markouts: Markouts,
        set_canary: SetCanary,
        objective: Objective,
        events: EventLog,
        recorder: PairRecorder | None,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._slo = slo
        self._judges = settings.judges or processes
        self._deployment = deployment
        self._challenger = challenger
        self._routing = routing
        self._markouts = markouts
        self._set_canary = set_canary
        self._objective = objective
        self.events = events
        """Changes of canaries that this process made."""
        self._recorder = recorder
        self._clock = clock
        self.burn = BurnRate(slo.objective)
        self.burn_rates = dict.fromkeys(_BURN_WINDOWS_SECONDS, 0.0)
        """By window in seconds, a second old at most."""
        self.canary: Canary | None = None
        """The one that is under way or ended last; None when there never was one."""
        self.evidence = Evidence(settings, clock, self._judges)
        """What this process knows of it."""
        self.history = EvidenceHistory()
        """How that grew."""
        self.decisions = 0
        """Decisions of this process that it answered."""
        self.affected: deque[str] = deque(maxlen=_AFFECTED)
        """Their ids, the newest last."""
        self._seen: dict[tuple[str, pb.Side.ValueType], int] = {}
        """The newest vector of an instrument, by side, that both models have scored."""
        self._joined_at = 0.0
        self._in_doubt: deque[tuple[Canary, packet_pb2.CanaryEvent]] = deque(maxlen=_IN_DOUBT)
        """Changes of state of which it is not known whether all servers apply them, and the canary after each."""
        self._own_version = ""
        """What the challenger's replica served by itself before a canary came; empty while nothing was seen."""
        self._promotion: asyncio.Task[object] | None = None
        self._next_attempt = -float("inf")

    @property
    def flows(self) -> tuple[int, int]:
        """Different flows with orders since this canary began, as this process saw them, and how many are its own."""
        return (0, 0) if self.canary is None else self._routing.flows(self.canary)

    # What the control state says.

    def apply_canary(self, canary: Canary | None) -> None:
        """Puts what the control state says of the canary in force in this process.

        One that ended gets no more orders from this moment on; a new one gets its first when the challenger's replica
        of this server has been seen to serve it.
        """
        before, self.canary = self.canary, canary
        for after, event in self._in_doubt:
            if canary == after:
                self.events.keep(event)
        self._in_doubt.clear()
        if canary is None or not canary.running:
            self._routing.canary = None
            self._routing.promoted = canary.model_version if canary is not None and canary.state == "promoted" else ""
            self._want(None)
            if self._promotion is not None and (canary is None or canary.state != "promoted"):
                self._promotion.cancel()
            return
        if before is None or before.canary_id != canary.canary_id:
            model = self._challenger.model
            if model is not None and all(one.wanted_version is None for one in self._challenger.replicas):
                self._own_version = model.version
            self._routing.canary = None
            self._routing.forget_flows()
            self.evidence = Evidence(self._settings, self._clock, self._judges)
            self.history = EvidenceHistory()
            self.decisions = 0
            self.affected.clear()
            self._deployment.spawn(self._join(canary))
            return
        if before.step_started_at != canary.step_started_at:
            self.evidence.restart()
        if self._routing.canary is not None:
            self._routing.canary = canary

    async def _join(self, canary: Canary) -> None:
        """Has the challenger of this server serve the canary, half of its endpoints, and then gives it its orders."""
        while self._runs(canary.canary_id):
            replicas = self._challenger.replicas
            taken = [one for one in replicas if await self._deployment.loads(one, canary.model_version)]
            if taken and 2 * len(taken) >= len(replicas):
                judged, champion = [
                    await self._deployment.markout_of(version)
                    for version in (canary.model_version, canary.champion_version)
                ]
                if (now := self.canary) is not None and self._runs(canary.canary_id):
                    self._markouts.begin(judged)
                    self.evidence = Evidence(
                        self._settings,
                        self._clock,
                        self._judges,
                        span_seconds=judged.span_seconds,
                        same_label=judged == champion,
                    )
                    self._want(now.model_version)
                    for replica in replicas:
                        if replica not in taken:
                            replica.ejected = f"does not serve canary {now.model_version}"
                            self._deployment.spawn(self._follow(replica, now))
                    self._routing.canary = now
                    self._joined_at = self._clock()
                return
            await asyncio.sleep(AGAIN_SECONDS)

    # What the decision path says.

    def observe_pair(self, pair: Pair) -> None:
        """A row that both models scored."""
        if self._recorder is not None:
            self._recorder.add(pair)
        is_of_this = self._is_of_this(pair.champion.version, pair.challenger.version)
        if is_of_this and self._is_new(pair.instrument, pair.side, pair.sequence):
            self._judge_by(pair)

    def observe_pairs(self, pairs: Pairs) -> None:
        """Rows that were decided and scored by the other model in columns."""
        if self._recorder is not None:
            self._recorder.add_together(pairs)
        if self._is_of_this(pairs.champion_version, pairs.challenger_version):
            # Most rows of a block say nothing new, and no pair is made of them: this is a turn of the event loop.
            questions = zip(pairs.instruments, pairs.sides, pairs.views, strict=True)
            for place, (instrument, side, view) in enumerate(questions):
                if self._is_new(instrument, side, view.snapshot.sequence):
                    self._judge_by(pairs.pair(place))

    def _is_of_this(self, champion_version: str, challenger_version: str) -> bool:
        """Whether what these versions say of one row is evidence about this canary."""
        canary = self._routing.canary
        versions = champion_version, challenger_version
        return canary is not None and versions == (canary.champion_version, canary.model_version)

    def _is_new(self, instrument: str, side: pb.Side.ValueType, sequence: int | None) -> bool:
        """True when the market has moved since the newest row of this instrument and side that both models scored."""
        question = instrument, side
        if sequence is None or sequence <= self._seen.get(question, -1):
            return False
        self._seen[question] = sequence
        return True

    def _judge_by(self, pair: Pair) -> None:
        """Counts a pair of this canary's that says something new as evidence."""
        self.evidence.observe_pair(pair.instrument, _scored(pair))
        self._markouts.add(pair)

    def observe_decision(self, decision_id: str) -> None:
        """A decision that the canary answered."""
        self.decisions += 1
        self.affected.append(decision_id)

    def observe_outcome(self, pair: Pair, eligible: bool) -> None:
        """What became of a row that both models scored: True when the order was eligible."""
        canary = self._routing.canary
        if canary is not None and pair.challenger.version == canary.model_version:
            self.evidence.observe_outcome(pair.instrument, _scored(pair), eligible)

    def observe_order(self, side: Side, attempt: FirstAttempt) -> None:
        """An order that gave a model a fair chance."""
        self.evidence.observe_order(side, attempt)

    def observe_batch(self, side: Side, outcome: Outcome, seconds: float) -> None:
        """A batch at the canary's replica or a champion's."""
        if self._routing.canary is not None:
            self.evidence.observe_batch(side, outcome, seconds)

    # What follows from it.

    async def run(self) -> None:
        """Looks at the evidence ten times a second, until cancelled."""
        next_slow_look = 0.0
        try:
            while True:
                await asyncio.sleep(_LOOK_SECONDS)
                try:
                    self._markouts.settle()
                    if self._recorder is not None:
                        self._recorder.flush(MOST_IN_ENTRY)  # all at once a second would be a stop of milliseconds
                    if self._clock() >= next_slow_look:
                        next_slow_look = self._clock() + _SLOW_LOOK_SECONDS
                        self._look_around()
                    if self.canary is not None and self.canary.running:
                        await self._judge(self.canary)
                except Exception:
                    # A fault of ours must not take the server down with it; the next look may do better.
                    _log.exception("canary not judged")
        finally:
            self._deployment.close()

    def _look_around(self) -> None:
        """What is done once a second, canary or not."""
        self.burn.sample(self._clock(), self._objective.met, self._objective.missed)
        for seconds in self.burn_rates:
            self.burn_rates[seconds] = self.burn.rate(seconds, 1)
        if self._recorder is not None:
            self._recorder.flush()
        self._deployment.repair()
        if self._routing.canary is not None:
            self.history.look(self.evidence, self._routing.canary.weight, self.events.wall_clock_ns())

    async def _judge(self, canary: Canary) -> None:
        if self._routing.canary is None:
            return  # not served here yet, and judged by those that serve it
        if not self._challenger.available and any(replica.available for replica in self._deployment.champions):
            # Nothing is sent to it any more: its being out is all there is to be seen.
            self.evidence.observe_batch(Side.CANARY, Outcome.TRANSPORT, math.nan)
        self.evidence.settle()
        verdict, now = self.evidence.verdict, self._wall_seconds()
        # What burned before its first order is not its doing.
        rules = (*self._slo.rules(), self._slo.canary_rule())
        burning = [rule for rule in rules if self.burn.fires(rule, since=self._joined_at)]
        if verdict is Verdict.WORSE:
            await self.end(canary, "rolled_back", SERVER, self.evidence.reason)
        elif burning:
            await self.end(canary, "rolled_back", SERVER, f"the error budget burns: {', '.join(map(str, burning))}")
        elif canary.held or canary.awaits_operator or self._promotion is not None:
            return
        elif verdict is Verdict.BETTER_OR_EQUAL and now - canary.step_started_at >= self._settings.dwell_seconds:
            if self._clock() < self._next_attempt:
                return
            self._next_attempt = self._clock() + _LOOK_SECONDS * 5  # somebody else may have been faster
            if canary.at_last_step:
                self._promotion = self._deployment.spawn(self._promote_quietly(canary))
            else:
                await self._advance(canary, now)
        elif now - canary.step_started_at > self._settings.patience_seconds:
            why = f"not proven within {self._settings.patience_seconds:g} s: {self.evidence.reason}"
            await self.end(canary, "rolled_back", SERVER, why)

    async def _advance(self, canary: Canary, now: float) -> None:
        after = canary.advanced(now)
        reason = f"{canary.weight:.0%} of the flows: {self.evidence.reason}"
        try:
            await self.turn("advanced", canary, after, SERVER, reason, self._set_canary(after, SERVER, reason, True))
        except Exception as error:
            # Another process was faster, or Redis is away: the next look sees what is in force by then.
            _log.info("canary not moved on", error=str(error))

    async def turn(
        self,
        name: str,
        before: Canary,
        after: Canary,
        author: str,
        reason: str,
        change: Awaitable[admin_pb2.Change],
    ) -> admin_pb2.Change:
        """Makes all servers apply a canary's new state by this change, and records it with the evidence of this moment.

        If it is not known whether the change was made, it is recorded as soon as it is seen.

        Raises:
            ControlError: As the change.
        """
        event = self._event(name, before, after, author, reason)
        try:
            made = await change
        except ChangeInDoubtError:
            self._in_doubt.append((after, event))
            raise
        self.events.keep(event)
        return made

    async def end(self, canary: Canary, state: StateName, author: str, reason: str) -> admin_pb2.Change:
        """Ends a canary for everybody, at once."""
        after = canary.ended(state, reason, self._wall_seconds())
        event = self._event(state, canary, after, author, reason)
        # In force here before anything is written: what is worse gets no more orders, whatever else is broken.
        self.apply_canary(after)
        change = await self._set_canary(after, author, reason[:256], False)
        self.events.keep(event)
        if state != "promoted":
            if self._deployment.champion_version == canary.model_version:
                # Somebody else was promoting it at this very moment.
                await self._deployment.make_champion(canary.champion_version, author, reason[:256])
            if canary.model_version != self._own_version:  # else shadow rows go to it, as before
                self._deployment.spawn(self._deployment.unload(self._challenger, canary.model_version))
        return change

    async def start(self, canary: Canary) -> admin_pb2.Change:
        """Loads a version onto the challenger's replica, checks it, and gives it its first orders.

        Raises:
            CanaryError: It cannot be begun as things are.
            ModelUnknownError, ModelUnusableError, LoadError: The version is not fit.
            ControlError: The control state changed meanwhile, or is not known, or it is not known whether it changed.
        """
        self._refuse_a_second()
        if canary.model_version == canary.champion_version:
            raise CanaryError(f"{canary.model_version} is the champion")
        await self._deployment.load(canary.model_version, (self._challenger,))
        self._refuse_a_second()  # somebody else may have been faster
        now = self._wall_seconds()
        canary = canary.model_copy(update={"started_at": now, "step_started_at": now})
        change = self._set_canary(canary, canary.author, canary.reason, True)
        return await self.turn("started", canary, canary, canary.author, canary.reason, change)

    async def promote(self, canary: Canary, author: str, reason: str) -> admin_pb2.Change:
        """Makes the canary the champion.

        Raises:
            ModelUnknownError, ModelUnusableError, LoadError, DeploymentError: It could not be loaded, or ended
                meanwhile; nothing changed.
            ControlError: The control state changed meanwhile, or is not known; nothing changed.
            ChangeInDoubtError: It is not known whether all servers have the new champion. The canary goes on.
        """
        await self._deployment.make_champion(canary.model_version, author, reason, lambda: self._runs(canary.canary_id))
        return await self.end(canary, "promoted", author, reason)

    def _refuse_a_second(self) -> None:
        if self.canary is not None and self.canary.running:
            raise CanaryError(f"canary {self.canary.canary_id} is under way; abort it first")

    def join(self, replica: Replica) -> None:
        """Has an endpoint that is new to the challenger serve the canary too, before it gets orders."""
        if self.canary is not None and self.canary.running:
            replica.wanted_version = self.canary.model_version
            replica.ejected = f"does not serve canary {self.canary.model_version} yet"
            self._deployment.spawn(self._follow(replica, self.canary))

    async def _follow(self, replica: Replica, canary: Canary) -> None:
        """Has one of several endpoints join the others, as soon as it serves the canary too."""
        while self._runs(canary.canary_id):
            await asyncio.sleep(AGAIN_SECONDS)
            if await self._deployment.loads(replica, canary.model_version):
                replica.ejected = ""
                return

    def _want(self, version: str | None) -> None:
        """Has the challenger score with this version alone; None for what it serves by itself."""
        for replica in self._challenger.replicas:
            replica.wanted_version = version
            replica.ejected = ""

    def _runs(self, canary_id: str) -> bool:
        return self.canary is not None and self.canary.running and self.canary.canary_id == canary_id

    async def _promote_quietly(self, canary: Canary) -> None:
        """Promotes on evidence; what fails is tried again until the canary's patience is over."""
        reason = f"{canary.weight:.0%} of the flows: {self.evidence.reason}"
        try:
            await self.promote(canary, SERVER, reason)
        except (*NOT_LOADED, ControlError) as error:
            _log.error("canary not promoted, tried again", error=str(error))
            self._next_attempt = self._clock() + AGAIN_SECONDS
        finally:
            self._promotion = None

    def _event(self, name: str, before: Canary, after: Canary, author: str, reason: str) -> packet_pb2.CanaryEvent:
        """An event of the canary, with the evidence of this moment."""
        return self.events.event(self.evidence, self.decisions, name, before, after, author, reason)

    def _wall_seconds(self) -> float:
        return self.events.wall_clock_ns() / 1e9


def _scored(pair: Pair) -> ScoredPair:
    challenger, champion = pair.challenger, pair.champion
    return ScoredPair(challenger.score, challenger.threshold, champion.score, champion.threshold)
