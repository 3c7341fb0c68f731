"""The control state of two servers with two processes each, whose Redis dies, comes back empty, and is lost again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
import redis
from support.bare_server import admin_channel
from support.harness import eventually
from support.server_group import Callers, Group, server_group

from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = pytest.mark.stack

_FLIPS = 20


class Server:
    """One of the two servers, with callers."""

    def __init__(self, opened: ExitStack, directory: Path, redis_url: str) -> None:
        directory.mkdir()
        self.group: Group = opened.enter_context(
            server_group(
                directory,
                2,
                PRETRADE_REDIS_URL=redis_url,
                PRETRADE_CONTROL__SHARED__KEY="both",
            )
        )
        self.callers = opened.enter_context(Callers(self.group.decision, count=2))
        channel = opened.enter_context(admin_channel(self.group.env))
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)

    def set_state(self, name: str) -> admin_pb2.SetTradingStateResponse:
        state = admin_pb2.TradingState.Value(f"TRADING_STATE_{name}")
        request = admin_pb2.SetTradingStateRequest(state=state, author="test", reason="test")
        return self.admin.SetTradingState(request, timeout=10.0)

    def set_flag(self, enabled: bool) -> admin_pb2.Change:
        request = admin_pb2.SetFlagRequest(name="shadow", enabled=enabled, author="test", reason="test")
        return self.admin.SetFlag(request, timeout=10.0).change

    def versions(self) -> set[int]:
        processes = self.group.status().processes
        return {one.control_version for one in processes} if len(processes) == 2 else set()

    def last_decisions(self) -> list[pb.Decision]:
        """Some that were asked for from now on."""
        made = len(self.callers.decisions)
        self.callers.wait_for_more(10)
        return self.callers.decisions[made + 2 :]

    def halted(self) -> bool:
        return all(pb.REASON_CODE_TRADING_HALTED in one.reasons for one in self.last_decisions())


@pytest.mark.long
@pytest.mark.fault(
    "B1",
    "Redis is killed, one of two servers is halted, and Redis comes back empty",
    "No call fails. The other server marks its decisions CONTROL_STALE, and all servers are HALTED once Redis is back.",
)
def test_two_servers_of_two_processes_obey_one_control_state_whatever_becomes_of_redis(
    tmp_path: Path, seen: Callable[[str], None]
) -> None:
    with ExitStack() as opened:
        stack = opened.enter_context(Stack(LocalSettings(dir=tmp_path / "stack"), parts={"valkey"}))
        url = str(stack.endpoints.redis_url)
        first, second = (Server(opened, tmp_path / name, url) for name in ("a", "b"))
        took = []
        for number in range(_FLIPS):
            began = time.monotonic()
            change = (first, second)[number % 2].set_flag(bool(number % 2))
            for server in (first, second):
                eventually(server.versions, {change.version}.__eq__)
            took.append(time.monotonic() - began)
        assert not first.group.status().control.stale

        stack["valkey"].kill()
        eventually(lambda: first.group.status().control.stale and second.group.status().control.stale, bool)
        made = first.set_state("HALTED")
        assert made.change.local
        eventually(first.halted, bool)
        assert not second.halted(), "it cannot know"
        assert all(pb.DEGRADATION_CONTROL_STALE in one.degradations for one in second.last_decisions())
        assert second.group.metric("pretrade_control_stale") == 1
        stack["valkey"].start()
        with redis.Redis.from_url(url) as client:
            client.flushall()
        began = time.monotonic()
        eventually(second.halted, bool)
        reached = time.monotonic() - began
        eventually(lambda: first.versions() | second.versions(), lambda found: len(found) == 1)
        with redis.Redis.from_url(url) as client:
            client.flushall()  # and once more, with nothing that waits to be brought
            eventually(lambda: client.exists("both"), bool)
        assert first.halted()
        assert second.halted()

        stack["valkey"].pause()
        eventually(lambda: second.group.status().control.stale, bool)
        with pytest.raises(grpc.RpcError) as refused:
            second.set_state("ACTIVE")
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert second.halted()
        stack["valkey"].resume()
        eventually(lambda: second.group.status().control.stale, lambda stale: not stale)
        second.set_state("ACTIVE")
        eventually(first.halted, lambda halted: not halted)
        for server in (first, second):
            assert server.callers.errors == []
            assert server.group.metric("pretrade_control_outages_total") >= 1
        made_in_all = len(first.callers.decisions) + len(second.callers.decisions)
        seen(f"{_FLIPS} flips in all four processes after {statistics.median(took):.2f} s, at most {max(took):.2f} s")
        seen(f"HALTED everywhere {reached:.2f} s after Redis was back; {made_in_all} decisions, none failed")
