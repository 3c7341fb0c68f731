"""The control state that several servers share, on a real Redis-protocol server and a network that fails."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis
from support.control_files import role_of
from support.tcp_proxy import Fault, TcpProxy, through
from support.valkey_pair import ValkeyPair
from support.waiting import until

from feature_cache.store.vectors import connect
from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from server.control.file import ControlFile
from server.control.model import UNDECIDED
from server.control.shared import SharedControl, SharedSettings
from server.control.state import ControlSettings, ControlState, Wanted
from server.control.subjects import breaker_subjects
from server.errors import ChangeInDoubtError, ChangeRefusedError, ControlChangedError
from server.inference.breaker import Breaker, BreakerSettings, Mode
from server.journal.journal import Journal, JournalSettings
from server.journal.journal_file import JournalReader

pytestmark = pytest.mark.stack

KEY = "test:control"
_NUMBERS = itertools.count()
TRADES: Final = ControlSettings(initial_trading_state="ACTIVE")
"""Of servers that trade from their first start on, which makes version 1 of their control state."""


class Process:
    """A process of the server whose files are in `directory`."""

    def __init__(
        self,
        directory: Path,
        redis_url: str,
        journal: Journal,
        ahead: float = 0.0,
        settings: ControlSettings = TRADES,
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.ahead = ahead
        """Seconds by which the test moved this process's clocks on."""
        self.breaker = Breaker("primary", BreakerSettings(), self.clock, lambda: 0.5, lambda *_: None)
        shared = SharedSettings(key=KEY, stale_seconds=1.0)
        self.shared = SharedControl(redis_url, shared, self.clock, self._connect)
        self.before_script: Callable[[], None] = lambda: None
        """Called before each write to Redis."""
        self.control = ControlState(
            settings,
            ControlFile(directory / "control.json"),
            breaker_subjects([role_of("primary", self.breaker)]),
            journal,
            f"{directory.name}-{next(_NUMBERS)}",
            lambda: f"{next(_NUMBERS):06}",
            lambda: int((time.time() + self.ahead) * 1e9),
            self.clock,
            self.shared,
        )

    def _connect(self, url: str, connect_timeout_seconds: float) -> Redis:
        client = ScriptedRedis.from_pool(connect(url, connect_timeout_seconds).connection_pool)
        assert isinstance(client, ScriptedRedis)
        client.process = self
        return client

    def clock(self) -> float:
        return time.monotonic() + self.ahead

    async def set(
        self, subject: str, value: str | None, seconds: float | None = None, expected: int | None = None
    ) -> admin_pb2.Change:
        return await self.control.change(Wanted(subject, value, self.control._instance_id, "test", seconds, expected))

    @property
    def state(self) -> str:
        return self.control.trading_state_name


class ScriptedRedis(Redis):
    """A client that says when it is about to write."""

    process: Process

    async def eval(self, *arguments: Any) -> Any:
        self.process.before_script()
        return await super().eval(*arguments)


Start = Callable[..., Awaitable[Process]]


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    async with Journal(JournalSettings(path=tmp_path / "journal.db")) as journal:
        yield journal


@pytest.fixture
async def start(tmp_path: Path, redis_url: str, journal: Journal) -> AsyncIterator[Start]:
    """Starts a process of a server, with its watch: `await start("a")`."""
    watches: list[tuple[Process, asyncio.Task[None]]] = []

    async def start(server: str, url: str = redis_url, settings: ControlSettings = TRADES) -> Process:
        process = Process(tmp_path / server, url, journal, settings=settings)
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


async def settled(*processes: Process) -> None:
    """Waits until all know the same, and nobody has anything to tell Redis any more."""
    controls = [process.control.store for process in processes]
    await until(lambda: all(one.control == controls[0].control and not one.unrecorded() for one in controls))


@asynccontextmanager
async def refused(network: TcpProxy) -> AsyncIterator[None]:
    network.refuse()
    yield
    network.heal()


def changes_in(journal: Journal) -> list[packet_pb2.ControlChange]:
    """What is recorded, without the first change of a new installation."""
    with closing(JournalReader(journal.settings.path)) as reader:
        entries = [packet_pb2.JournalEntry.FromString(row.entry) for row in reader.rows_after(0, 1_000)]
    return [entry.control_change for entry in entries if "initial_trading_state" not in entry.control_change.reason]


