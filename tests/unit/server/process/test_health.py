"""Health: unhealthy until proven, degraded rather than never, and honest about every component."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from grpc_health.v1 import health_pb2
from support.cases import Clock

from server.process.health import SERVICES, Component, Health
from server.rpc.health import HealthServicer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NO_CALL: Any = None
"""Health asks nothing of a call."""


class Server:
    """Two components whose problems the test sets, and the health that tells them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.problems = {"journal": "not open", "primary": "does not answer"}
        self.warming_up = False
        self.servicer = HealthServicer()
        self.health = Health(
            {
                "journal": Component(lambda: self.problems["journal"], required=True),
                "primary": Component(
                    lambda: self.problems["primary"], required=False, warming_up=lambda: self.warming_up
                ),
            },
            self.servicer.set,
            startup_patience_seconds=5,
            clock=self.clock,
        )

    async def told(self) -> dict[str, bool]:
        """What a caller of `grpc.health.v1` hears now."""
        self.health.update()
        return {name: await self._serving(name) for name in ("", "journal", "primary")}

    async def _serving(self, name: str) -> bool:
        answer = await self.servicer.Check(health_pb2.HealthCheckRequest(service=name), NO_CALL)
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


async def test_the_start_waits_for_what_warms_up_even_beyond_its_patience(server: Server) -> None:
    server.problems, server.warming_up = {"journal": "", "primary": ""}, True
    server.clock.now += 60
    assert await server.told() == {"": False, "journal": True, "primary": True}
    server.warming_up = False
    assert (await server.told())[""]
    server.warming_up = True
    assert (await server.told())[""], "what warms up later takes nothing back"


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
    server.health.drain()
    assert await server.told() == {"": False, "journal": False, "primary": False}
    assert set(server.health.problems().values()) == {""}, "nothing is wrong with them"


async def test_the_service_is_told_by_its_name_too(server: Server) -> None:
    server.problems = {"journal": "", "primary": ""}
    await server.told()
    answers = [await server.servicer.Check(health_pb2.HealthCheckRequest(service=name), NO_CALL) for name in SERVICES]
    assert [answer.status for answer in answers] == [SERVING] * len(SERVICES)


class Watcher:
    """One that takes so many messages and then reads no more."""

    def __init__(self, servicer: HealthServicer, service: str, takes: int = 1_000) -> None:
        self.heard: list[int] = []
        self._limit = takes
        self.is_stuck = asyncio.Event()
        self._watch = asyncio.create_task(self._hear(servicer, service))

    async def _hear(self, servicer: HealthServicer, service: str) -> None:
        answers: Any = servicer.Watch(health_pb2.HealthCheckRequest(service=service), NO_CALL)
        async with contextlib.aclosing(answers):
            async for response in answers:
                await self.take(response)

    async def take(self, response: health_pb2.HealthCheckResponse) -> None:
        if len(self.heard) == self._limit:
            self.is_stuck.set()
            await asyncio.Event().wait()
        self.heard.append(response.status)

    async def close(self) -> None:
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_watchers_that_do_not_read_keep_the_truth_from_nobody_else(server: Server) -> None:
    names = (*SERVICES, "journal", "primary")
    deaf = [Watcher(server.servicer, name, takes=0) for name in names for _ in range(3)]
    for watcher in deaf:
        await watcher.is_stuck.wait()
    honest = [Watcher(server.servicer, name) for name in names]
    for problem, status in (("", SERVING), ("disk full", NOT_SERVING), ("", SERVING)):
        server.problems = dict.fromkeys(server.problems, problem)
        await server.told()
        await settle()
        assert [watcher.heard[-1] for watcher in honest] == [status] * len(names)
        for name in names:
            answer = await server.servicer.Check(health_pb2.HealthCheckRequest(service=name), NO_CALL)
            assert answer.status == status
    server.health.drain()
    await settle()
    assert [watcher.heard[-1] for watcher in honest] == [NOT_SERVING] * len(names)
    assert not server.health.ready
    for watcher in (*deaf, *honest):
        await watcher.close()


async def test_a_watcher_that_reads_late_hears_what_is_true_by_then(server: Server) -> None:
    server.problems = {"journal": "", "primary": ""}
    await server.told()
    watcher = Watcher(server.servicer, "", takes=1)
    await settle()
    written: asyncio.Queue[int] = asyncio.Queue()
    gate = asyncio.Event()

    async def slowly(response: health_pb2.HealthCheckResponse) -> None:
        await gate.wait()
        written.put_nowait(response.status)

    watcher.take = slowly  # type: ignore[method-assign]  # a connection that takes the next message late
    for problem in ("disk full", "", "disk full"):
        server.problems["journal"] = problem
        await server.told()
        await settle()
    gate.set()
    await settle()
    assert watcher.heard == [SERVING]
    assert [written.get_nowait() for _ in range(written.qsize())] == [NOT_SERVING], "once, and the newest"
    await watcher.close()


async def test_a_watcher_hears_of_a_service_that_is_not_known_yet(server: Server) -> None:
    watcher = Watcher(server.servicer, "journal")
    await settle()
    await server.told()
    await settle()
    assert watcher.heard == [health_pb2.HealthCheckResponse.SERVICE_UNKNOWN, NOT_SERVING]
    await watcher.close()


async def test_nothing_is_kept_of_watchers_that_left(server: Server) -> None:
    for number in range(3):
        for name in ("", f"nobody-{number}"):
            watcher = Watcher(server.servicer, name)
            await settle()
            await watcher.close()
    assert server.servicer._watchers == {}
