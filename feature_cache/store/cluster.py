"""Redis Cluster: which node holds an instrument's vector, and a separate writer for every node.

A vector's key and its shard channel have the same name and therefore the same node, so that a plain client of that node
writes and notifies in one round trip, as it does without a cluster. A client per node isolates the nodes: while one is
away, the instruments of the others continue. redis-py's cluster client does not give that, since it fails a pipeline as
a whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, TypeVar
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.crc import key_slot
from redis.exceptions import ClusterDownError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError

from feature_cache.store.codec import FeatureSnapshot
from feature_cache.store.vectors import FeatureStore, connect, key_of

SCHEMES: Final = ("redis+cluster://", "rediss+cluster://")
"""Schemes of a cluster's URL, which names one or more of its nodes: `redis+cluster://[user:password@]host:port,…`."""

_REDIS_SCHEMES: Final = ("redis://", "rediss://", "unix://")
_T = TypeVar("_T")


def is_cluster(redis_url: str) -> bool:
    """Whether a URL is that of a Redis Cluster."""
    return redis_url.startswith(SCHEMES)


def check_url(redis_url: str) -> None:
    """Raises ValueError when a URL is neither that of a Redis nor that of a Redis Cluster; it never quotes the URL."""
    if not redis_url.startswith(_REDIS_SCHEMES + SCHEMES):
        raise ValueError(f"must begin with {' or '.join(_REDIS_SCHEMES + SCHEMES)}")
    for url in node_urls(redis_url) if is_cluster(redis_url) else [redis_url]:
        try:
            # Connects nowhere yet.
            connect(url, 1.0).connection_pool.make_connection()  # type: ignore[no-untyped-call]
        except ValueError:
            raise ValueError("its host, port or an option cannot be read") from None
        except TypeError:
            raise ValueError("it has an option that no Redis client knows") from None


def node_urls(redis_url: str) -> list[str]:
    """The URL of each node that a cluster's URL names. Raises ValueError when it names none, or a database."""
    before, addresses, after = _split(redis_url)
    return [f"{before}{address}{after}" for address in addresses]


def _split(redis_url: str) -> tuple[str, list[str], str]:
    """What comes before a node's `host:port`, these of the nodes, and what comes after."""
    url = urlsplit(redis_url)
    credentials, at, hosts = url.netloc.rpartition("@")
    addresses = [address for address in hosts.split(",") if address]
    if not addresses:
        raise ValueError("a Redis Cluster's URL must name a node")
    if not all(port.isdecimal() and host for host, _, port in (address.rpartition(":") for address in addresses)):
        raise ValueError("each node of a Redis Cluster must be host:port")
    if url.path not in ("", "/", "/0"):
        raise ValueError("a Redis Cluster has no database but 0")
    query = f"?{url.query}" if url.query else ""
    return f"{url.scheme.removesuffix('+cluster')}://{credentials}{at}", addresses, query


class PartialWriteError(RedisError):
    """Some nodes did not take their vectors.

    Attributes:
        unwritten: What was not written.
        refused: How many the other nodes did not store because newer ones were there.
    """

    def __init__(self, unwritten: list[FeatureSnapshot], refused: int, cause: BaseException) -> None:
        super().__init__(f"{len(unwritten)} vectors were not written: {cause!r}")
        self.unwritten = unwritten
        self.refused = refused


class Cluster:
    """The nodes of a Redis Cluster and who holds which slots, as of the last `discover`.

    Args:
        redis_url: See `SCHEMES`; user, password and query hold for every node.
        timeout_seconds: How long a node may take to connect, and to answer a `discover`.
    """

    def __init__(self, redis_url: str, timeout_seconds: float) -> None:
        self._before, self._known, self._after = _split(redis_url)
        self._timeout_seconds = timeout_seconds
        self._clients: dict[str, Redis] = {}
        self._slots: list[tuple[int, int, str]] = []

    def new_client(self, address: str) -> Redis:
        """A client of the node at `host:port`, for the caller to close."""
        return connect(f"{self._before}{address}{self._after}", self._timeout_seconds)

    def client(self, address: str) -> Redis:
        """The cluster's own client of a node."""
        if address not in self._clients:
            self._clients[address] = self.new_client(address)
        return self._clients[address]

    async def discover(self) -> None:
        """Learns the nodes and their slots from the first node that answers. Cancelling is safe.

        Raises:
            RedisError: No node answered.
        """
        problem: BaseException | None = None
        for address in list(self._known):
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    answer = await self.client(address).execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]
            except (RedisError, OSError) as error:
                problem = error
                continue
            asked = address.rpartition(":")[0]
            self._slots = [(first, last, _address(node, asked)) for first, last, node, *_ in answer]
            nodes = [_address(node, asked) for _, _, *nodes in answer for node in nodes]
            # The one that answered first of all, and those that are no longer named last: a whole cluster may be
            # started anew elsewhere.
            self._known = list(dict.fromkeys([address, *nodes, *self._known]))[:100]
            return
        raise RedisConnectionError(f"no node of the cluster answers: {problem!r}")

    def by_node(self, instruments: Iterable[str]) -> dict[str, list[str]]:
        """Instruments by the address of the node that holds them; those that no node holds are under an empty one."""
        owned: dict[str, list[str]] = {}
        for instrument in instruments:
            owned.setdefault(self._owner_of(key_of(instrument)), []).append(instrument)
        return owned

    def owner_of(self, key: str) -> str:
        """`host:port` of the node that holds a key. Raises `RedisError` when none does."""
        owner = self._owner_of(key)
        if not owner:
            raise ClusterDownError("no node holds this slot")
        return owner

    def _owner_of(self, key: str) -> str:
        slot = key_slot(key.encode())
        return next((address for first, last, address in self._slots if first <= slot <= last), "")

    @property
    def owners(self) -> set[str]:
        """Addresses of the nodes that hold slots."""
        return {address for _, _, address in self._slots}

    async def aclose(self) -> None:
        """Closes the cluster's own clients."""
        for client in self._clients.values():
            with suppress(RedisError, OSError):
                await client.aclose()


