"""The console in a real browser, on a whole stack as `pretrade up` starts it; it makes the pictures docs/console-*.png.

`TEST_CONSOLE=docs` writes the pictures of the docs, on a machine without other work.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from playwright.sync_api import Browser, Locator, Page, expect
from support.cards import measure
from support.console import RunningConsole, running_console
from support.console_browser import DESKTOP, PHONE, into_docs, loaded, opened, picture, running_chromium
from support.figures import Figure
from support.harness import CallingThreads, stack_admin_channel
from support.secure_server import SecureServer

from local.demo.variants import recalibrated
from local.stack.parts import alertmanager, prometheus
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.client import credential_variables
from pretrade.console.acts import ACTS
from pretrade.console.cli import login_link
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from server.models.registry import Registry

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(900)]

LOAD_MS: Final = 180_000
"""A model may have to be loaded on two replicas, on a machine with other work."""
ALERTING: Final = bool(prometheus.program() and alertmanager.program())
"""Both come with no package of ours."""
PAGES: Final = {
    "/": "Overview",
    "/decisions": "Decisions",
    "/market": "Market",
    "/models": "Models",
    "/alerts": "Alerts",
    "/runbook": "Runbook",
}
HALT: Final = "/act/trading_state?state=halted"
ACTS_TO_OPEN: Final = (
    *(f"/act/{name}" for name in ACTS if name not in ("canary_abort", "canary_promote", "canary_weight")),
    *(("/alerts/silence",) if ALERTING else ()),
)
"""Every form that can be opened while there is no canary."""
MOST_TABS: Final = 150

# How every text on the page stands out from what is painted behind it, less what is unseen or switched off.
_CONTRASTS: Final = r"""() => {
  const parts = (colour) => colour.match(/[\d.]+/g).map(Number);
  const linear = (one) => (one <= 10.31 ? one / 3294.6 : ((one / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, a = 1] = parts(getComputedStyle(at).backgroundColor);
      if (a === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.data.trim();
    const element = texts.currentNode.parentElement;
    if (!text || !element.checkVisibility() || element.closest("option, progress, .unseen, .skip, svg")) continue;
    const both = [luminance(parts(getComputedStyle(element).color)), luminance(ground(element))];
    const contrast = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    if (contrast < 4.5) found.push(`${text}: ${contrast.toFixed(2)}`);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def chromium(browser: str) -> Iterator[Browser]:
    with running_chromium(browser) as started:
        yield started


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, model_store: Path) -> Path:
    """Models of its own: canaries leave versions and aliases."""
    return Path(shutil.copytree(model_store, tmp_path_factory.mktemp("models") / "store"))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Stack]:
    settings = LocalSettings(
        dir=tmp_path_factory.mktemp("whole"), model_store=store, console=True, alerts=ALERTING, replica_tokens=True
    )
    before = dict(os.environ)
    os.environ |= {
        "PRETRADE_BUDGET__CAP_SECONDS": "0.6",  # who answers is looked at, and not how fast
        "PRETRADE_BREAKER__SLOW_SECONDS": "0.4",
        "PRETRADE_CANARY__SLOW_SECONDS": "10",
        "PRETRADE_CANARY__INDEPENDENT_SECONDS": "0.1",
        "PRETRADE_CONTROL__OUT_OF_DOMAIN": "false",  # the models know another market
        "PRETRADE_DRIFT__INTERVAL_SECONDS": "10",
    }
    try:
        with Stack(settings) as stack:
            yield stack
    finally:
        os.environ.clear()
        os.environ |= before


class Orders(CallingThreads):
    """Orders of all instruments, some twenty a second."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(count=2)
        self._stack = stack
        self._numbers = itertools.count()

    def _call(self, number: int) -> None:
        names = self._stack.endpoints.instruments
        with grpc.insecure_channel(str(self._stack.endpoints.decision)) as channel:
            stub = decision_pb2_grpc.DecisionServiceStub(channel)
            while not self._stopped.wait(0.1):
                at = next(self._numbers)
                order = pb.Order(
                    instrument=names[at % len(names)],
                    side=pb.SIDE_SELL if at % 3 else pb.SIDE_BUY,
                    quantity=0.01,
                    strategy=("twap", "sweep", "by-eye")[at % 7 % 3],
                )
                try:
                    stub.Decide(pb.DecideRequest(order=order), timeout=5.0)
                except grpc.RpcError:
                    continue  # a server that is started anew is away for a moment


@pytest.fixture(scope="module")
def orders(stack: Stack) -> Iterator[None]:
    with Orders(stack):
        yield


@pytest.fixture(scope="module")
def admin(stack: Stack) -> Iterator[admin_pb2_grpc.AdminServiceStub]:
    with stack_admin_channel(stack.endpoints) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


@contextmanager
def on_call(chromium: Browser, stack: Stack, **options: Any) -> Iterator[Page]:
    """A page on which Ann has logged in by the link that `pretrade up` prints."""
    with opened(chromium, str(stack.endpoints.console_url), **options) as page:
        page.goto(login_link(stack.endpoints))
        page.get_by_label("Your name").fill("ann")
        page.keyboard.press("Enter")
        expect(page.locator("#trading-state")).to_be_visible()
        yield page


def tab_to(page: Page, wanted: Locator) -> None:
    """Goes on by the Tab key alone until something has the focus, and shows it."""
    for _ in range(MOST_TABS):
        if wanted.evaluate("(one) => one === document.activeElement"):
            assert wanted.evaluate("(one) => getComputedStyle(one).outlineStyle !== 'none'"), "where it is can be seen"
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{wanted} cannot be reached by Tab")


def make(page: Page, why: str, fields: Mapping[str, str] | None = None) -> None:
    """Fills in a form that is open, waits for what it would change, and sends it: with keys alone."""
    for name, value in (fields or {}).items():
        tab_to(page, page.locator(f"#{name}"))
        page.keyboard.type(value)
    tab_to(page, page.locator("#reason"))
    page.keyboard.type(why)
    expect(page.locator("#preview li").first).to_be_visible()
    page.keyboard.press("Enter")


def test_on_call_sees_that_all_is_well_halts_resumes_and_finds_out_who_did_it(
    stack: Stack, orders: None, admin: admin_pb2_grpc.AdminServiceStub, chromium: Browser, tmp_path: Path
) -> None:
    with on_call(chromium, stack) as page:
        expect(page.get_by_text("All is well")).to_be_visible()
        expect(page.locator("#hour")).to_contain_text("PRIMARY")
        expect(page.locator(".chart canvas").first).to_be_visible()
        expect(page.locator("#parts")).not_to_contain_text("no worker reports")
        picture(page, "overview", tmp_path)

        page.get_by_role("link", name="Halt trading").click()
        expect(page.locator("#preview")).to_contain_text("trading_state: ACTIVE → HALTED")
        page.get_by_label("For how long").fill("1h")
        expect(page.locator("#preview")).to_contain_text("BY THEMSELVES after 1h")
        page.get_by_label("Why").fill("exchange incident")
        picture(page, "halt", tmp_path)
        page.keyboard.press("Enter")
        expect(page.locator("#trading-state")).to_have_text("HALTED")
        expect(page.locator("#status")).to_contain_text("exchange incident")
        status = admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=5.0)
        assert status.trading_state == admin_pb2.TRADING_STATE_HALTED

        page.get_by_role("link", name="Resume trading").click()
        expect(page.locator("#preview")).to_contain_text("Orders may trade again.")
        page.get_by_label("Why").fill("the exchange is well again")
        page.locator("#make").click()
        expect(page.locator("#trading-state")).to_have_text("ACTIVE")
        row = page.locator("#changes tr", has_text="the exchange is well again")
        expect(row).to_contain_text("ann")


def test_every_page_is_reached_and_every_act_of_operations_is_made_by_keys_alone(
    stack: Stack, chromium: Browser
) -> None:
    def act(href: str, expected: str, **fields: str) -> None:
        tab_to(page, page.locator(f'#parts a[href="{href}"]'))
        page.keyboard.press("Enter")
        make(page, "drill", fields)
        expect(page.locator("#parts")).to_contain_text(expected)

    with on_call(chromium, stack) as page:
        for path in list(PAGES)[1:]:
            tab_to(page, page.locator(f'nav a[href="{path}"]'))
            page.keyboard.press("Enter")
            expect(page.locator(f'nav a[href="{path}"][aria-current="page"]')).to_be_visible()
        loaded(page, "/")
        tab_to(page, page.locator("#halt"))
        page.keyboard.press("Enter")
        make(page, "drill")
        expect(page.locator("#trading-state")).to_have_text("HALTED")
        tab_to(page, page.locator('a[href="/act/trading_state?state=active"]'))
        page.keyboard.press("Enter")
        make(page, "over")
        expect(page.locator("#trading-state")).to_have_text("ACTIVE")
        act("/act/breaker?replica=primary", "FORCED_OPEN")
        act("/act/breaker?replica=primary", "CLOSED", mode="automatic")
        act("/act/drain?replica=secondary", "DRAINED")
        act("/act/resume?replica=secondary", "Drain")
        act("/act/flag?flag=shadow&value=off", "Turn on")
        act("/act/flag?flag=shadow&value=on", "Turn off")
        act("/act/chain", "rules → ", stage0="rules", stage3="none")
        act("/act/chain", "model → ", stage0="model", stage3="rules")
        tab_to(page, page.get_by_role("button", name="Log out"))
        page.keyboard.press("Enter")
        expect(page.get_by_label("Token")).to_be_focused()


def test_whoever_reads_a_table_keeps_the_place_when_it_is_asked_for_anew(stack: Stack, chromium: Browser) -> None:
    with on_call(chromium, stack, viewport=PHONE) as page:
        drain = page.locator('#parts a[href="/act/drain?replica=secondary"]')
        drain.focus()
        table = page.get_by_role("region", name="Replicas")
        table.evaluate("(one) => { one.scrollLeft = 40; one.dataset.before = 'yes'; }")
        expect(page.locator('[data-before="yes"]')).to_have_count(0)  # another one is in its place
        expect(drain).to_be_focused()
        assert table.evaluate("(one) => one.scrollLeft") == 40


def test_decisions_are_watched_searched_explained_and_replayed(
    stack: Stack, orders: None, chromium: Browser, tmp_path: Path
) -> None:
    with on_call(chromium, stack, color_scheme="dark") as page:
        page.get_by_role("link", name="Decisions").click()
        page.get_by_role("button", name="Watch live").click()
        expect(page.locator("#live")).to_contain_text("Live")
        expect(page.locator("#rows tr", has_text="by-eye").nth(3)).to_be_visible()
        page.get_by_role("button", name="Stop").click()
        page.get_by_label("Strategy").fill("by-eye")
        page.get_by_label("Source").select_option("primary")
        page.get_by_role("button", name="Search").click()
        expect(page.locator("#rows tr").first).to_contain_text("PRIMARY")
        expect(page.locator("#rows tr", has_text="twap")).to_have_count(0)
        picture(page, "decisions", tmp_path, whole=False)
        page.locator("#rows a").first.click()
        expect(page.locator(".ledger svg").first).to_be_visible()
        page.get_by_text("features as they were").click()
        expect(page.locator(".named")).to_contain_text("imbalance_l1")
        page.get_by_text("features as they were").click()
        page.get_by_role("button", name="Recompute").click()
        expect(page.locator("#replay")).to_contain_text("Equal: every field")
        picture(page, "decision", tmp_path)


def test_a_canary_is_begun_followed_promoted_and_taken_back_by_keys_alone(
    stack: Stack, store: Path, orders: None, chromium: Browser, tmp_path: Path
) -> None:
    registry = Registry(store)
    champion = json.loads((store / "champion.json").read_text())["version"]
    version = recalibrated(registry, champion)
    measure(registry, version)

    def act(selector: str, **fields: str) -> None:
        tab_to(page, page.locator(selector).first)
        page.keyboard.press("Enter")
        make(page, "looks better", fields)

    with on_call(chromium, stack) as page:
        page.set_default_timeout(LOAD_MS)
        loaded(page, "/models")
        tab_to(page, page.locator(f'a[href="/models/{version}"]'))
        page.keyboard.press("Enter")
        expect(page.locator(".reliability circle")).to_have_count(1)
        expect(page.get_by_role("region", name="Figures")).to_contain_text("0.960")
        act('main a[href^="/act/model_load"]')
        expect(page.locator(".notice")).to_contain_text("loaded on", timeout=LOAD_MS)
        loaded(page, f"/models/{version}")
        act('main a[href^="/act/canary_start"]', steps="50 100")
        expect(page.locator(".notice")).to_contain_text("50%", timeout=LOAD_MS)
        expect(page.locator("#models")).to_contain_text("RUNNING")
        expect(page.locator(".growth polyline").nth(3)).to_be_attached(timeout=LOAD_MS)
        expect(page.locator(".heat [class*=heat]").first).to_be_visible(timeout=LOAD_MS)
        picture(page, "models", tmp_path)
        act('a[href^="/act/canary_weight"]', percent="75")
        expect(page.locator("#models")).to_contain_text("75 %, held")
        act('a[href^="/act/canary_abort"]')
        expect(page.locator("#models")).to_contain_text("ABORTED")
        act('a[href^="/act/canary_start"]', model_version=version)
        expect(page.locator("#models")).to_contain_text("RUNNING", timeout=LOAD_MS)
        act('a[href^="/act/canary_promote"]')
        expect(page.locator("#models")).to_contain_text("PROMOTED", timeout=LOAD_MS)
        row = page.locator("#models tr", has_text=version)
        expect(row).to_contain_text("champion")
        act('a[href^="/act/roll_back"]')
        expect(page.locator(".notice")).to_contain_text(champion, timeout=LOAD_MS)
        expect(page.locator("#models tr", has=page.locator(f'a[href="/models/{champion}"]'))).to_contain_text(
            "champion"
        )
        act('main a[href^="/act/model_alias"]', model_version=version)
        expect(row).to_contain_text("challenger")


@pytest.mark.skipif(not ALERTING, reason="needs prometheus and prometheus-alertmanager")
def test_a_silence_is_made_and_ended_by_keys_alone(stack: Stack, chromium: Browser) -> None:
    with on_call(chromium, stack) as page:
        loaded(page, "/alerts")
        tab_to(page, page.locator('main a[href^="/alerts/silence"]').first)
        page.keyboard.press("Enter")
        for name, value in (("conditions", "ReplicaDown"), ("span", "1h"), ("reason", "maintenance")):
            tab_to(page, page.locator(f"#{name}"))
            page.keyboard.type(value)
        expect(page.locator("#preview")).not_to_contain_text("Asking")
        page.keyboard.press("Enter")
        expect(page.locator(".notice")).to_contain_text("nobody is told of")
        expect(page.locator("main")).to_contain_text("maintenance")
        tab_to(page, page.locator('main a[href^="/alerts/silences/"]').first)
        page.keyboard.press("Enter")
        expect(page.locator("#make")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator(".notice")).to_contain_text("people are told again")


def test_an_alert_rule_is_set_changed_and_deleted_by_keys_alone(stack: Stack, chromium: Browser) -> None:
    def act(selector: str, expected: str, **fields: str) -> None:
        tab_to(page, page.locator(selector))
        page.keyboard.press("Enter")
        make(page, "drill", fields)
        expect(page.locator("#rules")).to_contain_text(expected)

    with on_call(chromium, stack) as page:
        loaded(page, "/alerts")
        act('main a[href="/act/alert_rule"]', "is above 0.9", name="drill", strategy="sweep", threshold="0.9")
        act('#rules a[href^="/act/alert_rule?"]', "is below 0.9 for 300 s", crosses="below", lasting="5m")
        act('#rules a[href^="/act/alert_rule_delete"]', "There are none")


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_every_page_and_form_fits(
    stack: Stack, orders: None, chromium: Browser, tmp_path: Path, viewport: dict[str, int]
) -> None:
    with on_call(chromium, stack, viewport=viewport) as page:
        expect(page.locator("#parts table").first).to_be_visible()
        if viewport is PHONE:
            picture(page, "phone", tmp_path, whole=False)
        loaded(page, "/decisions")
        one = page.locator("#rows a").first.get_attribute("href")
        loaded(page, "/models")
        version = page.locator('#models a[href^="/models/"]').first.get_attribute("href")
        for path in (*PAGES, *ACTS_TO_OPEN, str(one), str(version)):
            loaded(page, path)
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= viewport["width"], f"{path} is {width} pixels wide"
        page.get_by_role("button", name="Log out").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_by_day_and_by_night(stack: Stack, orders: None, chromium: Browser, scheme: Any) -> None:
    other = "dark" if scheme == "light" else "light"
    with on_call(chromium, stack, color_scheme=other) as page:
        page.get_by_label("Colours").select_option(scheme)
        grounds = {page.evaluate("getComputedStyle(document.documentElement).backgroundColor")}
        loaded(page, "/decisions")
        one = str(page.locator("#rows a").first.get_attribute("href"))
        loaded(page, "/models")
        version = str(page.locator('#models a[href^="/models/"]').first.get_attribute("href"))
        for path in (*PAGES, *ACTS_TO_OPEN, one, version):
            loaded(page, path)
            assert page.evaluate(_CONTRASTS) == [], path
            grounds.add(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
        assert grounds == {"rgb(255, 255, 255)" if scheme == "light" else "rgb(16, 22, 30)"}, (
            "the choice outlives a page"
        )


def test_pages_are_there_within_a_second(stack: Stack, orders: None, chromium: Browser, figure: Figure) -> None:
    """From the click to the last part; the browser has been there before, as on-call's has."""
    rows = ["| page | median | slowest of 5 |", "|---|---|---|"]
    with on_call(chromium, stack) as page:
        loaded(page, "/decisions")
        one = str(page.locator("#rows a").first.get_attribute("href"))
        loaded(page, "/models")
        version = str(page.locator('#models a[href^="/models/"]').first.get_attribute("href"))
        for path, name in {
            **PAGES,
            one: "One decision",
            version: "A model's card",
            HALT: "The form that halts",
        }.items():
            loaded(page, path)
            took = []
            for _ in range(5):
                began = time.monotonic()
                loaded(page, path)
                took.append(time.monotonic() - began)
            assert max(took) < 30
            figure(max(took) < 1.0, f"{path} is there within a second ({max(took):.2f} s)")
            rows.append(f"| {name} | {statistics.median(took):.2f} s | {max(took):.2f} s |")
    into_docs("console.md", "loads", "\n".join((*rows, "")))


def test_a_server_that_is_started_anew_is_followed_without_a_touch(stack: Stack, chromium: Browser) -> None:
    with on_call(chromium, stack) as page:
        expect(page.locator("#status")).to_contain_text("All is well")

        def start_anew() -> None:
            stack["server"].kill()
            stack.restart("server")

        again = threading.Thread(target=start_anew)
        again.start()
        try:
            expect(page.locator("#status .problem")).to_contain_text(re.compile("cannot be reached|did not answer"))
        finally:
            again.join()
        expect(page.locator("#trading-state")).to_have_text("ACTIVE")
        expect(page.locator("#parts table").first).to_be_visible()
        expect(page.locator("#silent")).to_be_hidden()


def test_a_console_that_is_started_anew_says_so_and_asks_who_it_is(stack: Stack, chromium: Browser) -> None:
    with on_call(chromium, stack) as page:
        stack["console"].kill()
        expect(page.locator("#silent")).to_be_visible()
        stack.restart("console")
        expect(page.get_by_text("Your session has ended")).to_be_visible()


@contextmanager
def bare_console(chromium: Browser, directory: Path, role: str, **options: Any) -> Iterator[Page]:
    """A page of a console beside a server alone, on which somebody with a role has logged in by a token."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PRETRADE_")}
    with SecureServer(directory, "token").running() as server:
        environment = clean | {credential_variables.CA: str(server.path("ca.pem"))}
        running: RunningConsole
        with (
            running_console(environment, "--target", server.admin) as running,
            opened(chromium, running.url, **options) as page,
        ):
            page.goto("/")
            page.get_by_label("Token").fill(server.token(role, sub="vic"))
            page.get_by_role("button", name="Log in").click()
            expect(page.locator("#parts table").first).to_be_visible()
            yield page


def test_a_viewer_is_offered_nothing_and_refused(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    with bare_console(chromium, tmp_path_factory.mktemp("server"), "viewer") as page:
        for path in ("/", "/market", "/models", "/decisions", "/alerts"):
            loaded(page, path)
            assert page.locator('a[href^="/act/"]').count() == 0, path
        for name in ACTS:
            page.goto(f"/act/{name}")
            expect(page.get_by_role("alert")).to_contain_text("Your role, viewer, does not allow this.")
        page.goto("/")
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_label("Token")).to_be_visible()


def test_a_phone_leaves_its_room_to_the_form_that_is_filled_in_from_its_first_empty_field(
    chromium: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with bare_console(chromium, tmp_path_factory.mktemp("server"), "admin", viewport=PHONE) as page:
        for path, first in (("/act/alert_rule", "#name"), (HALT, "#reason")):
            loaded(page, path)
            expect(page.locator(first)).to_be_focused()
            expect(page.locator("header")).to_have_css("position", "static")
        page.locator("#reason").blur()
        expect(page.locator("header")).to_have_css("position", "sticky")
