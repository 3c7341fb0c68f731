"""A model server that answers as TorchServe with our handler does, or as badly as a fault has it."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
import numpy as np

from feature_cache.features import MF1
from pretrade.wire.torchserve import inference_pb2
from simulation import guest

if TYPE_CHECKING:
    from random import Random

_HEADER: Final = struct.Struct("<4sI8sfIQ")
CHAMPION: Final = "aa" * 8
CHALLENGER: Final = "cc" * 8
SECOND: Final = "bb" * 8
"""The version of the second model, wherever it is served."""
THRESHOLD: Final = 0.5


@dataclass(slots=True)
class Health:
    """How a model server does now."""

    latency: tuple[float, float] = (5e-4, 2e-3)
    down: bool = False
    hangs: bool = False
    fails: grpc.StatusCode | None = None
    scores: tuple[float, ...] = ()
    """Given instead of true ones, in turn; NaN among them."""
    version: str | None = None
    """Named instead of the true one."""


class ModelServer:
    """One model server; every server process has a connection of its own to it.

    Args:
        name: `primary`, `secondary` or `challenger`.
        version: Of its model.
        chance: What it needs of chance.
    """

    def __init__(self, name: str, version: str, chance: Random) -> None:
        self.name = name
        self.health = Health()
        self.version = version
        self._chance = chance
        self.calls = 0

    async def predict(self, request: inference_pb2.PredictionsRequest) -> inference_pb2.PredictionResponse:
        """Answers a batch, in the event loop of whoever asks.

        Raises:
            AioRpcError: As the fault has it.
        """
        self.calls += 1
        health = self.health
        if health.down:
            await asyncio.sleep(self._chance.uniform(1e-4, 1e-3))
            raise _error(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses")
        while self.health.hangs:  # noqa: ASYNC110 - it goes on where it was, once it is well
            await asyncio.sleep(0.05)
        await asyncio.sleep(self._chance.uniform(*health.latency))
        if self.health.down:
            raise _error(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        if health.fails is not None:
            raise _error(health.fails, "the model is unwell")
        is_second = request.model_name == guest.MODEL
        feature_set = guest.GUEST if is_second else MF1
        wanted = b"%08x" % feature_set.fingerprint
        if (given := request.input["feature_set"]) != wanted:
            details = f"Prediction failed: `feature_set` is {given!r}, this model's is {wanted.decode()}"
            raise _error(grpc.StatusCode.UNAVAILABLE, details)
        rows = np.frombuffer(request.input["input"], dtype="<f4").reshape(-1, len(feature_set))
        scores = np.array([score_of(row) for row in rows], dtype="<f4")
        if health.scores:
            first = self.calls  # with every call another one: many have one row
            scores = np.resize(np.roll(np.array(health.scores, dtype="<f4"), -first), len(rows))
        version = bytes.fromhex(SECOND if is_second else health.version or self.version)
        header = _HEADER.pack(b"PTS1", len(rows), version, THRESHOLD, feature_set.fingerprint, 0)
        return inference_pb2.PredictionResponse(prediction=header + scores.tobytes())


def score_of(row: Any) -> float:
    """The score of a row: what stands in its first feature, so that a test can choose it; ¾ for an ordinary one."""
    first = float(row[0])
    return first if 0.0 < first < 1.0 else 0.75


class ModelChannel:
    """A channel to a model server."""

    def __init__(self, server: ModelServer) -> None:
        self._server = server

    def unary_unary(self, *_: object, **__: object) -> Any:
        """The method that scores; the others are not asked for."""

        async def ask(request: Any, timeout: float | None = None, metadata: object = None) -> Any:  # noqa: ASYNC109
            try:
                async with asyncio.timeout(timeout):
                    return await self._server.predict(request)
            except TimeoutError:
                raise _error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded") from None

        return ask

    def unary_stream(self, *_: object, **__: object) -> None:
        """Not needed by any codec."""

    stream_stream = stream_unary = unary_stream

    async def close(self, grace: float | None = None) -> None:
        """Nothing is kept open."""


def _error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