async def test_a_change_reaches_every_server_and_a_new_one_begins_with_it(start: Start) -> None:
    first, second = await start("a"), await start("b")
    made = await first.set("trading_state", "HALTED")
    assert (made.previous_version, made.version, made.local) == (1, 2, False)
    assert list(made.diff) == ["trading_state: ACTIVE → HALTED"]
    await until(lambda: second.state == "HALTED" and second.control.version == 2)
    third = await start("c")
    assert (third.state, third.control.version, third.control.stale) == ("HALTED", 2, False)


async def test_of_two_changes_of_one_version_exactly_one_is_made(start: Start, journal: Journal) -> None:
    servers = [await start(name) for name in "abcd"]
    outcomes = await asyncio.gather(
        *(server.set("flag/shadow", "off", expected=1) for server in servers), return_exceptions=True
    )
    assert sum(isinstance(outcome, admin_pb2.Change) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, ControlChangedError) for outcome in outcomes) == 3
    await until(lambda: all(server.control.version == 2 for server in servers))
    assert len(changes_in(journal)) == 1


async def test_changes_of_several_servers_at_once_are_all_kept(start: Start) -> None:
    servers = [await start(name) for name in "abcd"]
    await asyncio.gather(
        servers[0].set("trading_state", "REDUCING"),
        servers[1].set("flag/shadow", "off"),
        servers[2].set("flag/cached_score", "off"),
        servers[3].set("breaker/primary", "forced_open"),
    )
    await until(lambda: all(server.control.version == 5 for server in servers))
    for server in servers:
        assert (server.state, server.control.flags_on) == ("REDUCING", ("embedded", "out_of_domain"))
        assert server.breaker.mode is Mode.FORCED_OPEN


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
    third = await start("c")
    await until(lambda: third.control.version == 3)
    assert [server.state for server in (first, second, third)] == ["HALTED"] * 3
    assert (await second.set("trading_state", "ACTIVE")).version == 4
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
        assert cut_off.control.flags_on == ("shadow", "cached_score", "embedded", "out_of_domain"), (
            "the last one known stays"
        )
    await until(lambda: other.state == "HALTED")
    await until(
        lambda: cut_off.control.flags_on == ("cached_score", "embedded", "out_of_domain") and not cut_off.control.stale
    )
    await until(lambda: cut_off.control.version == other.control.version == 3)
    await until(lambda: cut_off.control.status().pending == 0)


async def test_without_redis_the_trading_state_only_grows_stricter(
    start: Start, network: TcpProxy, by_proxy: str
) -> None:
    cut_off, other = await start("a", by_proxy), await start("b")
    await other.set("trading_state", "REDUCING")
    await until(lambda: cut_off.state == "REDUCING")
    async with refused(network):
        with pytest.raises(ChangeRefusedError, match="a restriction that all servers have cannot be lifted"):
            await cut_off.set("trading_state", "ACTIVE")
        assert cut_off.state == "REDUCING"
        await cut_off.set("trading_state", "HALTED")
        await cut_off.set("trading_state", "REDUCING")  # back to what all know
        assert cut_off.state == "REDUCING"
        await other.set("trading_state", "HALTED")
    await until(lambda: cut_off.state == "HALTED")
    await until(lambda: cut_off.control.status().pending == 0)
    assert other.state == "HALTED", "what one server undid for itself does not undo what all were told"


@pytest.mark.fault(
    "B3",
    "A server with an empty disk starts while Redis is down",
    "It is HALTED until it has read the shared control state.",
)
async def test_a_server_that_never_heard_of_the_others_is_halted_until_it_does(
    start: Start, network: TcpProxy, by_proxy: str, tmp_path: Path
) -> None:
    other = await start("b")
    async with refused(network):
        first = await start("a", by_proxy)
        assert (first.state, first.control.version) == ("HALTED", 0)
        with pytest.raises(ChangeRefusedError, match="a restriction that all servers have cannot be lifted"):
            await first.set("trading_state", "ACTIVE")
        await first.set("flag/shadow", "off")
        restarted = await start("a", by_proxy)
        assert (restarted.state, restarted.control.flags_on) == (
            "HALTED",
            ("cached_score", "embedded", "out_of_domain"),
        )
    await until(lambda: first.state == restarted.state == "ACTIVE")
    await until(lambda: other.control.flags_on == ("cached_score", "embedded", "out_of_domain"))
    assert other.state == "ACTIVE", "that a server did not know does not halt the others"
    file = ControlFile(tmp_path / "a" / "control.json")
    await until(lambda: (kept := file.read()) and UNDECIDED.id in kept.control.trading.lifted)
    async with refused(network):
        assert (await start("a", by_proxy)).state == "ACTIVE", "from now on its file says what all were told"


