"""The control state that several servers share, on a real Redis-protocol server and a network that fails."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis
from tcp_proxy import Fault, TcpProxy, through

from feature_cache.store import connect
from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from server.audit.journal import Journal, JournalSettings
from server.audit.journal_file import JournalReader
from server.control.errors import ChangeRefusedError, ControlChangedError
from server.control.file import ControlFile
from server.control.shared import SharedControl, SharedSettings
from server.control.state import ControlSettings, ControlState, Wanted
from server.control.subjects import breaker_subjects
from server.inference.breaker import Breaker, BreakerSettings, Mode

pytestmark = pytest.mark.stack

KEY = "test:control"
_NUMBERS = itertools.count()
_PATIENCE_SECONDS = 20.0


class Process:
    """A process of the server whose files are in `directory`."""

    def __init__(self, directory: Path, redis_url: str, journal: Journal, ahead: float = 0.0) -> None:
        directory.mkdir(exist_ok=True)
        self.ahead = ahead
        """Seconds by which the test moved this process's clocks on."""
        self.breaker = Breaker("primary", BreakerSettings(), self.clock, lambda: 0.5, lambda *_: None)
        self.shared = SharedControl(redis_url, SharedSettings(key=KEY, stale_seconds=1.0), self.clock)
        self.control = ControlState(
            ControlSettings(),
            ControlFile(directory / "control.json"),
            breaker_subjects({"primary": self.breaker}),
            journal,
            directory.name,
            lambda: f"{next(_NUMBERS):06}",
            lambda: int((time.time() + self.ahead) * 1e9),
            self.clock,
            self.shared,
        )

    def clock(self) -> float:
        return time.monotonic() + self.ahead

    async def set(
        self, subject: str, value: str | None, seconds: float | None = None, expected: int | None = None
    ) -> admin_pb2.Change:
        return await self.control.change(Wanted(subject, value, self.control._instance_id, "test", seconds, expected))

    @property
    def state(self) -> str:
        return self.control.trading_state_name


Start = Callable[..., Awaitable[Process]]


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    async with Journal(JournalSettings(path=tmp_path / "journal.db")) as journal:
        yield journal


@pytest.fixture
async def start(tmp_path: Path, redis_url: str, journal: Journal) -> AsyncIterator[Start]:
    """Starts a process of a server, with its watch: `await start("a")`."""
    watches: list[tuple[Process, asyncio.Task[None]]] = []

    async def start(server: str, url: str = redis_url) -> Process:
        process = Process(tmp_path / server, url, journal)
        await process.control.synchronise()
        watches.append((process, asyncio.create_task(process.control.watch())))
        return process

    yield start
    for _, task in watches:
        task.cancel()
    ends = await asyncio.gather(*(task for _, task in watches), return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ends), "nothing but cancellation ends a watch"
    for process, _ in watches:
        await process.shared.aclose()


@pytest.fixture
def network(redis_url: str) -> Iterator[TcpProxy]:
    there = urlsplit(redis_url)
    with TcpProxy(f"{there.hostname}:{there.port}") as proxy:
        yield proxy


@pytest.fixture
def by_proxy(redis_url: str, network: TcpProxy) -> str:
    """URL of the Redis by way of a network that can be spoiled."""
    return through(redis_url, network.address)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with connect(redis_url, 1.0) as client:
        yield client


@asynccontextmanager
async def refused(network: TcpProxy) -> AsyncIterator[None]:
    network.refuse()
    yield
    network.heal()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - plain attributes
            await asyncio.sleep(0.005)


def changes_in(journal: Journal) -> list[packet_pb2.ControlChange]:
    with closing(JournalReader(journal.settings.path)) as reader:
        entries = [packet_pb2.JournalEntry.FromString(row.entry) for row in reader.rows_after(0, 1_000)]
    return [entry.control_change for entry in entries]


