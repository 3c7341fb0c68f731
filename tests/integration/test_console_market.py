"""The market page on real parts: a simulated market, worker and keeper of bars, Redis and SQL, server, console."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from support.console import Visitor
from support.harness import CallingThreads, eventually, stack_admin_channel

from feature_cache.bars.store import BarStore
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.console.charting import PANES
from pretrade.console.cli import login_link
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

pytestmark = [pytest.mark.stack, pytest.mark.long]

ROOT: Final = Path(__file__).parents[2]
NAME: Final = "BTCUSDT.SIM"
PARTS: Final = {"valkey", "broker", "postgres", "worker", "bars", "market", "server", "console"}
"""All but the model servers: what is decided does not matter."""
CHART: Final = f"/market/chart.json?instrument={NAME}&interval=1s"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Its bars are in a database of their own, which the server is told of."""
    directory = tmp_path_factory.mktemp("market")
    before = dict(os.environ)
    os.environ |= {
        "PRETRADE_BUDGET__CAP_SECONDS": "0.6",
        "PRETRADE_STARTUP_PATIENCE_SECONDS": "0.5",
        "PRETRADE_BARS_DATABASE_URL": f"sqlite:///{directory / 'bars.db'}",
    }
    settings = LocalSettings(dir=directory, bars=True, console=True)
    try:
        with Stack(settings, parts=PARTS) as stack:
            yield stack
    finally:
        os.environ.clear()
        os.environ |= before


@pytest.fixture(scope="module")
def admin(stack: Stack) -> Iterator[admin_pb2_grpc.AdminServiceStub]:
    with stack_admin_channel(stack.endpoints) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


@pytest.fixture
def visitor(stack: Stack) -> Iterator[Visitor]:
    """Ann, logged in by the link that `pretrade up` prints."""
    with Visitor(str(stack.endpoints.console_url)) as visitor:
        ticket = login_link(stack.endpoints).rpartition("ticket=")[2]
        visitor.get(f"/login?ticket={ticket}")
        assert visitor.post("/login", {"ticket": ticket, "name": "ann"}).status_code == 303
        yield visitor


def bars_of(admin: admin_pb2_grpc.AdminServiceStub, count: int, token: str = "") -> admin_pb2.ListBarsResponse:
    request = admin_pb2.ListBarsRequest(instrument=NAME, interval="1s", page_size=count, page_token=token)
    return admin.ListBars(request, timeout=20.0)


def test_bars_of_a_market_that_goes_on_are_those_of_the_table(
    stack: Stack, admin: admin_pb2_grpc.AdminServiceStub
) -> None:
    page = eventually(lambda: bars_of(admin, 4), lambda found: len(found.bars) == 4 and bool(found.next_page_token))
    earlier = bars_of(admin, 1, page.next_page_token)
    starts = [bar.start.seconds for bar in (*earlier.bars, *page.bars)]
    assert starts == list(range(starts[0], starts[0] + 5)), "page after page without a hole"
    with closing(BarStore(os.environ["PRETRADE_BARS_DATABASE_URL"])) as store:
        kept = {row["start"].timestamp(): row for row in store.last(NAME, "1s", 1_000)}
    for bar in page.bars:
        row = kept[bar.start.seconds]
        for name in ("open", "high", "low", "close", "mid_open", "mid_close"):
            assert (getattr(bar, name) if bar.HasField(name) else None) == row[name], name
        assert (bar.trades, bar.volume, bar.complete) == (row["trades"], row["volume"], row["complete"])


def test_what_cannot_be_asked_is_refused(admin: admin_pb2_grpc.AdminServiceStub) -> None:
    for changes, code, said in (
        ({"instrument": "BTCUSD.SIM"}, grpc.StatusCode.NOT_FOUND, f"did you mean {NAME}?"),
        ({"interval": "2h"}, grpc.StatusCode.INVALID_ARGUMENT, "interval: must be one of 1s, 10s, 1m, 5m"),
    ):
        fields: dict[str, Any] = {"instrument": NAME, "interval": "1s", **changes}
        with pytest.raises(grpc.RpcError) as refused:
            admin.ListBars(admin_pb2.ListBarsRequest(**fields), timeout=20.0)
        assert (refused.value.code(), said in (refused.value.details() or "")) == (code, True)


