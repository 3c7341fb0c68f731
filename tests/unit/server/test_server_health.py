"""Health: unhealthy until proven, degraded rather than never, and honest about every component."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from cases import Clock
from grpc_health.v1 import health, health_pb2

from server.health import SERVICES, Component, Health

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NO_CONTEXT: Any = None
"""`Check` needs one only to refuse an unknown name."""


class Server:
    """Two components whose problems the test sets, and the health that tells them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.problems = {"journal": "not open", "primary": "does not answer"}
        self.servicer = health.aio.HealthServicer()
        self.health = Health(
            {
                "journal": Component(lambda: self.problems["journal"], required=True),
                "primary": Component(lambda: self.problems["primary"], required=False),
            },
            (self.servicer,),
            startup_patience_seconds=5,
            clock=self.clock,
        )

    async def told(self) -> dict[str, bool]:
        """What a caller of `grpc.health.v1` hears now."""
        await self.health.update()
        return {name: await self._serving(name) for name in ("", "journal", "primary")}

    async def _serving(self, name: str) -> bool:
        answer = await self.servicer.Check(health_pb2.HealthCheckRequest(service=name), NO_CONTEXT)
        return bool(answer.status == SERVING)


@pytest.fixture
def server() -> Server:
    return Server()


async def test_nothing_serves_until_it_is_proven(server: Server) -> None:
    assert await server.told() == {"": False, "journal": False, "primary": False}
    assert not server.health.ready


async def test_the_server_serves_once_every_component_was_sound(server: Server) -> None:
    server.problems["journal"] = ""
    assert await server.told() == {"": False, "journal": True, "primary": False}
    server.problems["primary"] = ""
    assert await server.told() == {"": True, "journal": True, "primary": True}
    assert server.health.ready


async def test_components_need_not_be_sound_at_the_same_time(server: Server) -> None:
    server.problems["primary"] = ""
    await server.told()
    server.problems |= {"primary": "gone again", "journal": ""}
    assert (await server.told())[""]


async def test_after_its_patience_it_serves_degraded(server: Server) -> None:
    server.problems["journal"] = ""
    server.clock.now += 4.9
    assert not (await server.told())[""]
    server.clock.now += 0.1
    assert await server.told() == {"": True, "journal": True, "primary": False}


async def test_no_patience_replaces_a_required_component(server: Server) -> None:
    server.problems["primary"] = ""
    server.clock.now += 1_000
    assert not (await server.told())[""]


async def test_once_started_only_a_required_component_takes_the_server_back(server: Server) -> None:
    server.problems = {"journal": "", "primary": ""}
    await server.told()
    server.problems["primary"] = "down"
    assert await server.told() == {"": True, "journal": True, "primary": False}
    server.problems["journal"] = "disk full"
    assert await server.told() == {"": False, "journal": False, "primary": False}
    server.problems["journal"] = ""
    assert (await server.told())[""]


async def test_draining_takes_everything_back_for_good(server: Server) -> None:
    server.problems = {"journal": "", "primary": ""}
    await server.told()
    await server.health.drain()
    assert await server.told() == {"": False, "journal": False, "primary": False}
    assert set(server.health.problems().values()) == {""}, "nothing is wrong with them"


async def test_the_service_is_told_by_its_name_too(server: Server) -> None:
    server.problems = {"journal": "", "primary": ""}
    await server.told()
    answers = [
        await server.servicer.Check(health_pb2.HealthCheckRequest(service=name), NO_CONTEXT) for name in SERVICES
    ]
    assert [answer.status for answer in answers] == [SERVING] * len(SERVICES)


async def test_a_watcher_that_does_not_read_cannot_hold_up_a_drain(server: Server) -> None:
    class Context:
        """A watcher whose connection takes one message and no more."""

        def __init__(self) -> None:
            self.written = asyncio.Event()

        async def write(self, _response: health_pb2.HealthCheckResponse) -> None:
            self.written.set()
            await asyncio.Event().wait()

    context: Any = Context()
    watcher = asyncio.create_task(server.servicer.Watch(health_pb2.HealthCheckRequest(service=""), context))
    await context.written.wait()
    server.problems = {"journal": "", "primary": ""}
    await asyncio.wait_for(server.health.drain(), 5)
    answer = await server.servicer.Check(health_pb2.HealthCheckRequest(service="journal"), NO_CONTEXT)
    assert answer.status == NOT_SERVING
    watcher.cancel()
    await asyncio.gather(watcher, return_exceptions=True)