async def test_a_change_reaches_every_server_and_a_new_one_begins_with_it(start: Start) -> None:
    first, second = await start("a"), await start("b")
    made = await first.set("trading_state", "HALTED")
    assert (made.previous_version, made.version, made.local) == (0, 1, False)
    assert list(made.diff) == ["trading_state: ACTIVE → HALTED"]
    await until(lambda: second.state == "HALTED" and second.control.version == 1)
    third = await start("c")
    assert (third.state, third.control.version, third.control.stale) == ("HALTED", 1, False)


async def test_of_two_changes_of_one_version_exactly_one_is_made(start: Start, journal: Journal) -> None:
    servers = [await start(name) for name in "abcd"]
    outcomes = await asyncio.gather(
        *(server.set("flag/shadow", "off", expected=0) for server in servers), return_exceptions=True
    )
    assert sum(isinstance(outcome, admin_pb2.Change) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, ControlChangedError) for outcome in outcomes) == 3
    await until(lambda: all(server.control.version == 1 for server in servers))
    assert len(changes_in(journal)) == 1


async def test_changes_of_several_servers_at_once_are_all_kept(start: Start) -> None:
    servers = [await start(name) for name in "abcd"]
    await asyncio.gather(
        servers[0].set("trading_state", "REDUCING"),
        servers[1].set("flag/shadow", "off"),
        servers[2].set("flag/cached_score", "off"),
        servers[3].set("breaker/primary", "forced_open"),
    )
    await until(lambda: all(server.control.version == 4 for server in servers))
    for server in servers:
        assert (server.state, server.control.flags_on, server.breaker.mode) == ("REDUCING", (), Mode.FORCED_OPEN)


@pytest.mark.parametrize("wiped", ["FLUSHALL", "an older copy"])
async def test_a_redis_that_lost_the_state_is_given_it_again(start: Start, redis: Redis, wiped: str) -> None:
    first, second = await start("a"), await start("b")
    await first.set("flag/shadow", "off")
    newest: Any = await redis.xrevrange(KEY, count=1)
    await first.set("trading_state", "HALTED")
    await until(lambda: second.state == "HALTED")
    await redis.flushall()
    if wiped == "an older copy":
        await redis.xadd(KEY, newest[0][1])
    await until(lambda: first.control.store.shared and first.control.version == 2)
    third = await start("c")
    await until(lambda: third.control.version == 2)
    assert [server.state for server in (first, second, third)] == ["HALTED"] * 3
    assert (await second.set("trading_state", "ACTIVE")).version == 3
    await until(lambda: first.state == third.state == "ACTIVE")


async def test_a_server_without_redis_halts_alone_says_so_and_all_hear_of_it_later(
    start: Start, network: TcpProxy, by_proxy: str
) -> None:
    cut_off, other = await start("a", by_proxy), await start("b")
    async with refused(network):
        made = await cut_off.set("trading_state", "HALTED")
        assert (made.local, cut_off.state, other.state) == (True, "HALTED", "ACTIVE")
        await until(lambda: cut_off.control.stale)
        status = cut_off.control.status()
        assert (status.stale, status.pending, bool(status.problem)) == (True, 1, True)
        assert not other.control.stale
        await other.set("flag/shadow", "off")
        assert cut_off.control.flags_on == ("shadow", "cached_score"), "the last one known stays"
    await until(lambda: other.state == "HALTED")
    await until(lambda: cut_off.control.flags_on == ("cached_score",) and not cut_off.control.stale)
    assert cut_off.control.version == other.control.version == 2
    assert cut_off.control.status().pending == 0