def test_the_book_of_a_market_that_goes_on_is_published_by_its_worker_and_follows_it(
    stack: Stack, admin: admin_pb2_grpc.AdminServiceStub, visitor: Visitor
) -> None:
    def book(**changes: Any) -> admin_pb2.GetBookResponse:
        return admin.GetBook(admin_pb2.GetBookRequest(instrument=NAME, **changes), timeout=5.0)

    first = eventually(book, lambda found: bool(found.bids and found.asks))
    assert (first.book, first.problem) == (admin_pb2.BOOK_STATE_VALID, "")
    bids, asks = ([level.price for level in side] for side in (first.bids, first.asks))
    assert (len(bids), len(asks)) == (10, 10), "as many as the worker's setting says"
    assert (bids, asks) == (sorted(bids, reverse=True), sorted(asks)), "best first"
    assert bids[0] < asks[0]
    assert all(level.size > 0 for level in (*first.bids, *first.asks))
    assert len(book(levels=3).bids) == 3
    later = eventually(book, lambda found: found.event_time.ToNanoseconds() > first.event_time.ToNanoseconds())
    (signal,) = admin.ListSignals(admin_pb2.ListSignalsRequest(instruments=[NAME]), timeout=20.0).signals
    assert abs(signal.features.bid / later.bids[0].price - 1) < 0.01, "the same market"
    with pytest.raises(grpc.RpcError) as refused:
        book(levels=101)
    assert "levels: must be 1 to 100" in (refused.value.details() or "")
    ladder = visitor.part(f"/market/book?instrument={NAME}")
    assert len(re.findall(r'<rect class="ask"', ladder)) == len(re.findall(r'<rect class="bid"', ladder)) == 10
    assert "Spread" in ladder


def chart_of(visitor: Visitor, path: str = CHART) -> dict[str, Any]:
    answer = visitor.get(path, **{"hx-request": "true"})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_the_page_has_bars_and_the_decisions_of_their_time_with_links(stack: Stack, visitor: Visitor) -> None:
    page = visitor.get("/market").text
    assert re.search(r'<a href="/market" aria-current="page">Market</a>', page)
    options = re.findall(r'<option value="([^"]+)"', page.partition("</main>")[0])
    assert options == [*stack.endpoints.instruments, *_INTERVALS, *PANES]
    eventually(lambda: chart_of(visitor), lambda found: len(found["time"]) >= 3)
    with grpc.insecure_channel(str(stack.endpoints.decision)) as channel:
        order = pb.Order(instrument=NAME, side=pb.SIDE_SELL, quantity=0.01, strategy="<b>twap</b>")
        decision = decision_pb2_grpc.DecisionServiceStub(channel).Decide(pb.DecideRequest(order=order), timeout=5.0)
    link = f"/decisions/{decision.decision.decision_id}"
    chart = eventually(lambda: chart_of(visitor), lambda found: any(one["href"] == link for one in found["marks"]))
    (mark,) = (one for one in chart["marks"] if one["href"] == link)
    assert mark["time"] == decision.decision.decided_at.seconds
    assert "sell at" in mark["label"]
    assert f'<a href="{link}">' in chart["rows"]
    assert "&lt;b&gt;twap&lt;/b&gt;" in chart["rows"], "what others wrote is text"
    assert (chart["problem"], chart["missing"]) == ("", "")
    lengths = {len(chart[name]) for name in ("time", "open", "high", "low", "close", "mid_open", "pane", "whole")}
    assert lengths == {len(chart["time"])}
    assert "Newest bar:" in chart["newest"]


def test_indicators_are_drawn_below_where_they_are_defined(visitor: Visitor) -> None:
    """Those of 14 bars after 15 seconds."""
    path = f"{CHART}&pane=rsi_14"
    chart = eventually(lambda: chart_of(visitor, path), lambda found: found["pane"] and found["pane"][-1] is not None)
    assert chart["pane_problem"] == ""
    assert all(value is None or -50 <= value <= 50 for value in chart["pane"])
    volumes = chart_of(visitor)["pane"]
    assert all(value is not None for value in volumes)


_INTERVALS: Final = ("1s", "10s", "1m", "5m")


def test_what_is_missing_is_said_in_its_place(visitor: Visitor) -> None:
    strange = chart_of(visitor, "/market/chart.json?instrument=<i>.SIM&interval=1s")
    assert "does not follow" in strange["problem"]
    assert (strange["time"], strange["marks"], strange["rows"]) == ([], [], "")
    young = chart_of(visitor, f"/market/chart.json?instrument={NAME}&interval=5m")
    assert "There is no bar of BTCUSDT.SIM of 5m yet" in young["problem"] or young["time"]