async def test_a_new_installation_is_halted_on_all_servers_until_somebody_sets_the_trading_state(
    start: Start, journal: Journal
) -> None:
    first, second = [await start(name, settings=ControlSettings()) for name in "ab"]
    assert (first.state, second.state, first.control.version) == ("HALTED", "HALTED", 0)
    await first.set("flag/shadow", "off")
    third = await start("c", settings=ControlSettings())
    assert third.state == "HALTED", "a flag is no permission to trade"
    made = await third.set("trading_state", "ACTIVE")
    assert list(made.lifts) == [UNDECIDED.id]
    await until(lambda: first.state == second.state == "ACTIVE")
    assert [change.value for change in changes_in(journal)] == ["off", "ACTIVE"]


async def test_servers_that_may_begin_by_themselves_do_so_once_and_not_again_when_redis_is_wiped(
    start: Start, redis: Redis, journal: Journal
) -> None:
    servers = await asyncio.gather(*(start(name) for name in "abc"))
    assert [server.state for server in servers] == ["ACTIVE"] * 3
    await until(lambda: journal.position >= 1)
    await servers[0].set("trading_state", "HALTED")
    await until(lambda: [server.state for server in servers] == ["HALTED"] * 3)
    await redis.flushall()
    await until(lambda: servers[1].control.version == 2)
    assert (await start("a")).state == "HALTED", "its file knows of the halt"
    assert (await start("new")).state == "HALTED", "whoever is left has told Redis"


async def test_a_wiped_redis_and_wiped_disks_leave_a_new_installation(start: Start) -> None:
    assert (await start("a", settings=ControlSettings())).state == "HALTED"


async def test_a_redis_that_was_away_at_the_first_start_gets_its_first_state_when_it_is_there(
    start: Start, network: TcpProxy, by_proxy: str
) -> None:
    async with refused(network):
        server = await start("a", by_proxy)
        assert server.state == "HALTED"
    await until(lambda: server.state == "ACTIVE")


async def test_what_needs_all_servers_is_refused_without_redis_and_is_not_brought_later(
    start: Start, network: TcpProxy, by_proxy: str
) -> None:
    cut_off, other = await start("a", by_proxy), await start("b")
    wanted = Wanted("breaker/primary", "forced_open", "server", "a step", needs_all=True)
    async with refused(network):
        await until(lambda: bool(cut_off.control.problem))  # or a connection that breaks leaves it in doubt
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
    assert {one.control.version for one in (first, second, restarted, other)} == {3}


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
    await until(lambda: other.control.flags_on == ("cached_score", "embedded", "out_of_domain"))
    await until(lambda: cut_off.control.status().pending == 0)
    assert (cut_off.control.version, other.control.version, len(changes_in(journal))) == (2, 2, 1)


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
    await until(lambda: first.control.version == second.control.version == 4)
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
    after.control._apply()
    assert after.state == "ACTIVE"


async def test_a_value_set_for_a_time_ends_without_redis_too(start: Start, network: TcpProxy, by_proxy: str) -> None:
    cut_off = await start("a", by_proxy)
    await cut_off.set("flag/shadow", "off", seconds=60)
    async with refused(network):
        cut_off.ahead = 61.0
        await until(lambda: cut_off.control.shadow)
    await until(lambda: cut_off.control.version == 3)


async def test_a_dry_run_says_what_would_change_and_changes_nothing(start: Start, journal: Journal) -> None:
    server = await start("a")
    wanted = Wanted("flag/shadow", "off", "test", "test", 30.0, dry_run=True)
    would = await server.control.change(wanted)
    assert (would.dry_run, would.change_id, would.previous, would.value) == (True, "", "on", "off")
    assert list(would.diff) == ["flag/shadow: on → off for 30 s, then on"]
    assert (server.control.version, server.control.shadow, changes_in(journal)) == (1, True, [])


@pytest.mark.parametrize("garbage", ["no state", "no stream"])
async def test_something_else_at_the_key_changes_nothing_and_is_left_there(
    start: Start, redis: Redis, garbage: str
) -> None:
    server = await start("a")
    await server.set("flag/shadow", "off")
    if garbage == "no stream":
        await redis.set(KEY, "garbage")
    else:
        await redis.xadd(KEY, {"state": '{"of": "another version"}'})
    await until(lambda: server.control.problem)
    made = await server.set("trading_state", "HALTED")
    assert (made.local, server.state, server.control.shadow) == (True, "HALTED", False)
    await redis.delete(KEY)
    await until(lambda: server.control.status().pending == 0)
    assert (await start("b")).state == "HALTED"


