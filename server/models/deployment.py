"""Which version the champion's replicas decide by, and how it is replaced by another.

A new version is loaded beside the old one, into the secondary and then the primary, warmed up and checked. Only then
does the control state name it. Every process switches a replica when it has seen that replica serve the new version.
The old version stays loaded for a while, so that going back only changes the name.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Final

import structlog

from server.errors import ChangeInDoubtError, ModelUnknownError
from server.models.loading import ModelLoader
from server.models.management import LoadError
from server.models.markout import Markout
from server.models.registry import ModelUnusableError

if TYPE_CHECKING:
    from pretrade.admin.v1 import admin_pb2
    from server.inference.pool import Role
    from server.inference.replica import Replica
    from server.models.registry import Registry

_log = structlog.get_logger(__name__)

AGAIN_SECONDS: Final = 5.0
"""Between two attempts at what failed."""

SetChampion = Callable[[str, str, str, bool], Awaitable["admin_pb2.Change"]]
"""Puts the champion's version into the control state, with author and reason, and whether nothing else may have changed
meanwhile on any server."""


class DeploymentError(Exception):
    """What was asked for cannot be done as things are."""


NOT_LOADED: Final = (LoadError, ModelUnknownError, ModelUnusableError, DeploymentError)
"""Why a version may not be loaded."""


class Deployment:
    """The champion's replicas and the versions on them.

    Args:
        registry: The models; None without a model store: this server then loads no versions.
        loader: Loads versions into replicas.
        champions: Who serves the champion: the primary, and the secondary where there is one.
        champion_version: The champion's version while none was promoted; None for what the replicas serve.
        set_champion: Changes the control state.
        keep_previous_seconds: How long the champion's predecessor stays loaded.
        clock: Monotonic seconds.
        may_be_first: Whether a version may become the champion where there is none: its replicas then host others.
    """

    def __init__(
        self,
        registry: Registry | None,
        loader: ModelLoader,
        champions: tuple[Role, ...],
        champion_version: str | None,
        set_champion: SetChampion,
        keep_previous_seconds: float,
        clock: Callable[[], float],
        may_be_first: bool = False,
    ) -> None:
        self._may_be_first = may_be_first
        self.loader: Final = loader
        self.champions: Final = champions
        self._registry = registry
        self._default = champion_version
        self._champion = champion_version
        self._set_champion = set_champion
        self._keep_previous_seconds = keep_previous_seconds
        self._clock = clock
        self._next_repair = -float("inf")
        self._in_doubt: tuple[str, str] | None = None
        """A version of which it is not known whether it became the champion, and its predecessor."""
        self._tasks: set[asyncio.Task[object]] = set()

    @property
    def registry(self) -> Registry:
        """The models.

        Raises:
            DeploymentError: This server knows no model store.
        """
        if self._registry is None:
            raise DeploymentError("this server has no model store (PRETRADE_REPLAY__MODEL_STORE)")
        return self._registry

    @property
    def champion_version(self) -> str:
        """The version that decides without a canary; empty when none has answered yet."""
        if self._champion is not None:
            return self._champion
        model = next((role.model for role in self.champions if role.model is not None), None)
        return "" if model is None else model.version

    @property
    def _replicas(self) -> list[Replica]:
        """Every endpoint of the champion."""
        return [replica for role in self.champions for replica in role.replicas]

    async def markout_of(self, version: str) -> Markout:
        """The label that a version has learnt; the default where this server does not know the version."""
        try:
            return (await asyncio.to_thread(self.registry.usable, version)).markout
        except (DeploymentError, ModelUnknownError, ModelUnusableError):
            return Markout()

    def decides(self, version: str) -> bool:
        """True when a score of this version may decide an order now.

        A version that was named must be the one. It counts from the moment it is named, although the replicas are
        switched a little later: what was rolled back decides nothing more that a replica does not answer itself.
        """
        if self._champion is not None:
            return version == self._champion
        return any(replica.model is not None and replica.model.version == version for replica in self._replicas)

    def apply(self, version: str) -> None:
        """Has orders decided by this version, as soon as a replica serves it; empty for what the settings say."""
        self._champion = version or self._default
        if self._in_doubt is not None:
            (wanted, previous), self._in_doubt = self._in_doubt, None
            if version == wanted:
                self.spawn(self._settle(version, previous))
        for role in self.champions:
            for replica in role.replicas:
                self.welcome(role, replica)

    def welcome(self, role: Role, replica: Replica) -> None:
        """Has an endpoint of the champion decide by the version that decides, as soon as it serves it."""
        if self._champion is None or self._registry is None:
            replica.wanted_version, replica.ejected = self._champion, ""
        elif replica.wanted_version != self._champion:
            self.spawn(self._switch(role, replica, self._champion))

    def join(self, role: Role, replica: Replica) -> None:
        """Has an endpoint that is new to a role serve the version that decides, before it decides an order."""
        if self._champion is not None and self._registry is not None and replica.wanted_version != self._champion:
            replica.ejected = f"does not serve model {self._champion} yet"
        self.welcome(role, replica)

    def repair(self) -> None:
        """Loads the champion again into a replica that lost it: after a restart it has only its first version."""
        if self._clock() < self._next_repair:
            return
        for replica in self._replicas:
            if replica.wanted_version is not None and not replica.healthy and self.loader.manages(replica.name):
                self._next_repair = self._clock() + AGAIN_SECONDS
                self.spawn(self.loads(replica, replica.wanted_version))

    async def make_champion(
        self, version: str, author: str, reason: str, wanted: Callable[[], bool] | None = None
    ) -> admin_pb2.Change:
        """Loads a version where the champion is served, and has it decide.

        Args:
            version: Which one.
            author: Who says so.
            reason: Why.
            wanted: Asked once it is loaded, which may take a minute: whether it is still to be the champion, and the
                control state must then be the same on all servers; None: whatever else happened.

        Raises:
            DeploymentError: There is no champion to take its place, or it is no longer wanted.
            ModelUnknownError, ModelUnusableError, LoadError: It could not be loaded; nothing changed.
            ControlError: The control state changed, or is not known; nothing changed.
            ChangeInDoubtError: It is not known whether the control state names the version. What follows is done when
                it is seen that it does.
        """
        previous = self.champion_version
        if not previous and not self._may_be_first:
            raise DeploymentError("no champion has answered yet")
        await self.load(version, reversed(self.champions))
        if wanted is not None and not wanted():
            raise DeploymentError(f"{version} is no longer wanted: its canary ended while it was loaded")
        try:
            change = await self._set_champion(version, author, reason, wanted is not None)
        except ChangeInDoubtError:
            self._in_doubt = version, previous
            raise
        await self._settle(version, previous)
        return change

    async def load(self, version: str, roles: Iterable[Role]) -> None:
        """Loads a version into the endpoints of roles, one after the other.

        Half of a role's endpoints are enough, and the one of a role that has no more: a pool must be able to lose as
        many in any case, and one broken server must not hold back what all others can do.

        Raises:
            DeploymentError, ModelUnknownError, ModelUnusableError, LoadError: It could not be loaded into enough.
        """
        record = await asyncio.to_thread(self.registry.usable, version)
        for role in roles:
            if not role.replicas:
                raise LoadError(f"{role.name}: none of its endpoints has answered yet")
            failures = []
            for replica in role.replicas:
                try:
                    await self.loader.load(replica, record)
                except LoadError as error:
                    failures.append(error)
                    _log.warning("model not loaded", replica=replica.name, version=version, error=str(error))
            if failures and (not role.several or 2 * len(failures) > len(role.replicas)):
                raise failures[0]

    async def loads(self, replica: Role, version: str) -> bool:
        """Loads a version into a replica; True when it serves it."""
        try:
            await self.load(version, (replica,))
        except NOT_LOADED as error:
            _log.warning("model not served, tried again", replica=replica.name, version=version, error=str(error))
            return False
        return True

    async def unload(self, role: Role, version: str) -> None:
        """Takes a version away that no order is sent to; what fails is logged."""
        for replica in role.replicas:
            try:
                await self.loader.unload(replica, version)
            except LoadError as error:
                _log.warning("model not unloaded", error=str(error))

    def spawn(self, work: Coroutine[None, None, object]) -> asyncio.Task[object]:
        """Has something done in the background, until `close`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def close(self) -> None:
        """Gives up what is under way."""
        for task in self._tasks:
            task.cancel()

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("deployment's task failed", error=repr(error), exc_info=error)

    async def _settle(self, version: str, previous: str) -> None:
        """Does what follows when a version has become the champion."""
        await asyncio.to_thread(self._move_aliases, version, previous)
        for replica in self._replicas:
            with contextlib.suppress(LoadError):
                await self.loader.make_default(replica, version)
            if previous not in ("", version):
                self.spawn(self._unload_later(replica, previous))

    async def _switch(self, role: Role, replica: Replica, version: str) -> None:
        """Has a replica decide by a version once it serves it.

        Until then it decides by the one before. An endpoint of several that does not take the version is ejected, so
        that the others decide alone and all of them by the same version.
        """
        while self._champion == version and replica.wanted_version != version:
            if await self.loads(replica, version):
                if self._champion == version:
                    replica.wanted_version, replica.ejected = version, ""
                return
            if self._champion == version and any(not one.ejected for one in role.replicas if one is not replica):
                replica.ejected = f"does not serve model {version}"
            await asyncio.sleep(AGAIN_SECONDS)

    def _move_aliases(self, champion: str, previous: str) -> None:
        try:
            self.registry.set_alias("champion", champion)
            if previous not in ("", champion):
                self.registry.set_alias("previous", previous)
        except (OSError, ModelUnknownError, ModelUnusableError) as error:
            _log.error("model aliases not moved: a replica that starts will have the old one", error=str(error))

    async def _unload_later(self, replica: Replica, version: str) -> None:
        await asyncio.sleep(self._keep_previous_seconds)
        if replica.wanted_version != version:
            await self.unload(replica, version)
