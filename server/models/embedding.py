"""Keeps the champion's model in this process: finds its archive, proves it, and swaps it in between two decisions.

The version is the champion's: the one that the control state or the settings name, else the one that the primary served
last. The registry's alias `champion` counts only while none was named and none has been served since the start, because
it says what a model server should be started with, not what decides.

An archive is read, loaded and proven in a thread. It answers nothing before it has given the scores that it gave when
it was exported. One that does not, that has expired or that wants other features is refused, and tried again later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import structlog

from pretrade.decision.v1 import decision_pb2 as pb
from server.errors import ModelFailedError, ModelUnknownError
from server.inference.embedded import EmbeddedScorer, problem_of_library
from server.inference.embedded_margins import CannotScoreError
from server.inference.model_names import DEFAULT
from server.inference.wire import ModelIdentity
from server.models.archive import Archive, ModelStore, Rescored
from server.models.registry import ModelUnusableError, Registry, record_of

_log = structlog.get_logger(__name__)

_LOOK_SECONDS: Final = 0.1
"""Between two looks which version is the champion's."""
_AGAIN_SECONDS: Final = 10.0
"""Between two attempts at a version that was refused, or whose archive is not there. A look reads the whole store."""
_TOLERANCE: Final = 1e-6
"""Of a reference score."""
_MOST_LOADED: Final = 8
"""Versions that replays keep, some 0.2 MiB each."""
_REFUSED: Final = (ModelUnknownError, ModelUnusableError, CannotScoreError, OSError)


class EmbeddedModel:
    """The champion in this process; what `fallback.embedded.Embedded` scores with.

    Args:
        model_store: Folder with the archives; None: this server has no model of its own.
        name: Under which the replicas serve the champion.
        champion_version: The champion's version; empty while none is known.
        clock: Monotonic seconds.
        model: Whose champion it is, for the registry's alias.
    """

    def __init__(
        self,
        model_store: Path | None,
        name: str,
        champion_version: Callable[[], str],
        clock: Callable[[], float],
        model: str = DEFAULT,
    ) -> None:
        self._model = model
        self._model_store = model_store
        self._name = name
        self._champion_version = champion_version
        self._clock = clock
        self._loaded: EmbeddedScorer | None = None
        self._alias = ""
        """The registry's champion, while no other is known."""
        self._not_loaded = ""
        """The version that was tried last and is not loaded."""
        self._why_not = ""
        self._next_attempt = -float("inf")
        self.loads = 0
        """Versions loaded since start."""
        self.refused = 0
        """Attempts at a version that did not load, since start."""

    @property
    def scorer(self) -> EmbeddedScorer | None:
        """The champion's version; None when that is not loaded."""
        loaded = self._loaded
        return loaded if loaded is not None and loaded.version == self._wanted else None

    @property
    def lack(self) -> pb.Degradation.ValueType:
        """Why there is no scorer; unspecified where the server is to have none, or has one."""
        if self._model_store is None or self.scorer is not None:
            return pb.DEGRADATION_UNSPECIFIED
        if self._loaded is None:
            return pb.DEGRADATION_EMBEDDED_NO_MODEL
        return pb.DEGRADATION_EMBEDDED_OTHER_VERSION

    @property
    def version(self) -> str:
        """The version that is loaded, be it the champion's or not any more; empty without one."""
        return "" if self._loaded is None else self._loaded.version

    @property
    def problem(self) -> str:
        """Why orders are not answered; empty when they are."""
        if self._model_store is None:
            return "no model: this server has no model store (PRETRADE_REPLAY__MODEL_STORE)"
        if problem := problem_of_library():
            return f"no model: {problem}"
        if self.scorer is not None:
            return ""
        if not self._wanted:
            return "no model: no champion is known yet"
        if self._why_not and self._not_loaded == self._wanted:
            return f"no model: version {self._wanted}: {self._why_not}"
        return f"no model: version {self._wanted} is being loaded"

    @property
    def fault(self) -> str:
        """The same, but empty where this server is to have no model: without a model store or XGBoost."""
        return "" if self._model_store is None or problem_of_library() else self.problem

    @property
    def _wanted(self) -> str:
        return self._champion_version() or self._alias

    async def run(self) -> None:
        """Follows the champion's version, until cancelled."""
        if self._model_store is None or problem_of_library():
            _log.info("no embedded model", problem=self.problem)
            await asyncio.Event().wait()  # a component that ends takes the server with it
            return
        while True:
            await self._follow(self._model_store)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _follow(self, model_store: Path) -> None:
        """Loads the champion's version, unless that is loaded already or was tried a moment ago."""
        if not self._champion_version():
            registry = Registry(model_store, self._model)
            self._alias = await asyncio.to_thread(lambda: registry.aliases().get("champion", ""))
        version = self._wanted
        if not version or version == self.version:
            return
        if version == self._not_loaded and self._clock() < self._next_attempt:
            return
        try:
            scorer = await asyncio.to_thread(self._proven, model_store, version)
        except _REFUSED as error:
            self._refuse(version, str(error))
        except Exception as error:
            # Whatever an archive holds, the server goes on without it.
            _log.exception("embedded model not loaded", version=version)
            self._refuse(version, repr(error))
        else:
            self._loaded, self._not_loaded, self._why_not = scorer, "", ""
            self.loads += 1
            _log.info("embedded model loaded", version=version)

    def _refuse(self, version: str, why: str) -> None:
        self.refused += 1
        if (version, why) != (self._not_loaded, self._why_not):
            _log.warning("embedded model refused, tried again", version=version, error=why)
        self._not_loaded, self._why_not = version, why
        self._next_attempt = self._clock() + _AGAIN_SECONDS

    def _proven(self, model_store: Path, version: str) -> EmbeddedScorer:
        """A version that has given its reference scores. Blocks.

        Raises:
            ModelUnknownError: There is no such archive, or its content is not what its version says.
            ModelUnusableError: It wants other features, or has no reference scores or gives others.
            CannotScoreError: It cannot be scored in this process.
        """
        archive = ModelStore([model_store]).find(version)
        record = record_of(archive, created_at=0.0)
        if record.problem:
            raise ModelUnusableError(record.problem)
        if not len(record.canned_scores):
            raise ModelUnusableError("it has no reference scores to be checked by")
        scorer = _scorer_of(archive, self._name)
        scores = scorer.scores(record.canned_rows.astype("<f4").tobytes())
        difference = float(np.max(np.abs(scores - record.canned_scores)))
        if not difference <= _TOLERANCE:  # also for NaN
            raise ModelUnusableError(f"it is {difference:.3g} off its reference scores")
        return scorer