@pytest.mark.fault(
    "B3",
    "Redis never answers a change to ACTIVE",
    "The operator gets CHANGE_IN_DOUBT. The change is audited if it was made.",
)
async def test_whoever_relaxes_trading_and_gets_no_answer_is_told_that_nobody_knows_and_it_is_recorded_all_the_same(
    start: Start, network: TcpProxy, by_proxy: str, journal: Journal
) -> None:
    cut_off, other = await start("a", by_proxy), await start("b")
    halt = await other.set("trading_state", "HALTED")
    await until(lambda: cut_off.state == "HALTED")
    await settled(cut_off, other)
    cut_off.before_script = partial(network.apply, Fault(hold_replies=True))
    began = time.monotonic()
    with pytest.raises(ChangeInDoubtError) as doubt:
        await cut_off.set("trading_state", "ACTIVE")
    assert time.monotonic() - began < 5.0, "2 s, on a machine that has other work: the `pretrade` command waits for 3"
    assert doubt.value.change_id in str(doubt.value)
    await until(lambda: other.state == "ACTIVE")  # it was made, and the operator was not told that it was refused
    assert cut_off.state == "HALTED", "it does not know"
    network.heal()
    await until(lambda: cut_off.state == "ACTIVE")
    await until(lambda: len(changes_in(journal)) == 2)
    recorded = changes_in(journal)[-1]
    assert (recorded.change_id, recorded.value) == (doubt.value.change_id, "ACTIVE")
    assert list(recorded.lifts) == [halt.change_id]
    assert recorded.instance_id.startswith("a-")
    assert cut_off.control.store.doubts == 1


async def test_an_answer_that_is_lost_for_a_moment_is_found_out_before_anybody_is_told(
    start: Start, network: TcpProxy, by_proxy: str, journal: Journal
) -> None:
    cut_off, other = await start("a", by_proxy), await start("b")
    await other.set("trading_state", "HALTED")
    await until(lambda: cut_off.state == "HALTED")
    await settled(cut_off, other)
    cut_off.before_script = partial(network.apply, Fault(hold_replies=True))
    change = asyncio.ensure_future(cut_off.set("trading_state", "ACTIVE"))
    await until(lambda: other.state == "ACTIVE" and bool(cut_off.control.problem))
    assert (change.done(), cut_off.state) == (False, "HALTED")
    cut_off.before_script = lambda: None
    network.heal()
    made = await change
    assert (made.local, made.value, cut_off.state) == (False, "ACTIVE", "ACTIVE")
    await until(lambda: other.control.version == cut_off.control.version == 3)
    assert [change.change_id for change in changes_in(journal)].count(made.change_id) == 1


async def test_a_change_that_never_arrived_is_made_within_the_time_of_its_call(
    start: Start, network: TcpProxy, by_proxy: str
) -> None:
    cut_off, other = await start("a", by_proxy), await start("b")
    await other.set("trading_state", "HALTED")
    await until(lambda: cut_off.state == "HALTED")
    await settled(cut_off, other)
    cut_off.before_script = partial(network.apply, Fault(hold_requests=True, hold_replies=True))
    change = asyncio.ensure_future(cut_off.set("trading_state", "ACTIVE"))
    await until(lambda: bool(cut_off.control.problem))
    cut_off.before_script = lambda: None
    network.reset_all()  # what was under way is lost, and what comes later arrives
    network.heal()
    made = await change
    await until(lambda: other.state == "ACTIVE")
    assert (other.control.version, made.version) == (3, 3), "it was made once"


async def test_a_step_that_needs_all_and_gets_no_answer_is_in_doubt_and_recorded_when_it_is_known(
    start: Start, network: TcpProxy, by_proxy: str, journal: Journal
) -> None:
    cut_off, other = await start("a", by_proxy), await start("b")
    await settled(cut_off, other)
    cut_off.before_script = partial(network.apply, Fault(hold_replies=True))
    wanted = Wanted("breaker/primary", "forced_open", "server", "a step", expected_version=1, needs_all=True)
    with pytest.raises(ChangeInDoubtError):
        await cut_off.control.change(wanted)
    await until(lambda: other.breaker.mode is Mode.FORCED_OPEN)
    network.heal()
    await until(lambda: cut_off.breaker.mode is Mode.FORCED_OPEN)
    await until(lambda: [change.value for change in changes_in(journal)] == ["forced_open"])


