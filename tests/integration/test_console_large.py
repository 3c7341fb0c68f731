"""The console beside a real database of 100,000 decisions: every page is there soon, and none grows with the audit."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from html import unescape
from typing import Final

import pytest
from support.console import RunningConsole, Visitor, clean_environment, running_console
from support.databases import empty_database
from support.figures import Figure
from support.harness import INSTRUMENTS, eventually
from support.secure_server import SecureServer

from local.stack.stack import Stack
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.store.store import Store
from server.decision.ids import Ids
from server.journal.journal_file import GENESIS, Head, Row, link

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(900)]

DECISIONS: Final = 100_000
HOURS: Final = 6
"""So long ago is the oldest of them; a sixth of them are of the last hour."""
AT_ONCE: Final = 2_000
RARE: Final = 50_000
"""One in so many is of the strategy `rare`."""
PATIENCE_SECONDS: Final = 10.0
"""A page may take so long on a machine with other work; what it takes on an idle one is a figure."""
LARGEST_BYTES: Final = 300_000


def entries() -> Iterator[packet_pb2.JournalEntry]:
    """The oldest first, evenly over the time."""
    now = time.time_ns()
    step = HOURS * 3_600_000_000_000 // DECISIONS
    at = now - DECISIONS * step
    new_id = Ids(lambda: at)
    for number in range(DECISIONS):
        at += step
        packet = packet_pb2.DecisionPacket(feature_set_id="mf1")
        order, answer = packet.order, packet.decision
        order.instrument, order.side, order.quantity = INSTRUMENTS[number % 2], pb.SIDE_BUY, 1.0
        order.strategy = "rare" if number % RARE == 7 else f"strategy-{number % 20}"
        answer.decision_id = new_id()
        answer.action = (pb.ACTION_TRADE, pb.ACTION_NO_TRADE)[number % 2]
        answer.source = pb.SOURCE_RULES if number % 50 == 0 else pb.SOURCE_PRIMARY
        answer.model_name, answer.model_version = "champion", "ab" * 8
        answer.decided_at.FromNanoseconds(at)
        answer.budget.allowed_us, answer.budget.used_us = 10_000, 1_000 + number % 3_000
        yield packet_pb2.JournalEntry(decision=packet)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, large_url: str) -> Iterator[SecureServer]:
    made = SecureServer(tmp_path_factory.mktemp("server"), "token")
    with made.running(DATABASE_URL=large_url) as server:
        yield server


@pytest.fixture(scope="module")
def large_url(servers: Stack) -> Iterator[str]:
    """A database with all of them."""
    with empty_database(servers) as url:
        fill(url)
        yield url


def fill(url: str) -> None:
    with closing(Store(url)) as store:
        store.migrate()
        rows: list[Row] = []
        digest, shipped = GENESIS, store.shipped("journal-1", Head(0, GENESIS))
        for position, one in enumerate(entries(), start=1):
            entry = one.SerializeToString()
            digest = link(digest, entry)
            rows.append(Row(position, entry, digest))
            if len(rows) == AT_ONCE:
                assert store.write("journal-1", shipped, rows)
                shipped = Head(position, digest)
                rows.clear()
        assert shipped.position == DECISIONS


@pytest.fixture(scope="module")
def console(server: SecureServer) -> Iterator[RunningConsole]:
    with running_console(clean_environment(server), "--target", server.admin) as console:
        yield console


@pytest.fixture
def viewer(server: SecureServer, console: RunningConsole) -> Iterator[Visitor]:
    with Visitor(console.url) as visitor:
        assert visitor.log_in(server.token("viewer", sub="vic")).status_code == 303
        yield visitor


class Watch:
    """Holds what pages take to their claim."""

    def __init__(self, visitor: Visitor, figure: Figure) -> None:
        self._visitor = visitor
        self._figure = figure

    def page(self, path: str, *, part: bool = False) -> str:
        """A page, which is there soon and not large."""
        began = time.monotonic()
        answer = self._visitor.get(path, **({"hx-request": "true"} if part else {}))
        seconds = time.monotonic() - began
        assert answer.status_code == 200, answer.text
        assert seconds < PATIENCE_SECONDS, path
        self._figure(seconds < 1.0, f"{path} within a second of 100,000 decisions ({seconds:.2f} s)")
        assert len(answer.content) < LARGEST_BYTES, f"{path} does not grow with the audit"
        return answer.text


@pytest.fixture
def watch(viewer: Visitor, figure: Figure) -> Watch:
    return Watch(viewer, figure)


def ids_on(text: str) -> list[str]:
    return re.findall(r'<a href="/decisions/([0-9a-f-]{36})">', text)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", 50),
        ("last=10m", 50),
        ("strategy=strategy-7", 50),
        ("source=rules", 50),
        ("heard=no_trade&instrument=" + INSTRUMENTS[1], 50),
        ("strategy=rare", 2),
        ("strategy=rare&last=10m", 0),
        ("model=nowhere", 0),
        ("source=secondary", 0),
    ],
)
def test_a_search_of_all_of_them_is_there_soon(watch: Watch, query: str, found: int) -> None:
    assert len(ids_on(watch.page(f"/decisions?{query}"))) == found


def test_older_pages_are_as_near_as_the_first(watch: Watch) -> None:
    seen: list[str] = []
    path = "/decisions?strategy=strategy-3"
    for _ in range(20):
        text = watch.page(path)
        seen += ids_on(text)
        (older,) = re.findall(r'<a class="button" href="([^"]+)" rel="next">', text)
        path = unescape(older)
    assert len(set(seen)) == len(seen) == 1_000
    assert seen == sorted(seen, reverse=True)


def test_the_hour_is_known_within_seconds_however_much_there_was(watch: Watch) -> None:
    began = time.monotonic()
    watch.page("/", part=False)
    text = eventually(lambda: watch.page("/overview/hour", part=True), lambda text: "still being read" not in text)
    assert time.monotonic() - began < 60
    (looked_at,) = re.findall(r"From ([\d,]+) decisions", text)
    assert 10_000 <= int(looked_at.replace(",", "")) <= 12_200, "200 of each minute, and no more"


def test_one_who_searches_keeps_nobody_waiting(watch: Watch, server: SecureServer, console: RunningConsole) -> None:
    """Searches that find nothing read the most; meanwhile other people's pages are there as soon as ever."""
    stopped = threading.Event()
    searched: list[int] = []

    def search() -> None:
        with Visitor(console.url) as other:
            assert other.log_in(server.token("viewer", sub="sue")).status_code == 303
            while not stopped.is_set():
                searched.append(other.get("/decisions?strategy=unheard&source=secondary").status_code)

    searching = [threading.Thread(target=search) for _ in range(3)]
    for one in searching:
        one.start()
    try:
        eventually(lambda: len(searched), lambda count: count >= 3)
        for _ in range(10):
            watch.page("/overview/status", part=True)
    finally:
        stopped.set()
        for one in searching:
            one.join()
    assert set(searched) <= {200, 429}, "more than the audit has time for is refused, and does not pile up"
