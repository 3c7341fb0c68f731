"""Health of the server's components: unhealthy until proven."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import structlog

_log = structlog.get_logger(__name__)
_POLL_SECONDS: Final = 0.1
SERVICES: Final = ("", "pretrade.decision.v1.DecisionService")
"""Names under which the server as a whole is asked for; every component has its own besides."""
LIVENESS: Final = "liveness"
"""SERVING from the start as long as the event loop runs; for probes that restart what does not answer."""


@dataclass(frozen=True, slots=True)
class Component:
    """A health check of one part: returns an empty string when it is healthy, otherwise what is wrong."""

    problem: Callable[[], str]
    required: bool
    """True when the server as a whole is not ready without it."""
    warming_up: Callable[[], bool] = lambda: False
    """True while it prepares for its first calls, which takes a bounded time: the start waits for that."""


class Health:
    """Keeps `grpc.health.v1` in step with the components.

    The server as a whole is SERVING once every required component is sound and every other has been sound once, or
    `startup_patience_seconds` have passed: then it serves degraded rather than not at all. In both cases it waits for
    components that are warming up: its first callers get the same as all later ones. From then on only a required
    component or draining takes it back.

    Args:
        components: By name.
        tell: Says of a service, a component or the server as a whole, whether it is SERVING.
        startup_patience_seconds: See above.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        components: Mapping[str, Component],
        tell: Callable[[str, bool], None],
        startup_patience_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._components = components
        self._tell = tell
        self._unproven = {name for name, component in components.items() if not component.required}
        self._give_up_waiting = clock() + startup_patience_seconds
        self._clock = clock
        self._logged: dict[str, bool] = {}
        self._started = False
        self._draining = False
        self.ready = False
        """True while the server as a whole is SERVING."""
        self.serving = asyncio.Event()
        """Set once the server as a whole has been SERVING."""

    def problems(self) -> dict[str, str]:
        """What is wrong with each component; empty strings for sound ones."""
        return {name: component.problem() for name, component in self._components.items()}

    async def run(self) -> None:
        """Polls the components until cancelled."""
        while True:
            self.update()
            await asyncio.sleep(_POLL_SECONDS)

    def drain(self) -> None:
        """Tells everybody that this server takes no more calls."""
        self._draining = True
        self.update()

    def update(self) -> None:
        """Asks every component and tells what is so now."""
        problems = self.problems()
        sound = {name for name, problem in problems.items() if not problem}
        self._unproven -= sound
        required = all(name in sound for name, component in self._components.items() if component.required)
        warming_up = any(component.warming_up() for component in self._components.values())
        patient = self._unproven and self._clock() < self._give_up_waiting
        if not self._started and required and not warming_up and not patient:
            self._started = True
            if self._unproven:
                _log.warning("serving degraded", unproven={name: problems[name] for name in sorted(self._unproven)})
        self.ready = self._started and required and not self._draining
        for name in self._components:
            self._say(name, name in sound and not self._draining, problems[name])
        for name in SERVICES:
            self._say(name, self.ready, "")
        self._tell(LIVENESS, True)
        if self.ready:
            self.serving.set()

    def _say(self, name: str, serving: bool, problem: str) -> None:
        """Says of a service whether it is SERVING; a change is logged, but not that it is not SERVING at first."""
        self._tell(name, serving)
        before = self._logged.get(name)
        self._logged[name] = serving
        if name and before != serving and (serving or before is not None):
            (_log.info if serving else _log.warning)("health", component=name, serving=serving, problem=problem)