class ClusterFeatureStore:
    """`FeatureStore` on a cluster: each node's vectors are written by themselves, side by side.

    Args:
        cluster: Not closed here.
        ttl_seconds: See `FeatureStore`.
        timeout_seconds: The same; of each node.
    """

    def __init__(self, cluster: Cluster, ttl_seconds: float, timeout_seconds: float) -> None:
        self._cluster = cluster
        self._ttl_seconds = ttl_seconds
        self._timeout_seconds = timeout_seconds
        self._discovered = False

    async def write(self, snapshots: Iterable[FeatureSnapshot]) -> int:
        """Stores and publishes vectors, in one round trip to each node. Cancelling may leave some of them written.

        Returns:
            How many were not stored because newer ones were there.

        Raises:
            PartialWriteError: Some nodes refused or did not answer; it names what is to be written again.
            RedisError: No node answered; nothing is written.
        """
        newest = {snapshot.instrument: snapshot for snapshot in snapshots}
        refused, lost, problem = await self._ask_each(
            newest, lambda node, names: node.write([newest[name] for name in names])
        )
        if problem is not None:
            raise PartialWriteError([newest[name] for name in lost], sum(refused), problem)
        return sum(refused)

    async def write_texts(self, key_of: Callable[[str], str], texts: Mapping[str, str], life_ms: int) -> None:
        """As `FeatureStore.write_texts`; what it raises is about some nodes, and the others have theirs."""
        _, _, problem = await self._ask_each(
            texts, lambda node, names: node.write_texts(key_of, {name: texts[name] for name in names}, life_ms)
        )
        if problem is not None:
            raise problem

    async def read_texts(self, key_of: Callable[[str], str], instruments: Sequence[str]) -> dict[str, bytes]:
        """As `FeatureStore.read_texts`; a node that does not answer has none."""
        answers, _, _ = await self._ask_each(instruments, lambda node, names: node.read_texts(key_of, names))
        return {name: text for answer in answers for name, text in answer.items()}

    async def check(self) -> None:
        """Sees which nodes hold the slots, and whether they are there. Raises `RedisError` or `TimeoutError`."""
        self._discovered = False
        await self._discover()
        for address in self._cluster.owners:
            await self._store(address).check()

    async def _discover(self) -> None:
        if not self._discovered:
            await self._cluster.discover()
            self._discovered = True

    async def _ask_each(
        self, instruments: Iterable[str], ask: Callable[[FeatureStore, list[str]], Awaitable[_T]]
    ) -> tuple[list[_T], list[str], RedisError | OSError | None]:
        """Asks every node for its own instruments, side by side.

        Returns:
            The answers, the instruments of the nodes that gave none, and why one of them did not.

        Raises:
            RedisError: It is not known who holds what, and no node tells.
        """
        await self._discover()
        parts = self._cluster.by_node(instruments)
        answers: list[_T] = []
        lost = parts.pop("", [])
        problem: RedisError | OSError | None = ClusterDownError("no node holds these slots") if lost else None
        results = await asyncio.gather(
            *(ask(self._store(address), names) for address, names in parts.items()), return_exceptions=True
        )
        for names, result in zip(parts.values(), results, strict=True):
            if isinstance(result, (RedisError, OSError)):
                lost += names
                problem = result
            elif isinstance(result, BaseException):
                raise result
            else:
                answers.append(result)
        if problem is not None:
            self._discovered = False  # a node that does not answer may not hold them any more
        return answers, lost, problem

    def _store(self, address: str) -> FeatureStore:
        return FeatureStore(self._cluster.client(address), self._ttl_seconds, self._timeout_seconds, sharded=True)


def _address(node: tuple[bytes | None, int], asked: str) -> str:
    """`host:port` of a node in the answer; one that does not know its own host is where it was asked."""
    host, port = node[0], node[1]
    return f"{host.decode() if host else asked}:{port}"


@asynccontextmanager
async def open_store(
    redis_url: str, ttl_seconds: float, timeout_seconds: float
) -> AsyncIterator[FeatureStore | ClusterFeatureStore]:
    """The store at a URL, of one Redis or of a cluster, while the context is open."""
    if is_cluster(redis_url):
        cluster = Cluster(redis_url, timeout_seconds)
        try:
            yield ClusterFeatureStore(cluster, ttl_seconds, timeout_seconds)
        finally:
            await cluster.aclose()
    else:
        async with connect(redis_url, timeout_seconds) as redis:
            yield FeatureStore(redis, ttl_seconds, timeout_seconds)
