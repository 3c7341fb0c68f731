"""Health of the server's components: unhealthy until proven."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog
from grpc_health.v1 import health, health_pb2

_log = structlog.get_logger(__name__)
_POLL_SECONDS = 0.1
_TELL_SECONDS = 0.2
"""A servicer takes as long as its slowest watcher to read the last change; it is told again at the next update."""
SERVICES = ("", "pretrade.decision.v1.DecisionService")
"""Names under which the server as a whole is asked for; every component has its own besides."""
LIVENESS = "liveness"
"""SERVING from the start as long as the event loop runs; for probes that restart what does not answer."""


@dataclass(frozen=True, slots=True)
class Component:
    """A part whose health is told: returns an empty string when sound, else what is wrong."""

    problem: Callable[[], str]
    required: bool
    """True when the server as a whole is not ready without it."""


class Health:
    """Keeps `grpc.health.v1` in step with the components.

    The server as a whole is SERVING once every required component is sound and every other has been sound once, or
    `startup_patience_seconds` have passed: then it serves degraded rather than not at all. From then on only a required
    component or draining takes it back.
    """

    def __init__(
        self,
        components: Mapping[str, Component],
        servicers: tuple[health.aio.HealthServicer, ...],
        startup_patience_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._components = components
        self._servicers = servicers
        self._unproven = {name for name, component in components.items() if not component.required}
        self._give_up_waiting = clock() + startup_patience_seconds
        self._clock = clock
        self._told: dict[str, bool] = {}
        self._started = False
        self._draining = False
        self._updating = asyncio.Lock()
        self.serving = asyncio.Event()
        """Set once the server as a whole has been SERVING."""

    @property
    def ready(self) -> bool:
        """True when the server as a whole is SERVING."""
        return self._told.get("", False)

    def problems(self) -> dict[str, str]:
        """What is wrong with each component; empty strings for sound ones."""
        return {name: component.problem() for name, component in self._components.items()}

    async def run(self) -> None:
        """Polls the components until cancelled."""
        while True:
            await self.update()
            await asyncio.sleep(_POLL_SECONDS)

    async def drain(self) -> None:
        """Tells everybody that this server takes no more calls."""
        self._draining = True
        await self.update()

    async def update(self) -> None:
        """Asks every component and tells what changed."""
        # One at a time: what an update found before a drain must not be told after it.
        async with self._updating:
            await self._update()

    async def _update(self) -> None:
        problems = self.problems()
        sound = {name for name, problem in problems.items() if not problem}
        self._unproven -= sound
        required = all(name in sound for name, component in self._components.items() if component.required)
        if not self._started and required and (not self._unproven or self._clock() >= self._give_up_waiting):
            self._started = True
            if self._unproven:
                _log.warning("serving degraded", unproven={name: problems[name] for name in sorted(self._unproven)})
        serving = self._started and required and not self._draining
        for name in self._components:
            await self._tell(name, name in sound and not self._draining, problems[name])
        for name in SERVICES:
            await self._tell(name, serving, "")
        await self._tell(LIVENESS, True, "")
        if serving:
            self.serving.set()

    async def _tell(self, name: str, serving: bool, problem: str) -> None:
        if self._told.get(name) == serving:
            return
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        try:
            async with asyncio.timeout(_TELL_SECONDS):
                for servicer in self._servicers:
                    await servicer.set(name, state)
        except TimeoutError:
            _log.warning("a health watcher does not read", component=name)
            return
        if name and (serving or name in self._told):
            (_log.info if serving else _log.warning)("health", component=name, serving=serving, problem=problem)
        self._told[name] = serving
