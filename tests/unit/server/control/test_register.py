"""The control state of several servers as a register: what its operators were told is what happened, whatever breaks.

In virtual time, on a Redis that loses what its replica lacks, disks that lose power, clocks that step, and a network
that loses requests and answers.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.control_world import MadeUpRedis, Server
from support.virtual_time import VirtualTimeLoop

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from server.errors import ChangeInDoubtError, ChangeRefusedError, ControlChangedError, ControlError

STRICTNESS = ("ACTIVE", "REDUCING", "HALTED")


def in_virtual_time(scenario: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(scenario())  # type: ignore[arg-type]


async def three_servers() -> tuple[MadeUpRedis, Server, Server, Server]:
    redis = MadeUpRedis()
    servers = [Server(name, redis) for name in "abc"]
    for server in servers:
        await server.start()
    await asyncio.sleep(1.0)
    redis.replicate()
    return redis, *servers  # type: ignore[return-value]


async def end(*servers: Server) -> None:
    for server in servers:
        await server.kill()


def rows(*servers: Server) -> dict[str, list[packet_pb2.ControlChange]]:
    found = defaultdict(list)
    for server in servers:
        for change in server.journal.changes:
            found[change.change_id].append(change)
    return found


def test_a_halt_that_a_failover_lost_holds_although_others_make_changes_before_its_server_is_back() -> None:
    async def scenario() -> None:
        redis, a, b, c = await three_servers()
        halted = await a.set("trading_state", "HALTED")
        assert not halted.local
        for server in (a, b, c):
            server.process.line.is_cut = True
        redis.fail_over()
        b.process.line.is_cut = False
        for value in ("off", "on", "off"):
            await b.set("flag/shadow", value)
        assert b.process.control.version > halted.version
        a.process.line.is_cut = c.process.line.is_cut = False
        await asyncio.sleep(2.0)
        assert [server.state for server in (a, b, c)] == ["HALTED"] * 3
        assert {server.process.control.version for server in (a, b, c)} == {b.process.control.version}
        assert not a.process.control.shadow
        await end(a, b, c)

    in_virtual_time(scenario)


def test_a_wall_clock_that_goes_back_between_two_changes_turns_neither_round() -> None:
    async def scenario() -> None:
        _, a, b, c = await three_servers()
        a.process.line.is_cut = True
        await asyncio.sleep(1.0)
        await a.set("trading_state", "REDUCING")
        await a.set("flag/shadow", "off")
        a.wall_ahead -= 3_600
        await a.set("trading_state", "HALTED")
        await a.set("flag/shadow", "on")
        assert (a.state, a.process.control.shadow) == ("HALTED", True)
        await a.kill()
        await a.start()
        assert (a.state, a.process.control.shadow) == ("HALTED", True), "nor does a restart"
        await asyncio.sleep(2.0)
        assert [server.state for server in (a, b, c)] == ["HALTED"] * 3
        assert [server.process.control.shadow for server in (a, b, c)] == [True] * 3
        await end(a, b, c)

    in_virtual_time(scenario)


def test_a_wall_clock_that_is_ahead_ends_no_halt_that_was_set_for_a_time() -> None:
    async def scenario() -> None:
        _, a, b, c = await three_servers()
        b.wall_ahead = 3_600.0
        await a.set("trading_state", "HALTED", seconds=600.0)
        for seconds in (0.5, 99.0, 500.0):
            await asyncio.sleep(seconds)
            assert [server.state for server in (a, b, c)] == ["HALTED"] * 3
        await asyncio.sleep(1.5)
        assert [server.state for server in (a, b, c)] == ["ACTIVE"] * 3
        await end(a, b, c)

    in_virtual_time(scenario)


def test_a_server_that_starts_with_a_wall_clock_that_is_ahead_ends_nobody_elses_halt() -> None:
    async def scenario() -> None:
        _, a, b, c = await three_servers()
        await b.kill()
        b.wall_ahead = 3_600.0
        await a.set("trading_state", "HALTED", seconds=600.0)
        await b.start()
        await asyncio.sleep(599.0)
        assert (a.state, c.state) == ("HALTED", "HALTED")
        await asyncio.sleep(2.0)
        assert [server.state for server in (a, b, c)] == ["ACTIVE"] * 3
        await end(a, b, c)

    in_virtual_time(scenario)


def test_a_relaxation_whose_answer_is_lost_is_in_doubt_in_force_and_recorded() -> None:
    async def scenario() -> None:
        _, a, b, c = await three_servers()
        halted = await b.set("trading_state", "HALTED")
        await asyncio.sleep(0.5)
        a.process.line.loses_answers_to_writes = True
        with pytest.raises(ChangeInDoubtError) as doubt:
            await a.set("trading_state", "ACTIVE")
        assert (a.state, b.state, c.state) == ("HALTED", "ACTIVE", "ACTIVE")
        a.process.line.loses_answers = a.process.line.loses_answers_to_writes = False
        await asyncio.sleep(1.0)
        assert a.state == "ACTIVE"
        (row,) = rows(a, b, c)[doubt.value.change_id]
        assert (row.value, list(row.lifts)) == ("ACTIVE", [halted.change_id])
        await end(a, b, c)

    in_virtual_time(scenario)


def test_a_relaxation_that_is_known_not_to_have_been_sent_is_refused_and_not_made_later() -> None:
    async def scenario() -> None:
        _, a, b, c = await three_servers()
        await b.set("trading_state", "HALTED")
        await asyncio.sleep(0.5)
        a.process.line.is_cut = True
        await asyncio.sleep(1.0)
        with pytest.raises(ChangeRefusedError):
            await a.set("trading_state", "ACTIVE")
        a.process.line.is_cut = False
        await asyncio.sleep(10.0)
        assert [server.state for server in (a, b, c)] == ["HALTED"] * 3
        await end(a, b, c)

    in_virtual_time(scenario)


@pytest.mark.parametrize("heals", [False, True])
def test_a_relaxation_whose_answer_is_lost_is_not_refused_because_the_disk_is_full_too(heals: bool) -> None:
    async def scenario() -> None:
        _, a, b, c = await three_servers()
        line, loop = a.process.line, asyncio.get_running_loop()
        line.is_cut = True
        await asyncio.sleep(1.0)
        assert (await a.set("trading_state", "HALTED")).local
        a.files.is_full = line.loses_answers_to_writes = True

        def heal() -> None:
            line.loses_answers = line.loses_answers_to_writes = False

        loop.call_later(0.0015, setattr, line, "is_cut", False)  # once the look at Redis has failed
        if heals:
            loop.call_later(1.0, heal)
            assert not (await a.set("trading_state", "ACTIVE")).local
        else:
            with pytest.raises(ChangeInDoubtError):
                await a.set("trading_state", "ACTIVE")
            heal()
        await asyncio.sleep(2.0)
        assert [server.state for server in (a, b, c)] == ["ACTIVE"] * 3
        assert [found[0].value for found in rows(a, b, c).values()] == ["ACTIVE", "HALTED", "ACTIVE"]
        await end(a, b, c)

    in_virtual_time(scenario)


def test_a_relaxation_that_may_be_on_the_disk_is_not_refused_because_that_is_not_synced() -> None:
    async def scenario() -> None:
        _, a, b, c = await three_servers()
        a.process.line.is_cut = True
        await asyncio.sleep(1.0)
        assert (await a.set("trading_state", "HALTED")).local
        a.files.is_unsynced = True
        with pytest.raises(ChangeInDoubtError):
            await a.set("trading_state", "ACTIVE")
        a.files.is_unsynced = False
        await asyncio.sleep(2.0)
        assert a.state == "ACTIVE"
        await end(a, b, c)

    in_virtual_time(scenario)


def test_an_expected_version_is_asked_for_also_where_redis_was_never_reached() -> None:
    async def scenario() -> None:
        redis, a, b, c = await three_servers()
        await a.kill()
        redis.is_up = False
        await a.start()
        version = a.process.control.version
        with pytest.raises(ControlChangedError):
            await a.set("flag/shadow", "off", expected=version + 1)
        assert (await a.set("flag/shadow", "off", expected=version)).local
        await end(a, b, c)

    in_virtual_time(scenario)


def test_what_was_set_without_redis_is_everywhere_as_soon_as_redis_is_back() -> None:
    async def scenario() -> None:
        _, a, b, c = await three_servers()
        a.process.line.is_cut = True
        await asyncio.sleep(1.0)
        assert (await a.set("trading_state", "HALTED")).local
        a.process.line.is_cut = False
        await asyncio.sleep(0.3)  # of which 0.2 until it is tried to connect again
        assert [server.state for server in (a, b, c)] == ["HALTED"] * 3
        await end(a, b, c)

    in_virtual_time(scenario)


def test_that_a_change_was_recorded_is_no_other_change_to_the_servers_that_hear_of_it() -> None:
    async def scenario() -> None:
        _, a, b, c = await three_servers()
        before = b.process.control.store.reloads
        await a.set("flag/shadow", "off")
        await asyncio.sleep(2.0)
        assert b.process.control.store.unrecorded() == {}
        assert b.process.control.store.reloads == before + 1
        await end(a, b, c)

    in_virtual_time(scenario)


def test_a_server_whose_disk_and_redis_were_wiped_is_halted_unless_it_may_begin_by_itself() -> None:
    async def scenario() -> None:
        redis, a, b, c = await three_servers()
        await end(a, b, c)
        redis.state = redis.replica = b""
        wiped = Server("d", redis, settings=type(a.settings)())
        await wiped.start()
        await asyncio.sleep(5.0)
        assert wiped.state == "HALTED"
        await end(wiped)

    in_virtual_time(scenario)


def test_after_a_loss_of_power_no_server_trades_that_was_told_to_halt() -> None:
    async def scenario() -> None:
        redis, a, b, c = await three_servers()
        await a.set("trading_state", "HALTED")
        for server in (a, b, c):
            await server.kill()
            server.files.lose_power()
        redis.fail_over()  # its disk is a second behind, too
        redis.is_up = False
        await a.start()
        assert a.state == "HALTED"
        redis.is_up = True
        for server in (b, c):
            await server.start()
        await asyncio.sleep(2.0)
        assert [server.state for server in (a, b, c)] == ["HALTED"] * 3
        await end(a, b, c)

    in_virtual_time(scenario)


def told(change: packet_pb2.ControlChange) -> packet_pb2.ControlChange:
    """What a row says of a change itself, and not of the state that it was made of."""
    without = packet_pb2.ControlChange()
    without.CopyFrom(change)
    for name in ("previous", "previous_version", "version", "diff"):
        without.ClearField(name)
    return without


@dataclass
class Operation:
    """Something that an operator asked for."""

    author: str
    value: str
    change: admin_pb2.Change | None = None
    error: ControlError | None = None
    is_on_disk: bool = True
    """Whether its server could write it before it was acknowledged."""


@dataclass
class World:
    """Servers, what is done to them, and what their operators were told."""

    random: random.Random
    redis: MadeUpRedis = field(default_factory=MadeUpRedis)
    operations: list[Operation] = field(default_factory=list)
    asked: list[asyncio.Task[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        def latency() -> float:
            return self.random.choice((0.0005, 0.002, 0.02))

        self.servers = [Server(name, self.redis, latency=latency) for name in "abc"]

    async def step(self) -> None:
        """One thing that happens."""
        server = self.random.choice(self.servers)
        happenings: dict[Callable[[], None], int] = {
            self.redis.fail_over: 1,
            self._stop_or_start_redis: 1,
            self.redis.replicate: 2,
            lambda: self._step_clock(server): 1,
            lambda: self._break_line(server): 2,
            lambda: self._break_disk(server): 1,
            lambda: self._ask(server): 7,
        }
        if not server.is_up:
            await server.start()
        elif self.random.random() < 0.1:
            await server.kill()
            if self.random.random() < 0.5:
                server.files.lose_power()
        else:
            self.random.choices(list(happenings), list(happenings.values()))[0]()
        await asyncio.sleep(self.random.choice((0.0, 0.01, 0.05, 3.0)))

    def _stop_or_start_redis(self) -> None:
        self.redis.is_up = not self.redis.is_up

    def _step_clock(self, server: Server) -> None:
        server.wall_ahead += self.random.choice((-3_600.0, 3_600.0))

    def _break_disk(self, server: Server) -> None:
        server.files.is_full = self.random.random() < 0.5
        server.journal.is_broken = self.random.random() < 0.5

    def _break_line(self, server: Server) -> None:
        """Breaks the network of a server in one way, or mends it."""
        line = server.process.line
        line.is_cut = line.loses_requests = line.loses_answers = line.loses_answers_to_writes = False
        name = self.random.choice(("is_cut", "loses_requests", "loses_answers_to_writes", ""))
        if name:
            setattr(line, name, True)

    def _ask(self, server: Server) -> None:
        subject = self.random.choice(("trading_state", "trading_state", "flag/shadow"))
        value = self.random.choice(STRICTNESS if subject == "trading_state" else ("on", "off"))
        operation = Operation(f"operator-{len(self.operations)}", value)
        self.operations.append(operation)
        seconds = self.random.choice((None, None, None, 2.0))

        async def ask() -> None:
            try:
                operation.change = await server.set(subject, value, operation.author, seconds)
                operation.is_on_disk = not server.files.is_full
            except ControlError as error:
                operation.error = error

        self.asked.append(server.process.spawn(ask()))

    async def heal(self) -> None:
        """Everything works again for long enough."""
        self.redis.is_up = True
        for server in self.servers:
            server.files.is_full = server.journal.is_broken = False
            if server.is_up:
                line = server.process.line
                line.is_cut = line.loses_requests = line.loses_answers = line.loses_answers_to_writes = False
            else:
                await server.start()
        # What seems over to a clock that is wrong is left alone for a minute.
        await asyncio.sleep(75.0 if any(server.wall_ahead for server in self.servers) else 15.0)

    def check(self) -> None:
        states = [server.process.control for server in self.servers]
        assert len({one.trading_state_name for one in states}) == 1, [one.trading_state_name for one in states]
        in_force = [one.store.in_force() for one in states]
        assert in_force[0] == in_force[1] == in_force[2]
        recorded = rows(*self.servers)
        by_author = {change[0].author: change[0] for change in recorded.values()}
        lifted = {one for changes in recorded.values() for one in changes[0].lifts}
        standing = set(in_force[0].trading.restrictions)
        for changes in recorded.values():
            assert all(told(change) == told(changes[0]) for change in changes), "the rows of one change say the same"
        assert not any(one.store.unrecorded() for one in states)
        for operation in self.operations:
            if operation.change is not None and operation.is_on_disk:
                assert operation.author in by_author, f"{operation} was acknowledged, and has no row"
                if operation.value in ("HALTED", "REDUCING") and operation.change.subject == "trading_state":
                    is_known = operation.change.change_id in standing | lifted
                    assert is_known, f"{operation} was acknowledged, and is gone without a change that names it"
            elif operation.error is not None and not isinstance(operation.error, ChangeInDoubtError):
                assert operation.author not in by_author, f"{operation} was refused, and has a row"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_whatever_breaks_what_operators_were_told_is_what_happened(seed: int) -> None:
    async def scenario() -> None:
        world = World(random.Random(seed))
        for server in world.servers:
            await server.start()
        for _ in range(60):
            await world.step()
        await world.heal()
        world.check()
        await end(*world.servers)

    in_virtual_time(scenario)
