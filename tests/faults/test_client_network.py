"""A network that loses what callers and servers say to each other: the client library connects anew. Both are real."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

import pytest
from support.askers import CALLS, ORDER, SHARED, STREAM, asking
from support.figures import Figure
from support.server_group import Group, server_group
from support.tcp_proxy import Fault, TcpProxy

from local.stack.ports import free_ports
from pretrade.client import DeadlineError

pytestmark = pytest.mark.stack
Seen = Callable[[str], None]
ATTEMPTS_A_SECOND: Final = 3
"""To connect, on a machine that has other work; without it they are 9 or 10."""
FOUND_SECONDS: Final = 0.15
FAR_SECONDS: Final = 0.3
LOST_FOR_SECONDS: Final = 60.0
"""Far longer than a connection that swallows everything may stay."""


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with server_group(tmp_path_factory.mktemp("group"), 1) as group:
        yield group


@pytest.fixture
def proxy(group: Group) -> Iterator[TcpProxy]:
    with TcpProxy(group.decision) as proxy:
        yield proxy


@pytest.mark.fault(
    "F3",
    "A server is gone for 1, 3 and 6 seconds, and listens again",
    "The client library looks for it ten times a second, and the call that waits is answered.",
)
@pytest.mark.parametrize(
    ("way", "seconds"),
    [
        (CALLS[0], 1.0),
        *(pytest.param(*one, marks=pytest.mark.long) for one in ((CALLS[0], 3.0), (CALLS[0], 6.0))),
        (CALLS[1], 3.0),
    ],
)
def test_a_server_that_is_back_is_found_at_once(
    group: Group, proxy: TcpProxy, way: str, seconds: float, seen: Seen, figure: Figure
) -> None:
    attempts, back_at = 0, 0.0

    def come_back() -> None:
        nonlocal attempts, back_at
        attempts = proxy.accepted - before
        proxy.point_to(group.decision)
        back_at = time.monotonic()

    with asking(way, proxy.address) as ask:
        ask(ORDER)
        before = proxy.accepted
        proxy.point_to(f"127.0.0.1:{free_ports(1)[0]}")
        back = threading.Timer(seconds, come_back)
        back.start()
        ask(ORDER)
        found_seconds = time.monotonic() - back_at
        back.join()
    seen(f"{seconds:g} s: {attempts} attempts; answered {found_seconds:.2f} s after the server was back")
    assert attempts >= ATTEMPTS_A_SECOND * seconds
    figure(found_seconds <= FOUND_SECONDS, "a server that listens again is found within 0.15 s")


@pytest.mark.parametrize("way", CALLS)
def test_a_server_that_is_far_away_has_the_time_to_connect(proxy: TcpProxy, way: str) -> None:
    proxy.apply(Fault(latency_seconds=FAR_SECONDS))
    with asking(way, proxy.address) as ask:
        ask(ORDER)
    assert proxy.accepted == 1


@pytest.mark.fault(
    "F3",
    "A router forgets the callers' open connections, without a word to either side",
    "Within seconds the client library connects anew. What is asked until then ends at its deadline.",
)
@pytest.mark.parametrize(
    "way", [CALLS[0], *(pytest.param(one, marks=pytest.mark.long) for one in (CALLS[1], *SHARED, STREAM))]
)
def test_a_connection_that_swallows_everything_is_replaced(proxy: TcpProxy, way: str, seen: Seen) -> None:
    with asking(way, proxy.address) as ask:
        for _ in range(100):
            ask(ORDER)
        proxy.strand()
        began = time.monotonic()
        ask(ORDER, deadline_seconds=LOST_FOR_SECONDS)
        seen(f"{way}: answered after {time.monotonic() - began:.1f} s")
    assert proxy.accepted == 2


@pytest.mark.long
@pytest.mark.parametrize("way", CALLS)
def test_a_connection_that_was_idle_for_long_is_replaced_as_well(proxy: TcpProxy, way: str) -> None:
    """No ping is under way then that would find it."""
    with asking(way, proxy.address) as ask:
        for _ in range(100):
            ask(ORDER)
        time.sleep(10.0)
        proxy.strand()
        end = time.monotonic() + LOST_FOR_SECONDS
        while time.monotonic() < end:
            try:
                ask(ORDER, deadline_seconds=1.0)
            except DeadlineError:
                continue
            return
    pytest.fail(f"not within {LOST_FOR_SECONDS} s")
