"""Runs one seed: boots the servers, has the plan happen, heals everything, lets it drain, and checks the history."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import grpc

from feature_cache.features import MF1
from pretrade.decision.v1 import decision_pb2 as pb
from server.errors import AuditError
from server.journal.journal_file import JournalReader
from simulation import checks, register
from simulation.audit import read_audit
from simulation.desk import caller_row
from simulation.disk import Weather
from simulation.history import Spell
from simulation.plan import CALLERS, POOL, Plan, Step, plan
from simulation.replica import Health
from simulation.scene import PRIMARY, SECONDARY, Scene, scene
from simulation.server import Server

_BOOT_SECONDS: Final = 30.0
_SETTLE_SECONDS: Final = 25.0
_RECORDED_WITHIN_SECONDS: Final = 10.0
"""After this somebody has recorded the change of a process that died."""
_WELL_SECONDS: Final = 5.0
"""After this a model answers again."""
_UNCERTAIN_SECONDS: Final = 1.0
"""How long after a fault of Redis a server may not have heard of everything."""


@dataclass(slots=True)
class Outcome:
    """What became of a seed."""

    seed: int
    profile: str
    violations: list[str]
    trace_hash: str
    faults: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    decisions: int = 0
    rows: int = 0
    operations: int = 0
    virtual_seconds: float = 0.0
    cpu_seconds: float = 0.0
    lines: list[str] | None = None

    @property
    def kinds(self) -> set[str]:
        """Which checks found something."""
        return {violation.partition(":")[0] for violation in self.violations}


def run(seed: int, chosen: Plan | None = None, *, keep_trace: bool = False) -> Outcome:
    """Runs a seed, or another plan with the seed's chances."""
    began = time.process_time()
    chosen = chosen or plan(seed)
    with scene(seed, keep_trace=keep_trace) as made:
        runner = _Runner(made, chosen)
        violations = runner.run()
        outcome = Outcome(
            seed=seed,
            profile=chosen.profile,
            violations=violations,
            trace_hash=made.world.trace_hash,
            faults=runner.faults,
            calls=len(made.history.asked),
            decisions=sum(asked.decision is not None for asked in made.history.asked),
            rows=runner.rows,
            operations=len(made.history.operations),
            virtual_seconds=made.world.now - 1_000.0,
            lines=made.world.lines,
        )
    outcome.cpu_seconds = time.process_time() - began
    return outcome