async def test_a_change_that_others_overtook_while_nobody_knew_of_it_is_not_called_refused(
    start: Start, network: TcpProxy, by_proxy: str
) -> None:
    cut_off, other = await start("a", by_proxy), await start("b")
    await settled(cut_off, other)
    cut_off.before_script = partial(network.apply, Fault(hold_requests=True, hold_replies=True))
    wanted = Wanted("breaker/primary", "forced_open", "server", "a step", expected_version=1, needs_all=True)
    change = asyncio.ensure_future(cut_off.control.change(wanted))
    await until(lambda: bool(cut_off.control.problem))
    await other.set("flag/shadow", "off")
    cut_off.before_script = lambda: None
    network.reset_all()
    network.heal()
    with pytest.raises(ChangeInDoubtError, match="version is 2"):
        await change


async def test_a_change_whose_process_died_with_the_answer_is_recorded_by_another_server(
    start: Start, redis_url: str, tmp_path: Path, journal: Journal
) -> None:
    other = await start("b")
    await other.set("trading_state", "HALTED")
    takes_nothing = Journal(JournalSettings(path=tmp_path / "closed.db"))
    dying = Process(tmp_path / "a", redis_url, takes_nothing)
    await dying.control.synchronise()
    await dying.set("trading_state", "ACTIVE")
    await dying.shared.aclose()
    await until(lambda: other.state == "ACTIVE")
    assert [change.value for change in changes_in(journal)] == ["HALTED"]
    other.ahead += 5.1
    await until(lambda: [change.value for change in changes_in(journal)] == ["HALTED", "ACTIVE"])
    assert changes_in(journal)[-1].instance_id == dying.control._instance_id
    third = await start("c")
    third.ahead += 5.1
    await asyncio.sleep(0.5)
    assert len(changes_in(journal)) == 2, "it is known to be recorded"


@pytest.mark.fault(
    "B3",
    "Redis fails over and loses a halt that it had acknowledged",
    "Every server that knew the halt stays HALTED, and one of them writes it to Redis again.",
)
async def test_a_halt_that_a_failover_lost_comes_back_from_whoever_knew_it(
    start: Start, tmp_path: Path, journal: Journal
) -> None:
    with ValkeyPair(tmp_path) as pair:
        first, second = await start("a", pair.url), await start("b", pair.url)
        await until(lambda: first.state == second.state == "ACTIVE")
        pair.wait_until_replicated(KEY)
        pair.hold_replication()
        halted = await first.set("trading_state", "HALTED")
        assert not halted.local, "it was told that all servers have it"
        await until(lambda: second.state == "HALTED")
        lost = await second.set("flag/shadow", "off")
        pair.fail_over()
        fresh = await start("c", pair.url)
        # Somebody changes something else on a server that never heard of the halt, before anybody else is back.
        changed = await fresh.set("flag/cached_score", "off")
        assert changed.version <= lost.version, "by their versions the states cannot be told apart"
        await until(lambda: first.state == second.state == fresh.state == "HALTED")
        await until(
            lambda: all(one.control.flags_on == ("embedded", "out_of_domain") for one in (first, second, fresh))
        )
        await until(lambda: len({one.control.version for one in (first, second, fresh)}) == 1)
        made = await fresh.set("trading_state", "ACTIVE")
        assert list(made.lifts) == [halted.change_id]
        await until(lambda: first.state == second.state == "ACTIVE")


async def test_a_halt_that_a_failover_lost_comes_back_from_the_disk_of_a_server_that_was_stopped(
    start: Start, tmp_path: Path, journal: Journal
) -> None:
    with ValkeyPair(tmp_path) as pair:
        stopped = Process(tmp_path / "a", pair.url, journal)
        await stopped.control.synchronise()
        assert stopped.state == "ACTIVE"
        pair.wait_until_replicated(KEY)
        pair.hold_replication()
        assert not (await stopped.set("trading_state", "HALTED")).local
        await stopped.shared.aclose()
        pair.fail_over()
        other = await start("b", pair.url)
        assert other.state == "ACTIVE", "nobody that it can hear knows of the halt"
        assert (await start("a", pair.url)).state == "HALTED"
        await until(lambda: other.state == "HALTED")
