"""The console as a process of its own, beside a real server that asks for tokens: who logs in, and who sees what."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import httpx
import pytest
from support.console import RunningConsole, Visitor, running_console
from support.harness import eventually
from support.secure_server import SecureServer, decide

from pretrade.client import credential_variables

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    with SecureServer(tmp_path_factory.mktemp("server"), "token").running() as server:
        yield server


@pytest.fixture(scope="module")
def console(server: SecureServer) -> Iterator[RunningConsole]:
    with running_console(environment(server), "--target", server.admin) as console:
        yield console


def environment(server: SecureServer) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PRETRADE_")}
    return clean | {credential_variables.CA: str(server.path("ca.pem"))}


@pytest.fixture
def visitor(console: RunningConsole) -> Iterator[Visitor]:
    with Visitor(console) as visitor:
        yield visitor


@pytest.fixture
def viewer(server: SecureServer, visitor: Visitor) -> Visitor:
    assert visitor.log_in(server.token("viewer", sub="vic")).status_code == 303
    return visitor


def test_nobody_sees_a_page_without_logging_in(visitor: Visitor) -> None:
    for path in ("/", "/overview/status", "/overview/hour.json"):
        answer = visitor.get(path)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login"), path
    part = visitor.get("/overview/status", **{"hx-request": "true"})
    assert part.headers["hx-redirect"] == "/login?ended=1"
    assert part.text == ""


def test_a_token_that_the_server_refuses_opens_nothing(server: SecureServer, visitor: Visitor) -> None:
    expired = server.token("operator", exp=1_000)
    for token, code in (("guess", 401), (expired, 401), (server.issuer.token("sam", ["nobody"]), 403)):
        answer = visitor.log_in(token)
        assert answer.status_code == code, answer.text
        assert token not in answer.text, "a page is kept in caches and screenshots"
        assert not visitor.cookies
    assert visitor.log_in("").status_code == 400


def test_the_overview_shows_the_server_to_a_viewer(server: SecureServer, viewer: Visitor) -> None:
    page = viewer.get("/").text
    assert "<b>vic</b> · viewer" in page
    status = viewer.part("/overview/status")
    assert re.search(r'id="trading-state">ACTIVE<', status)
    assert "primary does not answer" in status or "neither primary nor secondary answers" in status
    for name in ("BTCUSDT.SIM", "primary", "challenger", "shadow", "abstain"):
        assert name in status
    assert "Nothing was changed yet" in viewer.part("/overview/changes") or "initial" in viewer.part(
        "/overview/changes"
    )


def test_the_last_hour_is_that_of_the_audit(server: SecureServer, viewer: Visitor) -> None:
    with server.channel(server.decision) as channel:
        for _ in range(3):
            decide(channel, server.token("trader"))

    def hour() -> str:
        return viewer.part("/overview/hour")

    def shown(text: str) -> int:
        return int(re.findall(r"From ([\d,]+) decisions", text)[0])

    text = eventually(hour, lambda text: shown(text) >= 3)
    assert "100.00 %" in text, "all were answered in time"
    series = viewer.get("/overview/hour.json", **{"hx-request": "true"}).json()
    assert len(series["time"]) == len(series["p99_ms"]) == 60
    assert [value for value in series["p99_ms"] if value]


def test_every_answer_keeps_a_browser_to_the_consoles_own_files(visitor: Visitor) -> None:
    for path in ("/login", "/static/console.js", "/nowhere", "/"):
        headers = visitor.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
    page = visitor.get("/login").text
    assert not re.findall(r"<script(?! src=\"/static/)|<style|\sstyle=|\son\w+=|https?://", page)


def test_the_cookie_is_for_this_console_alone_and_for_no_script(server: SecureServer, visitor: Visitor) -> None:
    cookie = visitor.log_in(server.token("viewer")).headers["set-cookie"]
    assert re.match(r"pretrade=[\w-]{40,}; HttpOnly; Path=/; SameSite=strict$", cookie)


def test_another_site_cannot_use_a_persons_session(console: RunningConsole, viewer: Visitor) -> None:
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        with httpx.Client(base_url=console.url, cookies=viewer.cookies) as forged:
            answer = forged.post("/logout", data={"csrf": viewer.csrf}, headers=headers)
        assert answer.status_code == 403, headers
    token, viewer.csrf = viewer.csrf, "guess"
    assert viewer.post("/logout").status_code == 403
    viewer.csrf = token
    assert viewer.get("/").status_code == 200, "still logged in"


def test_a_name_of_somebody_elses_domain_leads_nowhere(visitor: Visitor) -> None:
    assert visitor.get("/login", host="rebound.example").status_code == 421
    assert visitor.get("/login", host="localhost:1").status_code == 200


def test_whoever_logs_out_is_out(viewer: Visitor) -> None:
    session = dict(viewer.cookies)
    assert viewer.post("/logout").status_code == 303
    viewer.cookies.update(session)
    assert viewer.get("/").status_code == 303, "the session is ended in the console, too"


def test_a_form_that_is_too_large_is_not_read(visitor: Visitor) -> None:
    assert visitor.post("/login", {"token": "x" * 100_000}).status_code == 413


def test_the_console_stops_when_it_is_told_to(server: SecureServer) -> None:
    with running_console(environment(server), "--target", server.admin) as console, Visitor(console) as visitor:
        assert visitor.log_in(server.token("viewer")).status_code == 303
        assert console.stop() == 0