class EmbeddedModels:
    """Versions that score in this process for replays; used by one thread.

    Args:
        archive_of: The archive of this model version; raises `ModelUnknownError`.
    """

    def __init__(self, archive_of: Callable[[str], Archive]) -> None:
        @lru_cache(_MOST_LOADED)
        def scorer_of(version: str) -> EmbeddedScorer:
            archive = archive_of(version)
            return _scorer_of(archive, archive.name)

        self._scorer_of = scorer_of

    def score(self, version: str, row: bytes, batch_rows: int, batch_index: int) -> Rescored:
        """What the version says of a row, exactly as the embedded stage does.

        Args:
            version: The version.
            row: Little-endian float32.
            batch_rows: Rows that were scored together; the others are zeros, which no score depends on.
            batch_index: The row's place among them: the last bit of a product of matrices may depend on it.

        Raises:
            ModelUnknownError: There is no such version.
            ModelFailedError: It gave no score.
        """
        try:
            scorer = self._scorer_of(version)
            batch = bytearray(batch_rows * len(row))
            batch[batch_index * len(row) : (batch_index + 1) * len(row)] = row
            scores, of_parts = scorer.scores_and_parts(bytes(batch))
        except CannotScoreError as error:
            raise ModelFailedError(f"{version} gave no score in this process: {error}") from error
        identity = ModelIdentity(
            scorer.name, scorer.version, scorer.threshold, scorer.expires_at, scorer.feature_set, scorer.parts
        )
        parts = () if of_parts is None else tuple(of_parts[batch_index].tolist())
        return Rescored(identity, float(scores[batch_index]), parts)


def _scorer_of(archive: Archive, name: str) -> EmbeddedScorer:
    """An archive's model, served under a name. Raises `CannotScoreError`."""
    return EmbeddedScorer(name, archive.version, archive.files["metadata.json"], archive.files["weights.bin"])
