"""The page at /docs in a real browser, and what a web page can watch there: by `fetch` and by WebSocket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from playwright.sync_api import Page, expect, sync_playwright
from support.harness import INSTRUMENTS
from support.server_group import server_group

from local.stack.ports import free_ports
from pretrade.client import operator_token
from server.http.events import SUBPROTOCOL

pytestmark = [pytest.mark.stack, pytest.mark.long]
_PATIENCE_MS: Final = 60_000
_FIRST_MESSAGE: Final = """([url, protocols]) => new Promise((resolve) => {
    const socket = new WebSocket(url, protocols);
    socket.onmessage = ({ data }) => { resolve([socket.protocol, data]); socket.close(); };
    socket.onclose = ({ code, reason }) => resolve([`${code}`, reason]);
})"""


@pytest.fixture
def page(browser: str) -> Iterator[Page]:
    with sync_playwright() as playwright:
        # Its own sandbox needs what a container has not; the pages are ours.
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = started.new_page()
        page.set_default_timeout(_PATIENCE_MS)
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
        yield page
        started.close()
        assert wrong == []


def test_a_browser_decides_watches_and_stops_and_has_the_same_events_by_websocket(page: Page, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with server_group(tmp_path, 1, PRETRADE_GRPC__EDGE="envoy", PRETRADE_HTTP__PORT=str(port)) as group:
        token = operator_token.path_from(group.env).read_text().strip()
        page.goto(f"http://127.0.0.1:{port}/docs")
        status, answer = page.locator("#status"), page.locator("#answer")

        page.locator("#path").select_option("POST /v1/decide")
        body = page.locator("#body")
        body.fill(body.input_value().replace("BTCUSDT.BINANCE", INSTRUMENTS[0]))
        page.get_by_role("button", name="Send").click()
        expect(status).to_contain_text("HTTP 200, ", timeout=_PATIENCE_MS)
        decision_id = json.loads(answer.inner_text())["decision"]["decision_id"]

        page.locator("#path").select_option("GET /v1/decisions/events")
        page.locator("#token").fill(token)
        page.get_by_label("from_oldest").fill("true")
        page.get_by_label("filter.instruments").fill(INSTRUMENTS[0])
        page.get_by_role("button", name="Send").click()
        expect(answer).to_contain_text(decision_id, timeout=_PATIENCE_MS)
        page.get_by_role("button", name="Stop").click()
        expect(status).to_have_text("Stopped.", timeout=_PATIENCE_MS)

        url = f"ws://127.0.0.1:{port}/v1/decisions/events?from_oldest=true"
        agreed, message = page.evaluate(_FIRST_MESSAGE, [url, [SUBPROTOCOL, f"bearer.{token}"]])
        assert agreed == SUBPROTOCOL
        assert json.loads(message)["decision"]["packet"]["decision"]["decision_id"] == decision_id
        refused, _ = page.evaluate(_FIRST_MESSAGE, [url, [SUBPROTOCOL, "bearer.guessed"]])
        assert refused == "1006", "the handshake failed, and a browser says no more"
