"""The simulated Redis does what one with a replica does, for redis-py itself and the control state's own script."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from feature_cache.store.vectors import connect
from simulation.calls import Listeners
from simulation.machine import Host, SimulatedMachine
from simulation.network import Network
from simulation.redis import SimulatedRedis
from simulation.vfs import UnavailableError, simulated_sqlite
from simulation.world import World

T = TypeVar("T")


class Bench:
    """A Redis and a process that talks to it."""

    def __init__(self) -> None:
        try:
            sqlite = simulated_sqlite()
        except UnavailableError as reason:
            pytest.skip(f"the simulation cannot run here: {reason}")
        self.world = World(1)
        network = Network(self.world)
        self.redis = SimulatedRedis(self.world, network, lambda: 1_790_000_000 * 10**9)
        self.network = network
        self.machine = SimulatedMachine(Host(self.world, "a", sqlite), "a", network, Listeners(network))

    def do(self, work: Callable[[Redis], Awaitable[T]]) -> T:
        """What a coroutine gives that is handed a client."""

        async def main() -> T:
            client = connect("redis://redis:6379", 0.3)
            try:
                return await work(client)
            finally:
                await client.aclose()

        task = self.machine.run(main)
        assert self.world.run(task.done, self.world.now + 60)
        return task.result()  # type: ignore[no-any-return]


def test_a_write_that_was_acknowledged_is_gone_when_its_master_dies_before_the_replica_has_it() -> None:
    bench = Bench()

    async def write(client: Redis) -> None:
        await client.xadd("k", {"state": b"one"})

    async def read(client: Redis) -> Any:
        return await client.xrevrange("k", count=1)

    bench.redis.replication_seconds = (0.01, 0.01)
    bench.do(write)
    bench.world.run(lambda: False, bench.world.now + 0.02)
    bench.redis.replication_seconds = (1.0, 1.0)
    bench.do(write)
    assert len(bench.do(read)) == 1
    newest = bench.do(read)[0][0]
    bench.redis.fail_over(0.1)
    with pytest.raises((RedisError, OSError)):
        bench.do(read)
    bench.world.run(lambda: bench.redis.up, bench.world.now + 1)
    (left,) = bench.do(read)
    assert left[0] < newest
    assert left[1] == {b"state": b"one"}


def test_a_lost_reply_leaves_the_write_and_a_lost_request_does_not() -> None:
    bench = Bench()

    async def add(client: Redis) -> Any:
        return await client.eval("return redis.call('XADD', KEYS[1], '*', 'state', ARGV[1])", 1, "k", "s")

    bench.redis.cut_before = lambda command: True
    with pytest.raises((RedisError, OSError)):
        bench.do(add)
    assert bench.redis.last("k") is None
    bench.redis.cut_before = lambda command: False
    bench.redis.cut_after = lambda command: True
    with pytest.raises((RedisError, OSError)):
        bench.do(add)
    assert bench.redis.last("k") == b"s"


def test_a_read_that_waits_is_answered_by_the_next_write_and_by_its_time() -> None:
    bench = Bench()

    async def wait(client: Redis) -> Any:
        return await client.xread({"k": "0"}, block=500)

    began = bench.world.now
    assert not bench.do(wait)
    assert 0.5 < bench.world.now - began < 0.6

    async def add() -> None:
        client = connect("redis://redis:6379", 0.3)
        await client.xadd("k", {"state": b"one"})
        await client.aclose()

    bench.world.after(0.2, lambda: bench.machine.run(add))
    began = bench.world.now
    answer = bench.do(wait)
    assert 0.2 < bench.world.now - began < 0.3
    assert b"one" in str(answer).encode()