async def test_without_redis_the_trading_state_only_grows_stricter(
    start: Start, network: TcpProxy, by_proxy: str
) -> None:
    cut_off, other = await start("a", by_proxy), await start("b")
    await other.set("trading_state", "REDUCING")
    await until(lambda: cut_off.state == "REDUCING")
    async with refused(network):
        with pytest.raises(ChangeRefusedError, match="REDUCING"):
            await cut_off.set("trading_state", "ACTIVE")
        assert cut_off.state == "REDUCING"
        await cut_off.set("trading_state", "HALTED")
        await cut_off.set("trading_state", "REDUCING")  # back to what all know
        assert cut_off.state == "REDUCING"
        await other.set("trading_state", "HALTED")
    await until(lambda: cut_off.state == "HALTED")
    await until(lambda: cut_off.control.status().pending == 0)
    assert other.state == "HALTED", "what one server undid for itself does not undo what all were told"


async def test_a_server_that_never_heard_of_the_others_is_halted_until_it_does(
    start: Start, network: TcpProxy, by_proxy: str, tmp_path: Path
) -> None:
    other = await start("b")
    async with refused(network):
        first = await start("a", by_proxy)
        assert (first.state, first.control.version) == ("HALTED", 0)
        with pytest.raises(ChangeRefusedError, match="HALTED"):
            await first.set("trading_state", "ACTIVE")
        await first.set("flag/shadow", "off")
        restarted = await start("a", by_proxy)
        assert (restarted.state, restarted.control.flags_on) == ("HALTED", ("cached_score",)), "it still has not heard"
    await until(lambda: first.state == restarted.state == "ACTIVE")
    await until(lambda: other.control.flags_on == ("cached_score",))
    assert other.state == "ACTIVE", "that a server did not know does not halt the others"
    await until(lambda: (kept := ControlFile(tmp_path / "a" / "control.json").read()) and kept.says_what_all_know)
    async with refused(network):
        assert (await start("a", by_proxy)).state == "ACTIVE", "from now on its file says what all were told"


async def test_a_server_that_once_heard_that_nobody_set_anything_knows_so_after_a_restart(
    start: Start, network: TcpProxy, by_proxy: str
) -> None:
    await start("a", by_proxy)
    async with refused(network):
        assert (await start("a", by_proxy)).state == "ACTIVE"


async def test_what_needs_all_servers_is_refused_without_redis_and_is_not_brought_later(
    start: Start, network: TcpProxy, by_proxy: str
) -> None:
    cut_off, other = await start("a", by_proxy), await start("b")
    wanted = Wanted("breaker/primary", "forced_open", "server", "a step", needs_all=True)
    async with refused(network):
        with pytest.raises(ChangeRefusedError, match="nobody knows what the other servers"):
            await cut_off.control.change(wanted)
        assert (cut_off.breaker.mode, cut_off.control.status().pending) == (Mode.AUTOMATIC, 0)
    await until(lambda: not cut_off.control.problem)
    await cut_off.control.change(wanted)
    await until(lambda: other.breaker.mode is Mode.FORCED_OPEN)


async def test_processes_of_a_server_share_what_redis_does_not_know_and_it_is_brought_once(
    start: Start, network: TcpProxy, by_proxy: str
) -> None:
    first, second, other = await start("a", by_proxy), await start("a", by_proxy), await start("b")
    async with refused(network):
        await first.set("trading_state", "HALTED")
        await until(lambda: second.state == "HALTED")
        await second.set("breaker/primary", "forced_open")
        await until(lambda: first.breaker.mode is Mode.FORCED_OPEN)
        restarted = await start("a", by_proxy)
        assert (restarted.state, restarted.breaker.mode) == ("HALTED", Mode.FORCED_OPEN)
    await until(lambda: other.state == "HALTED" and other.breaker.mode is Mode.FORCED_OPEN)
    await until(lambda: not any(one.control.status().pending for one in (first, second, restarted)))
    assert {one.control.version for one in (first, second, restarted, other)} == {2}


