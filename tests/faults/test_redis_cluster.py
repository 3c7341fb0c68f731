"""The features in a real Redis Cluster: worker, store and the server's copy, and a node that goes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.exceptions import MovedError, RedisError
from support.followed_cache import following, sequence_of, snapshot
from support.valkey_cluster import PRIMARIES, ValkeyCluster, valkey_cluster, wait_until
from support.waiting import until

from feature_cache.store.cluster import ClusterFeatureStore, PartialWriteError, is_cluster, node_urls, open_store
from feature_cache.store.codec import BookState
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from feature_cache.store.report import InstrumentReport, ReportReader
from feature_cache.store.vectors import report_key_of
from local.stack.settings import LocalSettings, secret
from local.stack.stack import Stack

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    """Shared; a test that moves slots or kills a node leaves every slot served."""
    with valkey_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@asynccontextmanager
async def copy_of(url: str, names: list[str], reconcile_seconds: float) -> AsyncIterator[FeatureCache]:
    settings = FeatureCacheSettings(reconcile_interval_seconds=reconcile_seconds, timeout_seconds=0.5)
    async with following(FeatureCache(url, settings, names)) as cache:
        await until(lambda: cache.connected)
        yield cache


def test_a_cluster_is_known_by_its_url() -> None:
    assert is_cluster("redis+cluster://h:1")
    assert not is_cluster("redis://h:1/0")
    assert node_urls("rediss+cluster://me:pw@a:1,b:2/?ssl_ca_certs=x") == [
        "rediss://me:pw@a:1?ssl_ca_certs=x",
        "rediss://me:pw@b:2?ssl_ca_certs=x",
    ]
    for wrong in ("redis+cluster://a:1/3", "redis+cluster://"):
        with pytest.raises(ValueError, match="Redis Cluster"):
            node_urls(wrong)


async def test_vectors_on_every_node_are_read_and_their_updates_heard(cluster: ValkeyCluster) -> None:
    names = [name for primary in range(PRIMARIES) for name in cluster.names_on(primary, 3)]
    async with open_store(cluster.url, ttl_seconds=60, timeout_seconds=2) as store:
        assert isinstance(store, ClusterFeatureStore)
        await store.check()
        await store.write([snapshot(name, 1) for name in names])
        # It reads the keys too seldom to find the second vectors so: they come by notification.
        async with copy_of(cluster.url, names, reconcile_seconds=60) as cache:
            assert [sequence_of(cache, name) for name in names] == [1] * len(names)
            await store.write([snapshot(name, 2) for name in names])
            await until(lambda: all(sequence_of(cache, name) == 2 for name in names))


@pytest.mark.fault("B1", "A Redis Cluster moves slots to another node", "The workers and every server follow them.")
async def test_slots_that_move_are_followed(cluster: ValkeyCluster, seen: Callable[[str], None]) -> None:
    [moving], [staying] = cluster.names_on(0, prefix="MOVES"), cluster.names_on(1, prefix="STAYS")
    async with (
        open_store(cluster.url, ttl_seconds=60, timeout_seconds=2) as store,
        copy_of(cluster.url, [moving, staying], reconcile_seconds=0.2) as cache,
    ):
        await store.write([snapshot(moving, 1), snapshot(staying, 1)])
        await until(lambda: sequence_of(cache, moving) == sequence_of(cache, staying) == 1)
        began = time.monotonic()
        for taking, giving in ((cluster.replica, cluster.nodes[0]), (cluster.nodes[0], cluster.replica)):
            await asyncio.to_thread(taking.command, "CLUSTER", "FAILOVER")
            await asyncio.to_thread(wait_until, taking.is_primary)
            await asyncio.to_thread(wait_until, giving.is_replica)
            sequence = sequence_of(cache, moving) + 1
            refused, unwritten = 0, {moving}
            while sequence_of(cache, moving) != sequence:
                try:
                    await store.write([snapshot(moving, sequence), snapshot(staying, sequence)])
                except PartialWriteError as error:
                    refused += 1
                    unwritten = {one.instrument for one in error.unwritten}
                await asyncio.sleep(0.02)
            assert unwritten == {moving}, "the other node took its own"
            assert refused <= 5, "it finds the new owner at once"
            await until(lambda: cache.connected)
            assert sequence_of(cache, staying) == sequence
        seen(f"moved there and back in {time.monotonic() - began:.1f} s")


async def reported(reader: ReportReader, wanted: dict[str, int]) -> None:
    """Waits until the reports of these instruments, and no others, tell so many events."""
    async with asyncio.timeout(20):
        while {name: report.events for name, report in (await reader.read(list(wanted))).items()} != wanted:  # noqa: ASYNC110 - asks Redis
            await asyncio.sleep(0.02)


@pytest.mark.fault(
    "B1",
    "A Redis Cluster moves slots to another node (status reports)",
    "Every worker's status report is found on the new node.",
)
async def test_reports_are_on_every_node_and_follow_slots_that_move(
    cluster: ValkeyCluster, seen: Callable[[str], None]
) -> None:
    moving, staying = cluster.names_on(0, 3, "REPORT"), cluster.names_on(1, 3, "REPORT")
    names = moving + staying
    life_ms = 60_000

    def reports(events: int) -> dict[str, str]:
        return {
            name: InstrumentReport(
                worker="w:1",
                state=BookState.VALID,
                unknown_because="",
                event_age_seconds=0.1,
                lag_records=0,
                vector_version="",
                events=events,
                gaps=0,
                crossings=0,
                resets=0,
                time_restarts=0,
            ).model_dump_json()
            for name in names
        }

    async with open_store(cluster.url, 60, 2) as store, open_store(cluster.url, 60, 2) as other:
        reader = ReportReader(other)  # of a process that never writes, and so is not told by a refused write
        await store.write_texts(report_key_of, reports(1), life_ms)
        await reported(reader, dict.fromkeys(names, 1))
        began = time.monotonic()
        for taking, giving in ((cluster.replica, cluster.nodes[0]), (cluster.nodes[0], cluster.replica)):
            await asyncio.to_thread(taking.command, "CLUSTER", "FAILOVER")
            await asyncio.to_thread(wait_until, taking.is_primary)
            await asyncio.to_thread(wait_until, giving.is_replica)
            with pytest.raises(MovedError):
                await store.write_texts(report_key_of, reports(2), life_ms)
            found = {name: report.events for name, report in (await reader.read(names)).items()}
            assert found == dict.fromkeys(staying, 2), "the others' are written, and read"
            await store.write_texts(report_key_of, reports(3), life_ms)
            await reported(reader, dict.fromkeys(names, 3))
        seen(f"moved there and back in {time.monotonic() - began:.1f} s")


@pytest.mark.long
@pytest.mark.fault(
    "B1",
    "A node of a Redis Cluster is killed with SIGKILL",
    "Instruments of other nodes stay fresh. Its own are back once the cluster has promoted its replica.",
)
def test_a_killed_node_makes_only_its_own_instruments_stale_until_its_replica_has_taken_over(
    cluster: ValkeyCluster, tmp_path: Path, seen: Callable[[str], None]
) -> None:
    names = [cluster.names_on(primary, prefix="FED")[0] for primary in range(PRIMARIES)]
    settings = LocalSettings(dir=tmp_path, redis_url=secret(cluster.url), instruments=tuple(names))
    with Stack(settings, parts={"broker", "worker", "market"}):
        outage, oldest = asyncio.run(_kill_first_primary(cluster, names))
    assert outage < 15
    assert oldest < 1.0, "what decides nothing is older than a second"
    seen(f"its own instruments were back after {outage:.1f} s; the others never older than {oldest * 1e3:.0f} ms")


async def _kill_first_primary(cluster: ValkeyCluster, names: list[str]) -> tuple[float, float]:
    """Returns how long the first instrument had no news, and the greatest age of the others meanwhile, in seconds."""
    lost, others = names[0], names[1:]

    def age(name: str) -> float:
        entry = cache.get(name)
        return entry.age_seconds(time.monotonic()) if entry else float("inf")

    async with copy_of(cluster.url, names, reconcile_seconds=0.2) as cache:
        await until(lambda: max(map(age, names)) < 0.5)
        await asyncio.to_thread(cluster.nodes[0].kill)
        began = time.monotonic()
        await until(lambda: age(lost) > 1.0)
        oldest = 0.0
        async with asyncio.timeout(20):
            while age(lost) > 0.5:
                oldest = max(oldest, *map(age, others))
                await asyncio.sleep(0.01)
        outage = time.monotonic() - began
        await until(lambda: cache.connected)
        assert cluster.replica.is_primary()
        async with open_store(cluster.url, 1, 0.5) as store, asyncio.timeout(20):
            while (await ReportReader(store).read(names)).keys() != set(names):  # noqa: ASYNC110 - asks Redis
                await asyncio.sleep(0.1)
        cluster.nodes[0].start()  # comes back as a replica
        return outage, oldest


async def test_a_cluster_that_is_not_there_is_an_error_that_the_writer_expects() -> None:
    async with open_store("redis+cluster://127.0.0.1:1", ttl_seconds=1, timeout_seconds=1) as store:
        with pytest.raises(RedisError, match="no node"):
            await store.write([snapshot("A.TEST", 1)])
        assert await ReportReader(store).read(["A.TEST"]) == {}
