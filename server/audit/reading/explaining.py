"""Explanations beside replies: asked for when the decision is durable, and waited for no longer than the caller can."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import structlog
from pydantic import BaseModel, ConfigDict, Field

from feature_cache.constants import Constant
from pretrade.audit.v1 import audit_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.wire.reading import reading_pb2
from server.audit.reading.explain import SCORED, no_model, unavailable
from server.audit.reading.reading import Question, Reading
from server.errors import AuditError

_log = structlog.get_logger(__name__)


_LOOK_SECONDS: Final = 1.0
"""Between two looks whether another model decides."""
_WARM_UP_SECONDS: Final = 15.0
"""The most that the start of the server waits for the first model."""
_AGAIN_SECONDS: Final = 60.0
"""After a model could not be loaded."""


class Explained(Protocol):
    """A decision, as far as its explanation goes by it."""

    @property
    def decision_id(self) -> str: ...  # noqa: D102
    @property
    def source(self) -> pb.Source.ValueType: ...  # noqa: D102


class ExplainSettings(BaseModel):
    """Explanations that callers of `Decide` ask for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patience_seconds: float = Field(default=0.25, ge=0, le=10)
    """How long a reply waits for its explanation, in seconds, if the call's deadline allows it; 0: not at all. A server
    has the model that decides loaded before it is ready, and those that the model map names soon after; after a change
    of model, explanations of the first seconds are LATE."""
    reply_reserve_seconds: Constant[float] = 0.005
    """Kept before the call's deadline for sending the reply, in seconds."""


class Explaining:
    """Explains decisions that were just made, in a process of its own that reads the journal and runs the models.

    The decision path does not know this class. At most 32 requests wait; further ones are refused at once.

    Args:
        reading: The process.
        settings: How long to wait.
        counts: Explanations asked for beside replies, by status; added to here.
        clock: Monotonic seconds, the event loop's own.
        versions: The model versions that decide, which are loaded before anybody asks, as far as they are known; the
            first one before the server serves.
    """

    def __init__(
        self,
        reading: Reading,
        settings: ExplainSettings,
        counts: Counter[int],
        clock: Callable[[], float],
        versions: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._reading = reading
        self._settings = settings
        self._counts = counts
        self._clock = clock
        self._asking: set[asyncio.Task[bytes]] = set()
        self._versions = versions if settings.patience_seconds else tuple
        self._tried = False
        self._loaded: dict[str, int] = {}
        """The versions that were loaded, each with how many processes had ended before."""
        self._problems: dict[str, tuple[str, float]] = {}
        """Why a version that decides is not loaded, and when it is tried again."""

    @property
    def problem(self) -> str:
        """Why a model that decides cannot be explained; empty when each can, or nobody knows yet."""
        return "; ".join(problem for problem, _ in self._problems.values())

    @property
    def warming_up(self) -> bool:
        """True while the first model that decides is being loaded, for a bounded time."""
        return not self._tried and bool(self._versions())

    async def keep_warm(self) -> None:
        """Has the models that decide loaded, also after others took their places, until cancelled."""
        while True:
            version = self._next()
            if version is None:
                await asyncio.sleep(_LOOK_SECONDS)
            else:
                await self._warm_up(version)

    def _next(self) -> str | None:
        """The version to load now; forgets those that decide no more."""
        wanted = self._versions()
        for known in (self._loaded, self._problems):
            for version in known.keys() - set(wanted):
                del known[version]
        now, ended = self._clock(), self._reading.ended
        waiting = (one for one in wanted if self._loaded.get(one) != ended)
        return next((one for one in waiting if one not in self._problems or self._problems[one][1] <= now), None)

    async def _warm_up(self, version: str) -> None:
        request, ended = reading_pb2.WarmUpRequest(model_version=version), self._reading.ended
        try:
            async with asyncio.timeout(_WARM_UP_SECONDS):
                await self._reading.ask(Question.WARM_UP, request.SerializeToString())
        except (AuditError, TimeoutError) as error:
            problem = f"version {version} is not loaded: {str(error) or 'it takes too long'}"
            self._problems[version] = problem, self._clock() + _AGAIN_SECONDS
            _log.warning("no explanations", problem=problem)
        else:
            self._problems.pop(version, None)
            self._loaded[version] = ended
        self._tried = True

    async def explanation(self, decision: Explained, deadline: float | None) -> pb.Explanation:
        """The explanation of a durable decision, or why there is none.

        Args:
            decision: As it is about to be replied.
            deadline: The call's, an instant of the clock; None without one.

        Cancelling is safe: an explanation under way is finished and dropped.
        """
        if decision.source in SCORED:
            answer = await self._within(decision.decision_id, self._until(deadline))
        else:
            answer = no_model(decision.source)
        self._counts[answer.status] += 1
        return answer

    def _until(self, deadline: float | None) -> float:
        patience = self._clock() + self._settings.patience_seconds
        return patience if deadline is None else min(patience, deadline - self._settings.reply_reserve_seconds)

    async def _within(self, decision_id: str, until: float) -> pb.Explanation:
        request = audit_pb2.ExplainDecisionRequest(decision_id=decision_id)
        asking = asyncio.create_task(self._reading.ask(Question.EXPLAIN, request.SerializeToString()))
        self._asking.add(asking)
        asking.add_done_callback(self._asked)
        try:
            async with asyncio.timeout_at(until):
                # It goes on when it is late: it may be what loads the model, for the explanations that follow.
                answer = await asyncio.shield(asking)
            return audit_pb2.ExplainDecisionResponse.FromString(answer).explanation
        except TimeoutError:
            return pb.Explanation(
                status=pb.EXPLANATION_STATUS_LATE,
                decision_id=decision_id,
                message="not ready before the reply had to leave: ask AuditService.ExplainDecision",
            )
        except AuditError as error:
            _log.warning("no explanation", decision_id=decision_id, error=str(error))
            return unavailable(str(error))

    def _asked(self, asking: asyncio.Task[bytes]) -> None:
        self._asking.discard(asking)
        if not asking.cancelled():
            asking.exception()  # retrieved, also when no caller waits for it any more