@pytest.mark.parametrize("fault", [Fault(hold_replies=True), Fault(hold_replies=True, hold_requests=True)])
async def test_a_change_whose_answer_is_lost_is_made_once(
    start: Start, network: TcpProxy, by_proxy: str, journal: Journal, fault: Fault
) -> None:
    cut_off, other = await start("a", by_proxy), await start("b")
    network.apply(fault)
    began = time.monotonic()
    assert (await cut_off.set("flag/shadow", "off")).local
    assert time.monotonic() - began < 5.0, "it does not wait for a Redis that says nothing"
    network.heal()
    await until(lambda: other.control.flags_on == ("cached_score",))
    await until(lambda: cut_off.control.status().pending == 0)
    assert (cut_off.control.version, other.control.version, len(changes_in(journal))) == (1, 1, 1)


async def test_what_is_set_for_a_time_reverts_everywhere_and_is_recorded_once(start: Start, journal: Journal) -> None:
    first, second = await start("a"), await start("b")
    await first.set("trading_state", "REDUCING")
    made = await first.set("trading_state", "HALTED", seconds=60)
    assert list(made.diff) == ["trading_state: REDUCING → HALTED for 60 s, then REDUCING"]
    await until(lambda: second.state == "HALTED")
    first.ahead = second.ahead = 59.0
    assert (first.state, second.state) == ("HALTED", "HALTED")
    first.ahead = second.ahead = 61.0
    await until(lambda: first.state == second.state == "REDUCING")
    await until(lambda: first.control.version == second.control.version == 3)
    await until(lambda: len(changes_in(journal)) == 3)
    ended = changes_in(journal)[-1]
    assert (ended.author, ended.previous, ended.value) == ("expiry", "HALTED", "REDUCING")
    assert "60 s" in ended.reason


@pytest.mark.parametrize(("away_seconds", "state"), [(30.0, "HALTED"), (61.0, "ACTIVE")])
async def test_a_restart_prolongs_nothing_that_was_set_for_a_time(
    start: Start, tmp_path: Path, journal: Journal, away_seconds: float, state: str
) -> None:
    before = await start("a")
    await before.set("trading_state", "HALTED", seconds=60)
    after = Process(tmp_path / "a", "redis://127.0.0.1:9/0", journal, ahead=away_seconds)
    assert after.state == state
    after.ahead = 61.0
    after.control._obey()
    assert after.state == "ACTIVE"


async def test_a_value_set_for_a_time_ends_without_redis_too(start: Start, network: TcpProxy, by_proxy: str) -> None:
    cut_off = await start("a", by_proxy)
    await cut_off.set("flag/shadow", "off", seconds=60)
    async with refused(network):
        cut_off.ahead = 61.0
        await until(lambda: cut_off.control.shadow)
    await until(lambda: cut_off.control.version == 2)


async def test_a_dry_run_says_what_would_change_and_changes_nothing(start: Start, journal: Journal) -> None:
    server = await start("a")
    wanted = Wanted("flag/shadow", "off", "test", "test", 30.0, dry_run=True)
    would = await server.control.change(wanted)
    assert (would.dry_run, would.change_id, would.previous, would.value) == (True, "", "on", "off")
    assert list(would.diff) == ["flag/shadow: on → off for 30 s, then on"]
    assert (server.control.version, server.control.shadow, changes_in(journal)) == (0, True, [])


@pytest.mark.parametrize("garbage", ["no state", "no stream"])
async def test_something_else_at_the_key_changes_nothing_and_is_left_there(
    start: Start, redis: Redis, garbage: str
) -> None:
    server = await start("a")
    await server.set("flag/shadow", "off")
    if garbage == "no stream":
        await redis.set(KEY, "garbage")
    else:
        await redis.xadd(KEY, {"version": 9, "change_id": "z", "state": '{"of": "another version"}'})
    await until(lambda: server.control.problem)
    made = await server.set("trading_state", "HALTED")
    assert (made.local, server.state, server.control.shadow) == (True, "HALTED", False)
    await redis.delete(KEY)
    await until(lambda: server.control.status().pending == 0)
    assert (await start("b")).state == "HALTED"