class _Runner:
    def __init__(self, made: Scene, chosen: Plan) -> None:
        self.scene = made
        self.plan = chosen
        self.world = made.world
        self.faults: Counter[str] = Counter()
        self.rows = 0
        self._began = 0.0
        self._cuts: dict[str, list[int]] = {}
        """Lost requests and lost replies that are still to be, by host."""
        for name, edge in chosen.servers:
            made.add_server(name, edge, {section: dict(values) for section, values in chosen.settings.items()})  # type: ignore[arg-type]
        made.redis.cut_before = lambda _command: False
        made.redis.cut_after = lambda _command: False

    def run(self) -> list[str]:
        """Everything, to the checks."""
        world, servers = self.world, self.scene.servers
        for server in servers.values():
            server.boot()
        if not world.run(lambda: all(server.serves for server in servers.values()), world.now + _BOOT_SECONDS):
            return [
                f"start: {name} does not serve: {server.failures}"
                for name, server in servers.items()
                if not server.serves
            ]
        world.run(lambda: False, world.now + 0.3)  # until the market is known
        for name in servers:
            self.scene.desk.watch_health(name, "")
        self._began = world.now
        self._step(next(iter(self.plan.steps), None)) if self.plan.profile != "fresh" else None
        world.run(lambda: not self.scene.desk.under_way, world.now + 5.0)
        self._began = world.now
        for place, step in enumerate(self.plan.steps):
            if place or self.plan.profile == "fresh":
                world.at(self._began + step.at, self._step, step)
        world.run(lambda: False, self._began + self.plan.seconds)
        self._heal()
        violations = self._settle()
        self._spread()
        final = self._final()
        violations += self._last_calls()
        audit = read_audit(self.scene)
        self.rows = audit.rows
        violations += checks.check_decisions(self.scene, audit)
        violations += checks.check_freshness(self.scene)
        violations += checks.check_keys(self.scene)
        violations += checks.check_killed_keys(self.scene, audit)
        violations += checks.check_breakers(self.scene)
        violations += checks.check_pool(self.scene, audit)
        violations += checks.check_models(audit)
        violations += checks.check_health(self.scene)
        violations += checks.check_tasks(self.scene)
        violations += checks.check_bugs(self.scene)
        violations += register.check_register(self.scene, audit, final)
        if self.plan.profile == "fresh":
            violations += [
                f"fresh: {asked.ref} trades where nobody ever set the trading state"
                for asked in self.scene.history.asked
                if asked.decision is not None and asked.decision.action == pb.ACTION_TRADE
            ]
        return violations

    # In the end.

    def _heal(self) -> None:
        """Undoes every fault that lasts."""
        scene = self.scene
        self.world.note("heals")
        scene.desk.stop_watching()
        scene.redis.stalled_until = 0.0
        scene.redis.cut_before = scene.redis.cut_after = lambda _command: False
        self._cuts.clear()
        if not scene.redis.up:
            scene.redis._come_up()
        scene.database.weather.down = False
        scene.database.weather.lost_commits = 0
        for model in scene.models.values():
            model.health = Health()
        scene.market.heal()
        for server in scene.servers.values():
            self._heal_disk(server)
            server.host.wall_offset_ns = 0
            link = scene.network.link(server.name, "redis:6379")
            link.refusing, link.stuck_there_until, link.stuck_back_until = False, 0.0, 0.0
            if server.process is not None:
                server.process.go_on()

    @staticmethod
    def _heal_disk(server: Server) -> None:
        disk = server.host.disk
        disk.weather.sync_seconds = (2e-4, 1e-3)
        disk.weather.sync_failures = 0.0
        disk.weather.fails_write = False
        disk.weather.stuck_until = 0.0
        disk.capacity = disk.size

    def _settle(self) -> list[str]:
        """Waits until everything has come to rest."""
        world, scene = self.world, self.scene
        pause, until = 0.25, world.now + _SETTLE_SECONDS
        while True:
            for server in scene.servers.values():
                if not server.runs:
                    server.boot()
            world.run(lambda: False, world.now + pause)
            unrest = self._unrest()
            if not unrest:
                return []
            if world.now >= until:
                return [f"drain: after {_SETTLE_SECONDS:g} s {why}" for why in unrest]

    def _spread(self) -> None:
        """Waits until every server can have heard of every change, and somebody can have recorded it."""
        world, until = self.world, self.world.now + _RECORDED_WITHIN_SECONDS
        world.run(lambda: False, world.now + register.HEARD_WITHIN_SECONDS)
        while world.now < until and register.without_row(self.scene, read_audit(self.scene)):
            world.run(lambda: False, world.now + 1.0)

    def _unrest(self) -> list[str]:
        scene = self.scene
        found = [f"{name} does not serve" for name, server in scene.servers.items() if not server.serves]
        if scene.desk.under_way:
            found.append(f"{scene.desk.under_way} calls are under way")
        store = scene.database.open()
        heads = store.journals()
        store.close()
        for name, server in scene.servers.items():
            content = self._journal_head(server)
            if content is None:
                continue
            journal_id, position = content
            if journal_id not in heads or heads[journal_id].position < position:
                found.append(f"{name}'s rows are not shipped")
        return found

    def _journal_head(self, server: Server) -> tuple[str, int] | None:
        try:
            with closing(JournalReader(server.settings.journal.path)) as journal:
                return journal.journal_id, journal.last_position()
        except AuditError:
            return None

    def _final(self) -> dict[str, str]:
        """The trading state of every server in the end."""
        found: dict[str, str] = {}
        for name in self.scene.servers:
            self.scene.desk.status(
                name,
                lambda status, name=name: found.__setitem__(  # type: ignore[misc]
                    name, "?" if status is None else register.state_name(status.trading_state)
                ),
            )
        self.world.run(lambda: len(found) == len(self.scene.servers), self.world.now + 5.0)
        return {name: state for name, state in found.items() if state != "?"}

    def _last_calls(self) -> list[str]:
        """Every server decides again, with a model's score."""
        chance = self.world.random("last")
        violations = []
        for name in self.scene.servers:
            until = self.world.now + _WELL_SECONDS
            while True:
                asked = self.scene.desk.decide(name, "desk-last", self.scene.desk.new_order(chance, "desk-last"), 1.0)
                self.world.run(lambda: not self.scene.desk.under_way, self.world.now + 3.0)
                decision = asked.decision
                if decision is not None and decision.source == pb.SOURCE_PRIMARY:
                    break
                if self.world.now >= until:
                    what = asked.error or (decision and pb.Source.Name(decision.source))
                    violations.append(f"heal: {name} answers {what} {_WELL_SECONDS:g} s after everything was healed")
                    break
                self.world.run(lambda: False, self.world.now + 0.25)
        return violations + self._settle()

    # Steps.

    def _step(self, step: Step | None) -> None:
        assert step is not None
        what = dict(step.what)
        self.world.note("step", step)
        chance = Random(f"{self.world.seed}/{step.at}/{step.kind}")
        handler = getattr(self, f"_do_{step.kind}", None)
        if handler is not None:
            self.faults[step.kind] += 1
            self.scene.history.faults.append((self.world.now, str(step)))
            handler(**what)
            return
        getattr(self, f"_ask_{step.kind}")(chance, **what)

    def _ask_unary(
        self, chance: Random, server: str, caller: str, timeout: float | None, leaves: float | None, reduce_only: bool
    ) -> None:
        order = self.scene.desk.new_order(chance, caller, reduce_only=reduce_only)
        self.scene.desk.decide(server, caller, order, timeout, leaves)

    def _ask_own(
        self,
        chance: Random,
        server: str,
        caller: str,
        timeout: float | None,
        book_age_ms: float,
    ) -> None:
        row = pb.FeatureVector(feature_set_id=MF1.id, values=caller_row(chance, book_age_ms))
        order = self.scene.desk.new_order(chance, caller, features=row)
        self.scene.desk.decide(server, caller, order, timeout)

    def _ask_key(
        self,
        chance: Random,
        server: str,
        caller: str,
        timeout: float | None,
        leaves: float | None,
        key: str,
        again_after: list[float],
    ) -> None:
        order = self._keyed(chance, caller, key)
        self.scene.desk.decide(server, caller, order, timeout, leaves)
        for seconds in again_after:
            self.world.after(seconds, self.scene.desk.decide, server, caller, order, timeout)

    def _keyed(self, chance: Random, caller: str, key: str) -> pb.Order:
        """The same order for the same key of a caller."""
        return self.scene.desk.new_order(
            Random(key), caller, idempotency_key=key, order_ref=f"{caller}/key-{key}", side=pb.SIDE_BUY
        )

    def _ask_small_batch(
        self, chance: Random, server: str, caller: str, timeout: float | None, leaves: float | None, orders: int
    ) -> None:
        many = [self._of_any(chance, caller) for _ in range(orders)]
        self.scene.desk.decide_batch(server, caller, many, timeout, leaves)

    _ask_batch = _ask_small_batch

    def _of_any(self, chance: Random, caller: str) -> pb.Order:
        """An order of a caller; where there are several models, of any strategy, so that a call has orders of each."""
        order = self.scene.desk.new_order(chance, caller)
        if "models" in self.plan.settings:
            order.strategy = chance.choice(CALLERS)
        return order

    def _ask_stream(
        self,
        chance: Random,
        server: str,
        caller: str,
        orders: int,
        gap: float,
        window: float,
        closes: float | None,
        reads: float | None,
        key: str | None,
    ) -> None:
        many = [self._of_any(chance, caller) for _ in range(orders)]
        if key is not None:
            many[0] = self._keyed(chance, caller, key)
        if window != float("inf") and reads is None and closes is None:
            closes = 1.0
        self.scene.desk.decide_stream(server, caller, many, lambda: gap, window, closes, reads)

    _ask_key_stream = _ask_stream

    def _ask_deaf_watcher(self, chance: Random, server: str, service: str) -> None:
        self.scene.desk.watch_health(server, service, 0)

    def _ask_state(self, chance: Random, server: str, value: str, expires: float | None = None) -> None:
        self.scene.desk.set_trading_state(server, value, expires_in=expires)

    def _ask_flag(self, chance: Random, server: str, name: str, on: bool) -> None:
        self.scene.desk.set_flag(server, name, on)

    def _ask_map(self, chance: Random, server: str, strategies: list[str]) -> None:
        self.scene.desk.set_model_map(server, strategies)

    # Faults of Redis.

    def _apart(self, seconds: float, *servers: str) -> None:
        for server in servers or self.scene.servers:
            spell = Spell("apart", self.world.now - 1e-9, self.world.now + seconds + _UNCERTAIN_SECONDS)
            self.scene.history.apart.setdefault(server, []).append(spell)

    def _do_fail_over(self, lag: float, down: float) -> None:
        """The replica falls behind for so long, and then the master dies."""
        redis = self.scene.redis
        redis.replication_seconds = (lag, lag)
        self._apart(lag + down)

        def die() -> None:
            if redis.up:
                redis.fail_over(down)
            redis.replication_seconds = (1e-4, 5e-3)

        self.world.after(lag, die)

    def _do_lonely_halt(self, server: str, lag: float, down: float, behind: float) -> None:
        """A halt that is acknowledged, and that only one server and a master know of, which then dies.

        The other servers reach the new master before that one, and make changes there.
        """
        others = [name for name in self.scene.servers if name != server]
        for other in others:
            self._do_link_down(other, lag)
        self._do_fail_over(lag, down)
        self.world.after(lag / 2, self.scene.desk.set_trading_state, server, "HALTED")
        self.world.after(lag, self._do_link_down, server, down + behind)
        for other in others:
            self.world.after(lag + down + behind / 2, self.scene.desk.set_flag, other, "shadow", False)

    def _do_redis_restart(self, down: float) -> None:
        self._apart(down)
        if self.scene.redis.up:
            self.scene.redis.restart(down, wipe=False)

    def _do_redis_wipe(self, down: float) -> None:
        self._apart(down)
        if self.scene.redis.up:
            self.scene.redis.restart(down, wipe=True)

    def _do_redis_stall(self, lasts: float) -> None:
        self._apart(lasts)
        self.scene.redis.stalled_until = self.world.now + lasts

    def _do_lost_reply(self, server: str, times: int) -> None:
        self._cut("cut_after", server, times)

    def _do_lost_request(self, server: str, times: int) -> None:
        self._cut("cut_before", server, times)

    def _cut(self, which: str, server: str, times: int) -> None:
        """Loses the next scripts of a server, and its connection with each."""
        left = [times]
        before: Callable[..., bool] = getattr(self.scene.redis, which)
        self._apart(2.0, server)

        def cut(command: Any) -> bool:
            if left[0] and self.scene.redis.asking == server:
                left[0] -= 1
                self._apart(0.5, server)
                return True
            return before(command)

        setattr(self.scene.redis, which, cut)

    def _do_link_down(self, server: str, lasts: float) -> None:
        self._apart(lasts, server)
        link = self.scene.network.link(server, "redis:6379")
        link.refusing = True
        self.scene.network.cut("redis:6379", server)
        self.world.after(lasts, setattr, link, "refusing", False)

    def _do_replies_stuck(self, server: str, lasts: float) -> None:
        self._apart(lasts, server)
        link = self.scene.network.link(server, "redis:6379")
        link.stuck_back_until = max(link.stuck_back_until, self.world.now + lasts)

    # Of a host.

    def _do_clock_steps(self, server: str, seconds: float) -> None:
        self.scene.servers[server].host.wall_offset_ns += int(seconds * 1e9)
        self.scene.history.clock_wrong_since.setdefault(server, self.world.now)

    def _do_disk_slow(self, server: str, lasts: float, slowest: float) -> None:
        self._for_a_while(self.scene.servers[server], lasts, sync_seconds=(1e-3, slowest))

    def _do_disk_stuck(self, server: str, lasts: float) -> None:
        weather = self.scene.servers[server].host.disk.weather
        weather.stuck_until = max(weather.stuck_until, self.world.now + lasts)

    def _do_sync_fails(self, server: str, lasts: float, share: float = 1.0) -> None:
        self._for_a_while(self.scene.servers[server], lasts, sync_failures=share)

    _do_journal_away = _do_sync_fails

    def _do_write_fails(self, server: str, lasts: float) -> None:
        self._for_a_while(self.scene.servers[server], lasts, fails_write=True)

    def _do_disk_full(self, server: str, lasts: float) -> None:
        disk = self.scene.servers[server].host.disk
        disk.capacity = disk.used_bytes
        self.world.after(lasts, setattr, disk, "capacity", disk.size)

    def _for_a_while(self, server: Server, seconds: float, **changes: Any) -> None:
        weather, well = server.host.disk.weather, Weather()
        for name, value in changes.items():
            setattr(weather, name, value)

        def undo() -> None:
            for name in changes:  # not what it was before: that may have been a fault, too
                setattr(weather, name, getattr(well, name))

        self.world.after(seconds, undo)

    # Of a process.

    def _do_kill(self, server: str, down: float) -> None:
        self._die(server, self.scene.servers[server].kill, down)

    def _do_power(self, server: str, down: float) -> None:
        self._die(server, self.scene.servers[server].lose_power, down)

    def _die(self, server: str, how: Callable[[], None], down: float) -> None:
        self._apart(down, server)
        how()
        self.world.after(down, self.scene.servers[server].boot)

    def _do_term(self, server: str, down: float) -> None:
        one = self.scene.servers[server]
        self._apart(down + 2.0, server)
        one.terminate()
        one.when_ended(lambda: self.world.after(down, one.boot))

    def _do_stop(self, server: str, lasts: float) -> None:
        process = self.scene.servers[server].process
        self._apart(lasts, server)
        if process is not None and not process.dead:
            process.stop()
            self.world.after(lasts, process.go_on)

    def _do_stall(self, server: str, lasts: float) -> None:
        process = self.scene.servers[server].process
        self._apart(lasts, server)
        if process is not None:
            process.loop.stand_still(lasts / 4)
        self.scene.history.stalled.append(Spell(server, self.world.now, self.world.now + lasts))

    # Of the others.

    def _do_database_down(self, lasts: float) -> None:
        self.scene.database.weather.down = True
        self.world.after(lasts, setattr, self.scene.database.weather, "down", False)

    def _do_commit_lost(self, times: int) -> None:
        self.scene.database.weather.lost_commits += times

    def _do_market_stops(self, lasts: float) -> None:
        self.scene.market.stop()

    def _do_guest_stops(self) -> None:
        self.scene.market.guest_stops()

    def _do_book_dies(self) -> None:
        self.scene.market.book_dies()

    def _do_book_age_nan(self) -> None:
        self.scene.market.forgets_age()

    def _models(self, which: str, lasts: float, health: Health) -> None:
        places = {"primary": (PRIMARY,), "secondary": (SECONDARY,), "both": (PRIMARY, SECONDARY)}[which]
        for place in places:
            model = self.scene.models[place]
            model.health = health
            self.world.after(lasts, setattr, model, "health", Health())

    def _endpoint(self, which: int, lasts: float, health: Health) -> Spell:
        """Has an endpoint of the primary's pool be unwell; of two faults of one endpoint the first is the only one."""
        model = self.scene.models[POOL[which]]
        if model.health == Health():
            model.health = health
            self.world.after(lasts, setattr, model, "health", Health())
        return Spell(f"primary-{which + 1}", self.world.now, self.world.now + lasts)

    def _do_endpoints_down(self, which: list[int], lasts: float) -> None:
        self.scene.history.down += [(one, self._endpoint(one, lasts, Health(down=True))) for one in which]

    def _do_endpoints_hang(self, which: list[int], lasts: float) -> None:
        self.scene.history.down += [(one, self._endpoint(one, lasts, Health(hangs=True))) for one in which]

    def _do_endpoint_slow(self, which: int, slow: int, lasts: float) -> None:
        usual = Health().latency
        health = Health(latency=(slow * usual[0], slow * usual[1]))
        self.scene.history.slow.append((which, self._endpoint(which, lasts, health)))

    def _do_model_down(self, which: str, lasts: float, fatal: bool) -> None:
        self._models(which, lasts, Health(down=True))

    def _do_model_hangs(self, which: str, lasts: float, fatal: bool) -> None:
        self._models(which, lasts, Health(hangs=True))

    def _do_model_nan(self, which: str, lasts: float, fatal: bool) -> None:
        scores = (float("nan"),) if fatal else (0.75, float("nan"), 1.5, -0.1, float("inf"))
        self._models(which, lasts, Health(scores=scores))

    def _do_model_fails(self, which: str, lasts: float, fatal: bool) -> None:
        code = grpc.StatusCode.INTERNAL if fatal else grpc.StatusCode.RESOURCE_EXHAUSTED
        self._models(which, lasts, Health(fails=code))

    def _do_model_slow(self, which: str, lasts: float, fatal: bool) -> None:
        self._models(which, lasts, Health(latency=(0.005, 0.2 if fatal else 0.03)))