@pytest.mark.timeout(600)
def test_a_browser_shows_the_market_by_day_by_night_and_on_a_phone(stack: Stack, browser: str, tmp_path: Path) -> None:
    """`TEST_CONSOLE=docs` writes the picture docs/console-market.png, on a machine without other work."""
    with Orders(stack), sync_playwright() as playwright:
        # Its own sandbox needs what a container has not; the pages are ours.
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        with shown(chromium, stack, DESKTOP, "light") as page:
            marks = 40 if os.environ.get("TEST_CONSOLE") == "docs" else 5
            expect(page.locator("#prices a.mark").nth(marks)).to_be_visible(timeout=120_000)
            expect(page.locator("#book rect.bid")).to_have_count(10)
            before = page.locator("#newest-bar").text_content()
            expect(page.locator("#newest-bar")).not_to_have_text(str(before))
            assert coloured(page, "--good") or coloured(page, "--bad"), "candles are painted"
            picture(page, tmp_path)
            page.get_by_label("Below").focus()
            page.keyboard.type("RSI")
            page.get_by_role("button", name="Show").press("Enter")
            expect(page.locator("#below .u-legend")).to_contain_text("rsi_14")
            kept = page.locator("#prices a.mark").last.evaluate_handle("(mark) => mark")
            before = page.locator("#newest-bar").text_content()
            expect(page.locator("#newest-bar")).not_to_have_text(str(before))
            assert kept.evaluate("(mark) => mark.isConnected"), "a click that begins before a look ends after it"
            page.locator("#prices a.mark").last.click()
            page.wait_for_url("**/decisions/*")
            expect(page.locator("main")).to_contain_text(NAME)
        for size, scheme in ((DESKTOP, "dark"), (PHONE, "light")):
            with shown(chromium, stack, size, scheme) as page:
                expect(page.locator("#market-rows a").first).to_be_visible()
                assert coloured(page, "--good") or coloured(page, "--bad")
                fits = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                assert fits, "only tables scroll sideways"
        chromium.close()


DESKTOP: Final = {"width": 1366, "height": 768}
PHONE: Final = {"width": 390, "height": 844}


class Orders(CallingThreads):
    """An order now and then, of both sides in turn."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(count=1)
        self._stack = stack

    def _call(self, number: int) -> None:
        with grpc.insecure_channel(str(self._stack.endpoints.decision)) as channel:
            stub = decision_pb2_grpc.DecisionServiceStub(channel)
            side = pb.SIDE_BUY
            while not self._stopped.wait(0.7):
                side = pb.SIDE_SELL if side == pb.SIDE_BUY else pb.SIDE_BUY
                order = pb.Order(instrument=NAME, side=side, quantity=0.01, strategy="twap")
                stub.Decide(pb.DecideRequest(order=order), timeout=5.0)


@contextmanager
def shown(chromium: Browser, stack: Stack, size: Any, scheme: Any) -> Iterator[Page]:
    """The page of a browser that nobody used before, with bars of a second; nothing of it may go wrong in silence."""
    context = chromium.new_context(
        base_url=str(stack.endpoints.console_url), viewport=size, color_scheme=scheme, reduced_motion="reduce"
    )
    context.set_default_timeout(60_000)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.goto(login_link(stack.endpoints))
    page.get_by_label("Your name").fill("ann")
    page.keyboard.press("Enter")
    expect(page.locator("#trading-state")).to_be_visible()
    page.goto(f"/market?instrument={NAME}&interval=1s")
    expect(page.locator("#newest-bar")).to_contain_text("Newest bar")
    yield page
    context.close()
    assert not wrong


def coloured(page: Page, name: str) -> bool:
    """Whether the chart of prices has this colour of the style sheet anywhere."""
    found: bool = page.evaluate(
        """(name) => {
          const probe = document.body.appendChild(document.createElement("i"));
          probe.style.color = `var(${name})`;
          const wanted = getComputedStyle(probe).color.match(/[0-9]+/g).map(Number);
          probe.remove();
          const canvas = document.querySelector("#prices canvas");
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          for (let at = 0; at < data.length; at += 4) {
            if (data[at + 3] === 255 && wanted.every((value, index) => data[at + index] === value)) return true;
          }
          return false;
        }""",
        name,
    )
    return found


def picture(page: Page, directory: Path) -> None:
    """Takes a picture of the window; into docs/ if the run was asked for that."""
    where = ROOT / "docs" if os.environ.get("TEST_CONSOLE") == "docs" else directory
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=where / "console-market.png")
