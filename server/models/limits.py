"""What the models that decide say of their own limits, read from their archives before they are needed.

A decision never waits for an archive. The limits of the versions that the registry's aliases name are read before the
server serves; those of any other version when it has decided for the first time, a moment later. Until then they are
unknown, and decisions say so (`MODEL_LIMITS_UNKNOWN`). Without a model store models have no limits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import structlog

from fallback.model_limits import NO_LIMITS, UNKNOWN, ModelLimits
from server.errors import ModelUnknownError
from server.inference.model_names import DEFAULT
from server.models.archive import ModelStore
from server.models.registry import Registry, record_of

_log = structlog.get_logger(__name__)

_LOOK_SECONDS: Final = 0.1
"""Between two looks whether a version is wanted."""
_AGAIN_SECONDS: Final = 10.0
"""Between two attempts at a version that could not be read."""
_MOST_KEPT: Final = 64
"""Versions; the oldest is forgotten first."""


class KnownLimits:
    """The limits of model versions, by version.

    Args:
        model_store: Folder with the archives; None: this server knows of no limits.
        clock: Monotonic seconds.
        models: Whose aliases are read before serving.
    """

    def __init__(
        self, model_store: Path | None, clock: Callable[[], float], models: Iterable[str] = (DEFAULT,)
    ) -> None:
        self._model_store = model_store
        self._models = tuple(models)
        self._clock = clock
        self._known: dict[str, ModelLimits] = {}
        self._wanted: dict[str, float] = {}
        """Monotonic instants from which on to try, by version."""
        self._refused: dict[str, str] = {}
        """Why a version could not be read, as it was logged."""

    def of(self, version: str) -> ModelLimits:
        """The limits of a version as far as they are known at this moment."""
        if self._model_store is None:
            return NO_LIMITS
        known = self._known.get(version)
        if known is None:
            if version not in self._wanted:
                self._want(version, self._clock())
            return UNKNOWN
        return known

    async def read_aliases(self) -> None:
        """Reads those of the versions that have an alias; called before serving."""
        if self._model_store is None:
            _log.info("no model store: the guards UNCERTAIN and OUT_OF_DOMAIN know of no limits")
            return
        registries = [Registry(self._model_store, model) for model in self._models]
        aliases = await asyncio.to_thread(lambda: [registry.aliases() for registry in registries])
        for version in {version for of_model in aliases for version in of_model.values()}:
            await self._read(self._model_store, version)

    async def run(self) -> None:
        """Reads those that are wanted, until cancelled."""
        if self._model_store is None:
            await asyncio.Event().wait()  # a component that ends takes the server with it
            return
        while True:
            for version in [one for one, due in self._wanted.items() if due <= self._clock()]:
                await self._read(self._model_store, version)
            await asyncio.sleep(_LOOK_SECONDS)

    def _want(self, version: str, at: float) -> None:
        """Tries a version from this instant on; for many that cannot be read the oldest is given up."""
        self._wanted[version] = at
        if len(self._wanted) > _MOST_KEPT:
            del self._wanted[next(iter(self._wanted))]

    async def _read(self, store: Path, version: str) -> None:
        try:
            limits = await asyncio.to_thread(_limits_in, store, version)
        except Exception as error:  # whatever an archive holds, the server goes on without it
            if self._refused.get(version) != repr(error):
                _log.warning("limits of a model not known, tried again", version=version, error=repr(error))
            self._refused = {**self._refused, version: repr(error)} if len(self._refused) < _MOST_KEPT else {}
            self._want(version, self._clock() + _AGAIN_SECONDS)
            return
        if not limits.has_band or limits.domain is None:
            _log.warning("a model says nothing of its limits: its guards are off", version=version)
        self._wanted.pop(version, None)
        self._known[version] = limits
        if len(self._known) > _MOST_KEPT:
            del self._known[next(iter(self._known))]


def _limits_in(store: Path, version: str) -> ModelLimits:
    """Those of an archive. Blocks. Raises `ModelUnknownError`, `OSError`."""
    record = record_of(ModelStore([store]).find(version), created_at=0.0)
    if record.problem:
        raise ModelUnknownError(record.problem)
    return record.limits
