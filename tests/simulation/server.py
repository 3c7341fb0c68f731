"""One decision server on a simulated host: the composition root's own `start`, and what may happen to its process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from unittest.mock import patch

from server.composition.app import start
from server.errors import AuditError
from server.inference.endpoints import NamedModel
from server.settings import Settings
from simulation.calls import Envoy
from simulation.database import URL
from simulation.desk import ADMIN_PORT, DECISION_PORT, INSTRUMENT
from simulation.history import Spell
from simulation.machine import Host, SimulatedMachine

if TYPE_CHECKING:
    from simulation.scene import Scene

_AGAIN_SECONDS: Final = 0.2
_CALM_SECONDS: Final = 0.2
"""After this a process has started everything."""
Edge = Literal["grpcio", "envoy"]


def _base_settings() -> Settings:
    """Of all servers. What is set around this process decides no history, and a test's settings are set around it."""
    with patch.dict(os.environ):
        for name in [name for name in os.environ if name.upper().startswith("PRETRADE_")]:
            del os.environ[name]
        return Settings(
            instruments=(INSTRUMENT,),
            redis_url="redis://redis:6379",  # type: ignore[arg-type]
            database_url=URL,  # type: ignore[arg-type]
            grpc={"port": DECISION_PORT, "drain_seconds": 0.05, "grace_seconds": 0.5},  # type: ignore[arg-type]
            admin={"port": ADMIN_PORT},  # type: ignore[arg-type]
            shipping={"drain_seconds": 0.5, "retained_rows": 0},  # type: ignore[arg-type]
            drift={"interval_seconds": 0},  # type: ignore[arg-type]
            audit_watch={"interval_seconds": 0},  # type: ignore[arg-type]
            replica={"warm_up_seconds": 0},  # type: ignore[arg-type]
            shadow={"keep_pairs": False},  # type: ignore[arg-type]
            startup_patience_seconds=0.5,
        )


_BASE: Final = _base_settings()
"""What all servers have in common; reading the environment takes too long to do it for each."""


class Server:
    """One server, through all of its processes.

    Args:
        scene: Where it lives.
        name: Of its host.
        edge: Who speaks HTTP/2.
        changes: Settings other than those of all, by section.
    """

    def __init__(self, scene: Scene, name: str, edge: Edge, changes: dict[str, dict[str, Any]] | None = None) -> None:
        self.scene = scene
        self.name = name
        self.edge: Final = edge
        self.host = Host(scene.world, name, scene.sqlite)
        journal = {"path": Path(f"/{name}/journal.db")} | (changes or {}).pop("journal", {})
        models = {one: NamedModel(**given) for one, given in (changes or {}).pop("models", {}).items()}
        sections: dict[str, Any] = {"journal": _BASE.journal.model_copy(update=journal), "models": models}
        for section, update in (changes or {}).items():
            sections[section] = getattr(_BASE, section).model_copy(update=update)
        self.settings: Final = _BASE.model_copy(update=sections)
        self.process: SimulatedMachine | None = None
        self._boots = 0
        self._stop: asyncio.Future[None] | None = None
        self.host.disk.on_small_file = self._small_file
        self.host.disk.on_directory_synced = self._directory_synced
        self._written: list[tuple[str, str]] = []
        """Control states that a loss of power may still undo: where, and its JSON."""
        self.operator_token = ""
        """What its newest process asks operators for."""
        self.failures: list[str] = []
        """Why a start failed, or a process ended by itself."""
        self.tasks_at_start: int | None = None
        """Of the process that serves now."""
        scene.history.lives[name] = []

    def _small_file(self, file: str, content: bytes) -> None:
        if "operator-token" in file:
            self.operator_token = content.decode().strip()
            return
        self._written.append((f"{self.name}/{file}", content.decode()))

    def _directory_synced(self) -> None:
        history, now = self.scene.history, self.scene.world.now
        history.control_states += [(now, where, content) for where, content in self._written]
        self._written.clear()

    @property
    def serves(self) -> bool:
        """True while a started process lives."""
        lives = self.scene.history.lives[self.name]
        return bool(lives) and lives[-1].ended == float("inf")

    @property
    def runs(self) -> bool:
        """True while a process lives, started or not."""
        return self.process is not None and not self.process.dead

    def boot(self) -> None:
        """Starts a process."""
        if self.runs:
            return
        self._boots += 1
        scene = self.scene
        process = self.process = SimulatedMachine(
            self.host, f"{self.name}.{self._boots}", scene.network, scene.listeners, scene.start_child
        )
        process.models = scene.models
        process.on_death.append(self._ended)
        scene.world.note(process.name, "boots")
        process.run(lambda: self._main(process))

    async def _main(self, process: SimulatedMachine) -> None:
        self._stop = process.loop.create_future()
        envoy: Any = None
        if self.edge == "envoy":
            envoy = Envoy(process, self.scene.listeners, DECISION_PORT)
        world, started = self.scene.world, False
        try:
            async with AsyncExitStack() as stack:
                server = await start(self.settings, None, stack, self._stop, envoy, process.machine)
                started = True
                world.note(process.name, "serves")
                self.scene.history.lives[self.name].append(Spell(process.name, world.now))
                world.after(_CALM_SECONDS, self._count_tasks, process)
                await asyncio.wait((self._stop,))
                await server.drain()
            self._stop.result()
        except Exception as error:
            world.note(process.name, "ended", repr(error))
            if started or not isinstance(error, (AuditError, OSError)):
                self.failures.append(f"{process.name}: {error!r}")
            else:  # a disk that fails lets no server start: whoever started it tries again
                world.after(_AGAIN_SECONDS, self.boot)
        # The process exits, by itself.
        self.scene.world.after(0.0, process.kill)

    def _count_tasks(self, process: SimulatedMachine) -> None:
        if process is self.process and not process.dead:
            self.tasks_at_start = len(asyncio.all_tasks(process.loop))

    def _ended(self) -> None:
        for life in self.scene.history.lives[self.name]:
            life.ended = min(life.ended, self.scene.world.now)

    def terminate(self) -> None:
        """SIGTERM."""
        process, stop = self.process, self._stop
        if process is not None and not process.dead and stop is not None:
            self.scene.world.note(process.name, "SIGTERM")
            process.loop.call_soon(_set, stop)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()

    def lose_power(self) -> None:
        """Its host loses power."""
        self._written.clear()
        self.host.lose_power()

    def when_ended(self, then: Callable[[], object]) -> None:
        """Calls back when the process that runs now has ended."""
        if self.process is None or self.process.dead:
            then()
        else:
            self.process.on_death.append(then)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
