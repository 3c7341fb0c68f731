"""The console in a real browser, against a server with real model servers; it makes the pictures docs/console-*.png.

`TEST_CONSOLE=docs` writes the pictures of the docs, on a machine without other work.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from support.console import RunningConsole, running_console
from support.harness import Product, eventually
from support.secure_server import SecureServer

from pretrade.admin.v1 import admin_pb2
from pretrade.client import credential_variables

pytestmark = [pytest.mark.stack, pytest.mark.long]

ROOT: Final = Path(__file__).parents[2]
PATIENCE_MS: Final = 60_000
DESKTOP: Final = {"width": 1366, "height": 768}
PHONE: Final = {"width": 390, "height": 844}
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def chromium(browser: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Its own sandbox needs what a container has not; the pages are ours.
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def opened(chromium: Browser, console: RunningConsole, **options: Any) -> Iterator[Page]:
    """A page of a browser that nobody used before; nothing of it may go wrong in silence."""
    context = chromium.new_context(base_url=console.url, viewport=options.pop("viewport", DESKTOP), **options)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    yield page
    context.close()
    assert not wrong


def log_in(page: Page, token: str, name: str = "") -> None:
    page.goto("/")
    page.get_by_label("Token").fill(token)
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Log in").click()
    expect(page.locator("#trading-state")).to_be_visible()


def picture(page: Page, name: str, directory: Path, *, whole: bool = True) -> None:
    """Takes a picture; into docs/ if the run was asked for that."""
    where = ROOT / "docs" if os.environ.get("TEST_CONSOLE") == "docs" else directory
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=where / f"console-{name}.png", full_page=whole)


@pytest.fixture
def console(product: Product) -> Iterator[RunningConsole]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PRETRADE_")}
    with running_console(clean, "--target", str(product.stack.endpoints.admin)) as console:
        yield console


@pytest.fixture
def token(product: Product) -> str:
    file = product.stack.endpoints.operator_token_file
    assert file is not None
    return Path(file).read_text().strip()


def test_on_call_sees_that_all_is_well_halts_resumes_and_finds_out_who_did_it(
    product: Product, console: RunningConsole, token: str, chromium: Browser, tmp_path: Path
) -> None:
    for _ in range(50):
        product.decide()
    with opened(chromium, console) as page:
        log_in(page, token, "ann")
        expect(page.get_by_text("All is well")).to_be_visible()
        expect(page.locator("#hour")).to_contain_text("100.00 %")
        expect(page.locator("#hour")).to_contain_text("PRIMARY")
        expect(page.locator(".chart canvas").first).to_be_visible()
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
        assert product.status().trading_state == admin_pb2.TRADING_STATE_HALTED

        page.get_by_role("link", name="Resume trading").click()
        expect(page.locator("#preview")).to_contain_text("Orders may trade again.")
        page.get_by_label("Why").fill("the exchange is well again")
        page.locator("#make").click()
        expect(page.locator("#trading-state")).to_have_text("ACTIVE")
        row = page.locator("#changes tr", has_text="the exchange is well again")
        expect(row).to_contain_text("ann")


def test_every_act_is_made_with_the_keyboard_alone(
    product: Product, console: RunningConsole, token: str, chromium: Browser
) -> None:
    def act(path: str, expected: str) -> None:
        page.goto(path)
        expect(page.locator("#preview li")).to_have_count(1)
        page.get_by_label("Why").press_sequentially("drill")  # it has the focus
        page.keyboard.press("Enter")
        expect(page.locator("#parts")).to_contain_text(expected)

    with opened(chromium, console) as page:
        log_in(page, token, "ann")
        act("/act/breaker?replica=primary&mode=forced_open", "FORCED_OPEN")
        act("/act/breaker?replica=primary&mode=automatic", "CLOSED")
        act("/act/drain?replica=secondary", "DRAINED")
        act("/act/resume?replica=secondary", "Drain")
        act("/act/flag?flag=shadow&value=off", "Turn on")
        act("/act/flag?flag=shadow&value=on", "Turn off")
        act("/act/chain?stage0=rules&stage1=&stage2=&stage3=", "rules → abstain")
        act("/act/chain?stage0=&stage1=&stage2=&stage3=", "model → ")


def test_decisions_are_watched_searched_and_explained(
    product: Product, console: RunningConsole, token: str, chromium: Browser, tmp_path: Path
) -> None:
    with opened(chromium, console, color_scheme="dark") as page:
        log_in(page, token, "ann")
        page.get_by_role("link", name="Decisions").click()
        page.get_by_role("button", name="Watch live").click()
        expect(page.locator("#live")).to_contain_text("Live")

        def rows() -> int:
            product.decide(strategy="by-eye")
            return page.locator("#rows tr", has_text="by-eye").count()

        eventually(rows, lambda found: found > 3)
        page.get_by_role("button", name="Stop").click()
        page.get_by_label("Strategy").fill("by-eye")
        page.get_by_role("button", name="Search").click()
        expect(page.locator("#rows tr").first).to_contain_text("PRIMARY")
        picture(page, "decisions", tmp_path, whole=False)
        page.locator("#rows a").first.click()
        expect(page.locator(".ledger svg").first).to_be_visible()
        page.get_by_role("button", name="Recompute").click()
        expect(page.locator("#replay")).to_contain_text(re.compile("Equal|FAILED_PRECONDITION"))
        picture(page, "decision", tmp_path)


def test_pages_fit_a_phone(
    product: Product, console: RunningConsole, token: str, chromium: Browser, tmp_path: Path
) -> None:
    with opened(chromium, console, viewport=PHONE) as page:
        log_in(page, token, "ann")
        expect(page.locator("#parts table").first).to_be_visible()
        picture(page, "phone", tmp_path, whole=False)
        for path in ("/", "/decisions", "/act/trading_state?state=halted", "/act/chain"):
            page.goto(path)
            if path == "/":
                expect(page.locator("#parts table").first).to_be_visible()
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= PHONE["width"], f"{path} is {width} pixels wide"


def test_a_viewer_is_offered_nothing_and_refused(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    with SecureServer(tmp_path_factory.mktemp("server"), "token").running() as server:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PRETRADE_")}
        settings = clean | {credential_variables.CA: str(server.path("ca.pem"))}
        with running_console(settings, "--target", server.admin) as console, opened(chromium, console) as page:
            log_in(page, server.token("viewer", sub="vic"))
            expect(page.locator("#parts table").first).to_be_visible()
            assert page.locator('a[href^="/act/"]').count() == 0
            page.goto("/act/trading_state?state=halted")
            expect(page.get_by_role("alert")).to_contain_text("Your role, viewer, does not allow this.")
            page.goto("/")
            page.get_by_role("button", name="Log out").click()
            expect(page.get_by_label("Token")).to_be_visible()
