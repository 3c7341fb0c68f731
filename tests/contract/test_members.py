"""A name with several addresses, each with a real gRPC server at the same port: one over TLS, one of a whole server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from support.decision_server import DecisionServer
from support.harness import ROOMY, Market, eventually
from support.model_server import VERSION, Models

from feature_cache.ending import end
from feature_cache.features import MF1
from local.stack.ports import free_ports
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.wire.torchserve import inference_pb2_grpc
from server.inference.breaker import BreakerSettings
from server.inference.members import Members
from server.inference.outcome import BatchFailedError
from server.inference.pool import Pool
from server.inference.replica import Replica, ReplicaLimits, ReplicaSettings
from server.inference.rows import Scored
from server.security.client_tls import ClientTls
from server.security.private import write_private
from server.security.settings import ClientTlsSettings
from server.security.trial import TrialAuthority

ROW = bytes(MF1.row_bytes)
HOST = "models.example"


async def serve(stack: AsyncExitStack, address: str, credentials: grpc.ServerCredentials | None = None) -> Models:
    """A model server at one address, until the stack is left."""
    server, models = grpc.aio.server(options=[("grpc.so_reuseport", 0)]), Models()
    add: Any = inference_pb2_grpc.add_InferenceAPIsServiceServicer_to_server
    add(models, server)
    bound = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    assert bound == int(address.rpartition(":")[2])
    await server.start()
    stack.push_async_callback(server.stop, 0)
    return models


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  what is waited for is in other tasks' state
            await asyncio.sleep(0.01)


@asynccontextmanager
async def following(pool: Pool, made: Callable[[str, str], Replica], found: list[str]) -> AsyncIterator[Members]:
    async def resolve(target: str) -> list[str]:
        assert target == f"{HOST}:7070"
        return list(found)

    members = Members(pool, f"{HOST}:7070", made, resolve)
    running = asyncio.create_task(members.run())
    try:
        yield members
    finally:
        await end([running])


async def test_every_address_of_a_name_is_asked_over_tls_with_the_names_certificate(tmp_path: Path) -> None:
    authority = TrialAuthority()
    pair = authority.certify("models", dns=[HOST])  # for none of the addresses
    credentials = grpc.ssl_server_credentials([(pair.key, pair.certificate)])
    write_private(tmp_path / "ca.pem", authority.pem.decode())
    tls = ClientTlsSettings(ca=tmp_path / "ca.pem")
    (port,) = free_ports(1)
    addresses = [f"127.0.0.{last}:{port}" for last in (2, 3, 4)]
    loop = asyncio.get_running_loop()
    limits = ReplicaLimits(
        ReplicaSettings(probe_timeout_seconds=5.0, warm_up_seconds=0.0), breaker=BreakerSettings(slow_seconds=5.0)
    )

    def made(name: str, address: str, host: str = HOST) -> Replica:
        return Replica(
            name,
            address,
            "champion",
            VERSION,
            limits,
            clock=loop.time,
            random=lambda: 0.5,
            tls=ClientTls(name, tls, lambda: 0.0, host),
        )

    pool = Pool("primary", (), lambda: 0.5, [f"primary-{number}" for number in range(1, 4)])
    async with AsyncExitStack() as servers:
        lives = {address: await servers.enter_async_context(AsyncExitStack()) for address in addresses}
        models = {address: await serve(lives[address], address, credentials) for address in addresses[:2]}
        found = addresses[:2]
        async with following(pool, made, found) as members:
            await until(lambda: len(pool.replicas) == 2)

            async def ask() -> object:
                replica = pool.pick()
                assert replica is not None
                return await replica.batcher.submit(ROW, loop.time() + 20)

            models[addresses[2]] = await serve(lives[addresses[2]], addresses[2], credentials)
            asked = [asyncio.create_task(ask()) for _ in range(50)]
            found[:] = addresses[1:]  # one came, one goes while it is asked
            await members.look()
            asked += [asyncio.create_task(ask()) for _ in range(50)]
            assert all(isinstance(one, Scored) for one in await asyncio.gather(*asked))
            await until(lambda: [one.endpoint for one in pool.replicas] == addresses[1:])
            await lives[addresses[0]].aclose()
            for _ in range(20):
                assert isinstance(await ask(), Scored)
        assert all(one.calls for one in models.values()), "each of them was asked"
        async with made("primary-1", addresses[1], host="") as unnamed:
            with pytest.raises(BatchFailedError, match="transport"):
                await unnamed.ask([ROW], None)


@contextmanager
def model_server_at(address: str) -> Iterator[Models]:
    """A model server in a thread of its own."""
    loop, over, made = asyncio.new_event_loop(), asyncio.Event(), list[Models]()
    ready = threading.Event()

    async def run() -> None:
        async with AsyncExitStack() as stack:
            made.append(await serve(stack, address))
            ready.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        assert ready.wait(30)
        yield made[0]
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


@pytest.mark.long
@pytest.mark.stack
def test_a_server_decides_by_the_endpoints_that_a_name_leads_to(tmp_path: Path, model_store: Path) -> None:
    (port,) = free_ports(1)
    with Stack(LocalSettings(dir=tmp_path / "stack", model_store=model_store), parts={"valkey"}) as stack:
        market = Market(str(stack.endpoints.redis_url))
        writer = threading.Thread(target=market.run)
        writer.start()
        settings = {**ROOMY, "REPLICAS__PRIMARY": f"each://localhost:{port}", "REPLICAS__SECONDARY": ""}
        try:
            with DecisionServer(tmp_path / "server", market.redis_url, settings=settings) as server:
                assert server.decide().source != pb.SOURCE_PRIMARY
                assert all(not one.name.startswith("primary") or not one.healthy for one in server.status().replicas)
                with model_server_at(f"127.0.0.1:{port}"):
                    assert server.decide_until(pb.SOURCE_PRIMARY).model_version == VERSION
                    (primary,) = (one for one in server.status().replicas if one.name.startswith("primary"))
                    assert (primary.name, primary.endpoint) == ("primary-1", f"127.0.0.1:{port}")
                assert eventually(server.decide, lambda one: one.source != pb.SOURCE_PRIMARY).source != 0
        finally:
            market.stopped.set()
            writer.join()
