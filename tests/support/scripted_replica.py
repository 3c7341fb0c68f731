"""A replica whose model server the test plays; its breaker, batcher, latency and probes are the real ones."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np

from feature_cache.feature_set import FeatureSet
from feature_cache.features import MF1
from server.inference.batcher import BatcherSettings
from server.inference.breaker import BreakerSettings
from server.inference.outcome import BatchFailedError, Outcome
from server.inference.replica import Replica, ReplicaLimits, ReplicaSettings
from server.inference.wire import ModelIdentity, ScoreBatch

Script = Callable[[list[bytes]], Awaitable[ScoreBatch]]


class ScriptedReplica(Replica):
    """Asks `script` instead of TorchServe; open no channel with it."""

    def __init__(
        self,
        name: str,
        script: Script,
        batcher_settings: BatcherSettings | None = None,
        breaker_settings: BreakerSettings | None = None,
        stalled_seconds: Callable[[float], float] = lambda since: 0.0,
        warm_up_seconds: float = 0.0,
        feature_set: FeatureSet | None = None,
    ) -> None:
        self._set = feature_set
        super().__init__(
            name,
            "nowhere",
            "champion",
            None,
            ReplicaLimits(
                ReplicaSettings(warm_up_seconds=warm_up_seconds),
                batcher_settings or BatcherSettings(),
                breaker_settings or BreakerSettings(),
            ),
            clock=asyncio.get_running_loop().time,
            random=lambda: 0.5,
            stalled_seconds=stalled_seconds,
        )
        self.script = script
        self.calls = 0

    @property
    def feature_set(self) -> FeatureSet:
        """That of its model, where the test says which."""
        return self._set or super().feature_set

    async def _score(self, rows: list[bytes], traceparent: str = "") -> ScoreBatch:
        self.calls += 1
        return await self.script(rows)

    def start_probing(self) -> asyncio.Task[None]:
        """The probes of a replica, without its channel; the test cancels them."""
        return asyncio.create_task(self._probe_forever())


def answers(
    score: float,
    after_seconds: float = 0.001,
    threshold: float = 0.5,
    version: str = "aa" * 8,
    feature_set: FeatureSet = MF1,
) -> Script:
    """Gives every row this score."""

    async def script(rows: list[bytes]) -> ScoreBatch:
        await asyncio.sleep(after_seconds)
        model = ModelIdentity("champion", version, threshold, 0, feature_set)
        return ScoreBatch(model, np.full(len(rows), score, dtype=np.float32))

    return script


def fails(outcome: Outcome, after_seconds: float = 0.001) -> Script:
    """Fails every batch."""

    async def script(_rows: list[bytes]) -> ScoreBatch:
        await asyncio.sleep(after_seconds)
        raise BatchFailedError(outcome, "scripted")

    return script


async def hangs(_rows: list[bytes]) -> ScoreBatch:
    """Takes an hour."""
    await asyncio.sleep(3_600)
    raise AssertionError("nobody waits that long")
