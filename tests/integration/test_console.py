"""The console as a process of its own, beside a real server that asks for tokens: who logs in, and who sees what."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.console import RunningConsole, Visitor, clean_environment, running_console
from support.harness import INSTRUMENTS, eventually
from support.secure_server import SecureServer, bearer, decide
from support.server_group import server_group

from pretrade.client.cli.options import ADMIN_TARGET
from pretrade.console.acts import ACTS
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    with SecureServer(tmp_path_factory.mktemp("server"), "token").running() as server:
        yield server


@pytest.fixture(scope="module")
def console(server: SecureServer) -> Iterator[RunningConsole]:
    with running_console(clean_environment(server), "--target", server.admin) as console:
        yield console


@pytest.fixture
def visitor(console: RunningConsole) -> Iterator[Visitor]:
    with Visitor(console.url) as visitor:
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
    (anchor,) = set(re.findall(r'<a href="/runbook#([^"]+)">What to do</a>', status)[:1])
    assert f'id="{anchor}"' in viewer.get("/runbook").text, "what is wrong leads to what to do"
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


def test_a_trader_sees_nothing_of_what_a_viewers_calls_have_read(
    server: SecureServer, console: RunningConsole, viewer: Visitor
) -> None:
    decided(server, "secret")
    eventually(lambda: viewer.part("/overview/hour"), lambda text: "From 0 decisions" not in text)
    with Visitor(console.url) as trader:
        assert trader.log_in(server.token("trader", sub="tim")).status_code == 303
        for path in ("/overview/hour", "/overview/hour.json"):
            answer = trader.get(path, **{"hx-request": "true"})
            assert (answer.status_code, "Your role, trader, does not allow this." in answer.text) == (403, True), path
            assert "From" not in answer.text
        for path in ("/overview/status", "/overview/changes", "/decisions", "/models/live"):
            assert trader.get(path).status_code == 403, path
        page = trader.get("/").text
        assert "Your role, trader, does not allow you to see this server." in page
        for absent in ("/overview/", 'href="/decisions"', 'href="/models"'):
            assert absent not in page, "it is not offered"


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
    with (
        running_console(clean_environment(server), "--target", server.admin) as console,
        Visitor(console.url) as visitor,
    ):
        assert visitor.log_in(server.token("viewer")).status_code == 303
        assert console.stop() == 0


@pytest.fixture
def operator(server: SecureServer, console: RunningConsole) -> Iterator[Visitor]:
    with Visitor(console.url) as visitor:
        assert visitor.log_in(server.token("operator", sub="olga")).status_code == 303
        yield visitor


@pytest.fixture
def admin(server: SecureServer, console: RunningConsole) -> Iterator[Visitor]:
    with Visitor(console.url) as visitor:
        assert visitor.log_in(server.token("admin", sub="ada")).status_code == 303
        yield visitor


def trading_state(visitor: Visitor) -> str:
    (state,) = re.findall(r'id="trading-state">(\w+)<', visitor.part("/overview/status"))
    return str(state)


def previewed(visitor: Visitor, act: str, **fields: str) -> tuple[str, str]:
    """What would change, and the version that the page has the change bound to; empty for none."""
    answer = visitor.post(f"/act/{act}/preview", fields, **{"hx-request": "true"})
    assert answer.status_code == 200, answer.text
    version = re.findall(r'name="version" value="(\d+)"', answer.text)
    return answer.text, "".join(version)


def test_a_halt_takes_one_form_and_the_audit_names_who_did_it(operator: Visitor, viewer: Visitor) -> None:
    assert 'href="/act/trading_state?state=halted"' in operator.get("/").text
    page = operator.get("/act/trading_state?state=halted").text
    assert '<option value="halted" selected>HALTED</option>' in page
    text, version = previewed(operator, "trading_state", state="halted", span="1h")
    assert "trading_state: ACTIVE → HALTED" in text
    assert "BY THEMSELVES after 1h" in text
    assert not version, "a halt does not wait for what others change"
    assert trading_state(operator) == "ACTIVE", "nothing was changed yet"
    made = operator.post("/act/trading_state", {"state": "halted", "reason": "exchange incident", "span": "1h"})
    assert (made.status_code, made.headers["location"]) == (303, "/")
    assert "trading_state: ACTIVE → HALTED" in operator.get("/").text, "the page says what was done"
    assert "trading_state: ACTIVE → HALTED" not in operator.get("/").text, "once"
    assert trading_state(viewer) == "HALTED"
    assert "exchange incident" in viewer.part("/overview/status")
    text, version = previewed(operator, "trading_state", state="active")
    assert "Orders may trade again." in text
    operator.post("/act/trading_state", {"state": "active", "reason": "it is over", "version": version})
    assert trading_state(viewer) == "ACTIVE"
    changes = eventually(lambda: viewer.part("/overview/changes"), lambda text: "it is over" in text)
    assert changes.count("<td>olga</td>") == 2


def test_what_a_role_may_not_do_is_not_offered_and_refused_if_tried(
    server: SecureServer, viewer: Visitor, operator: Visitor
) -> None:
    assert "/act/" not in viewer.get("/").text + viewer.part("/overview/status")
    assert "/act/chain" not in operator.part("/overview/status")
    assert "/act/breaker" in operator.part("/overview/status")
    for act in ACTS:
        assert viewer.get(f"/act/{act}").status_code == 403
        assert viewer.post(f"/act/{act}/preview", {"state": "halted"}).status_code == 403
    tried = viewer.post("/act/trading_state", {"state": "halted", "reason": "may I?"})
    assert tried.status_code == 403
    assert "PERMISSION_DENIED" in tried.text
    assert trading_state(viewer) == "ACTIVE"
    assert operator.post("/act/chain", {"stage0": "rules", "reason": "may I?"}).status_code == 403
    eventually(server.refusals, lambda found: {"vic", "olga"} <= {one.caller for one in found})


def test_a_change_is_made_as_it_was_shown_or_not_at_all(operator: Visitor, admin: Visitor) -> None:
    _, version = previewed(operator, "flag", flag="shadow", value="off")
    assert admin.post("/act/flag", {"flag": "cached_score", "value": "off", "reason": "first"}).status_code == 303
    late = operator.post("/act/flag", {"flag": "shadow", "value": "off", "reason": "later", "version": version})
    assert late.status_code == 409
    assert "nothing was changed" in late.text
    assert 'value="later"' in late.text, "what was typed is still there"
    assert admin.post("/act/flag", {"flag": "cached_score", "value": "on", "reason": "back"}).status_code == 303


def test_breakers_drains_flags_and_the_chain_are_set_for_a_time(operator: Visitor, admin: Visitor) -> None:
    steps = [
        (operator, "breaker", {"replica": "primary", "mode": "forced_open", "span": "10m"}, "FORCED_OPEN"),
        (operator, "breaker", {"replica": "primary", "mode": "automatic"}, "primary"),
        (operator, "drain", {"replica": "secondary", "span": "10m"}, "DRAINED"),
        (operator, "resume", {"replica": "secondary"}, "secondary"),
        (operator, "flag", {"flag": "shadow", "value": "off", "span": "10m"}, "m 5\\d s yet"),
        (operator, "flag", {"flag": "shadow", "value": "on"}, "shadow"),
        (admin, "chain", {"stage0": "rules", "stage1": "model"}, "rules → model → abstain"),
        (admin, "chain", {}, "model → embedded → cached_score → rules → abstain"),
    ]
    for who, act, fields, shown in steps:
        made = who.post(f"/act/{act}", {**fields, "reason": "drill"})
        assert made.status_code == 303, made.text
        assert re.search(shown, who.part("/overview/status")), (act, fields)
    risky, _ = previewed(operator, "breaker", replica="primary", mode="forced_open")
    assert "No champion is left then" in risky


def test_an_alert_rule_is_set_changed_and_deleted_and_the_audit_names_who_did_it(
    operator: Visitor, viewer: Visitor
) -> None:
    fields = {"name": "twap-trades", "condition": "TRADE", "strategy": "twap", "threshold": "0.9", "severity": "page"}
    assert "/act/alert_rule" in operator.get("/alerts").text
    assert "There are none" in operator.part("/alerts/rules")
    text, version = previewed(operator, "alert_rule", **fields)
    assert "+ twap-trades: TRADE share of strategy twap above 0.9 (page)" in text
    assert "There are none" in operator.part("/alerts/rules"), "nothing was set yet"
    made = operator.post("/act/alert_rule", {**fields, "reason": "picky", "version": version})
    assert (made.status_code, made.headers["location"]) == (303, "/alerts")
    shown = viewer.part("/alerts/rules")
    assert "TRADE share of strategy twap over 300 s is above 0.9" in shown
    assert "/act/" not in shown + viewer.get("/alerts").text, "a viewer is offered nothing"
    (change,) = re.findall(r'href="(/act/alert_rule\?[^"]+)"', operator.part("/alerts/rules"))
    form = operator.get(unescape(change)).text
    for name, value in {"name": "twap-trades", "strategy": "twap", "window": "5m", "threshold": "0.9"}.items():
        assert re.search(rf'name="{name}"[^>]* value="{value}"', form), name
    assert '<option value="page" selected>' in form
    text, version = previewed(operator, "alert_rule", **fields | {"threshold": "0.8"})
    assert "- twap-trades: TRADE share of strategy twap above 0.9 (page)" in text
    assert "+ twap-trades: TRADE share of strategy twap above 0.8 (page)" in text
    changed = operator.post("/act/alert_rule", {**fields, "threshold": "0.8", "reason": "pickier", "version": version})
    assert changed.status_code == 303, changed.text
    refused = viewer.post("/act/alert_rule_delete", {"name": "twap-trades", "reason": "may I?"})
    assert (refused.status_code, "PERMISSION_DENIED" in refused.text) == (403, True)
    text, version = previewed(operator, "alert_rule_delete", name="twap-trades")
    assert "Nobody is told of this any more." in text
    gone = operator.post("/act/alert_rule_delete", {"name": "twap-trades", "reason": "too loud", "version": version})
    assert gone.status_code == 303, gone.text
    assert "There are none" in viewer.part("/alerts/rules")
    changes = eventually(lambda: viewer.part("/overview/changes"), lambda text: "too loud" in text)
    for why in ("picky", "pickier", "too loud"):
        assert re.search(rf"<td>olga</td>\s*<td>{why}</td>", changes), why


@pytest.mark.parametrize(
    ("act", "fields", "said"),
    [
        ("alert_rule", {"name": "Loud", "condition": "TRADE", "threshold": "0.9", "reason": "x"}, "lower-case letters"),
        ("alert_rule", {"name": "loud", "condition": "TRADE", "threshold": "9", "reason": "x"}, "from 0 to 1"),
        ("alert_rule", {"name": "loud", "condition": "feature", "threshold": "9", "reason": "x"}, "Feature: one must"),
        ("alert_rule_delete", {"name": "nobodys", "reason": "x"}, "there is no alert rule"),
        ("trading_state", {"state": "asleep", "reason": "x"}, "State: one of active, reducing, halted"),
        ("trading_state", {"state": "halted"}, "Say why"),
        ("trading_state", {"state": "halted", "reason": "x" * 300}, "at most 256 characters"),
        ("trading_state", {"state": "halted", "reason": "x", "span": "soon"}, "like 90s, 10m, 2h or 1d"),
        ("trading_state", {"state": "halted", "reason": "x", "span": "30d"}, "INVALID_ARGUMENT"),
        ("breaker", {"mode": "automatic", "reason": "x"}, "Replica: one must be chosen"),
        ("breaker", {"replica": "tertiary", "mode": "automatic", "reason": "x"}, "NOT_FOUND"),
    ],
)
def test_a_form_that_cannot_be_carried_out_says_why(
    operator: Visitor, act: str, fields: dict[str, str], said: str
) -> None:
    answer = operator.post(f"/act/{act}", fields)
    assert 400 <= answer.status_code < 500
    assert said in answer.text


def test_nothing_is_changed_by_a_form_of_another_session(operator: Visitor, admin: Visitor) -> None:
    operator.csrf = admin.csrf
    answer = operator.post("/act/trading_state", {"state": "halted", "reason": "forged"})
    assert answer.status_code == 403
    assert trading_state(operator) == "ACTIVE"


@pytest.mark.long  # two servers start; tests/unit/console/pages/test_login.py has the link alone
def test_the_link_logs_in_once_and_outlives_a_restart_of_the_server(tmp_path: Path) -> None:
    """The operator token is another one after each start; the session reads it where the command line does."""
    with server_group(tmp_path, 1) as group:
        settings = {**group.env, ADMIN_TARGET: f"127.0.0.1:{group.env['PRETRADE_ADMIN__PORT']}"}
        with running_console(settings) as console, Visitor(console.url) as visitor:
            assert console.ticket is not None
            assert "Your name" in visitor.get(f"/login?ticket={console.ticket}").text
            assert visitor.post("/login", {"ticket": console.ticket}).status_code == 400, "who is it?"
            assert visitor.post("/login", {"ticket": console.ticket, "name": "ann"}).status_code == 303
            with Visitor(console.url) as other:
                assert other.post("/login", {"ticket": console.ticket, "name": "eve"}).status_code == 400
            visitor.get("/")
            assert visitor.post("/act/flag", {"flag": "shadow", "value": "off", "reason": "x"}).status_code == 303
            assert group.stop() == 0
            away = visitor.get("/overview/status", **{"hx-request": "true"})
            assert away.status_code in (502, 503, 504)
            assert "cannot be reached" in away.text or "did not answer" in away.text
            ports = {name: value for name, value in group.env.items() if name.endswith("__PORT")}
            with server_group(tmp_path, 1, **ports):
                changes = eventually(lambda: changes_of(visitor), lambda text: "shadow" in text)
                assert "<td>ann</td>" in changes


def changes_of(visitor: Visitor) -> str:
    return visitor.get("/overview/changes", **{"hx-request": "true"}).text


def decided(server: SecureServer, strategy: str, count: int = 1) -> list[str]:
    """Ids of new decisions."""
    with server.channel(server.decision) as channel:
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        found = []
        for _ in range(count):
            order = pb.Order(instrument=INSTRUMENTS[1], side=pb.SIDE_SELL, quantity=2.5, strategy=strategy)
            answer = stub.Decide(pb.DecideRequest(order=order), timeout=5.0, metadata=bearer(server.token("trader")))
            found.append(answer.decision.decision_id)
    return found


def ids_on(text: str) -> list[str]:
    return re.findall(r'<a href="/decisions/([0-9a-f-]{36})">', text)


def test_a_search_finds_what_its_filter_says_page_by_page(server: SecureServer, viewer: Visitor) -> None:
    made = decided(server, "paged", 60)
    first = eventually(
        lambda: viewer.get("/decisions?strategy=paged&last=1h").text, lambda text: len(ids_on(text)) == 50
    )
    assert ids_on(first) == made[:9:-1], "the newest first"
    (older,) = re.findall(r'<a class="button" href="([^"]+)" rel="next">', first)
    assert ids_on(viewer.get(unescape(older)).text) == made[9::-1]
    for query in ("heard=trade", "source=primary", f"instrument={INSTRUMENTS[0]}", "model=champion", "strategy=other"):
        assert not set(ids_on(viewer.get(f"/decisions?{query}").text)) & set(made), query
    found = viewer.get(f"/decisions?instrument={INSTRUMENTS[0]},{INSTRUMENTS[1]}&strategy=paged&source=none")
    assert ids_on(found.text)[0] == made[-1]


@pytest.mark.parametrize(
    ("query", "said"),
    [("last=soon", "like 10m, 2h or 1d"), ("heard=shout", "Heard: one of trade"), ("since=x", "Since: nanoseconds")],
)
def test_a_filter_that_makes_no_sense_says_which_field(viewer: Visitor, query: str, said: str) -> None:
    answer = viewer.get(f"/decisions?{query}")
    assert answer.status_code == 400
    assert said in answer.text


def test_one_decision_is_shown_with_its_ledger_and_replayed(server: SecureServer, viewer: Visitor) -> None:
    (made,) = decided(server, '"><b>bold</b>')
    page = eventually(lambda: viewer.get(f"/decisions/{made}"), lambda answer: answer.status_code == 200).text
    assert "<b>bold</b>" not in page, "what a caller wrote is no markup"
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    for shown in (made, INSTRUMENTS[1], "sell", "2.5", "at the market", "ABSTAIN", "GUARDS", "<svg"):
        assert shown in page, shown
    replayed = viewer.part(f"/decisions/{made}/replay")
    assert "Equal: every field" in replayed, replayed
    assert "class=" in viewer.part(f"/decisions/{made}/explanation"), "no model scored it, which is said"
    missing = viewer.get("/decisions/01a2051f-c1a7-7003-b3fc-000000000000")
    assert missing.status_code == 404
    assert "NOT_FOUND" in missing.text


def test_new_decisions_appear_by_themselves(server: SecureServer, viewer: Visitor) -> None:
    with viewer.stream("/decisions/tail?strategy=watched") as events:
        assert next(events)[0] == "begun"
        seen = set[str]()
        for _ in range(3):  # until the watch has begun, nothing is promised
            wanted = set(decided(server, "watched", 2))
            decided(server, "unwatched")
            name, batch = next(events)
            assert name == "rows"
            seen |= set(ids_on(batch["rows"]))
            if wanted <= seen:
                break
        assert "unwatched" not in batch["rows"]
        assert seen


def test_a_console_that_stops_ends_its_live_pages(server: SecureServer) -> None:
    with (
        running_console(clean_environment(server), "--target", server.admin) as console,
        Visitor(console.url) as visitor,
    ):
        assert visitor.log_in(server.token("viewer")).status_code == 303
        with visitor.stream("/decisions/tail") as events:
            assert next(events)[0] == "begun"
            console.process.send_signal(signal.SIGTERM)
            assert next(events) == ("ended", {"why": "The console stops."})
        assert console.process.wait(30) == 0


def test_the_models_page_shows_what_the_server_has(viewer: Visitor, operator: Visitor, admin: Visitor) -> None:
    assert "Roll back" not in viewer.get("/models").text
    assert "/act/roll_back" in operator.get("/models").text
    shown = viewer.part("/models/live")
    assert "There is no canary" in shown
    assert "this server has no model store" in shown
    assert "<h2>Drift</h2>" in shown
    card = viewer.get(f"/models/{'ab' * 8}")
    assert (card.status_code, "this server has no model store" in card.text) == (409, True)
    assert "/act/canary_start" not in operator.get("/models").text, "an admin's"
    assert "/act/canary_start" in admin.get("/models").text
    form = admin.get("/act/canary_start")
    assert (form.status_code, "this server has no model store" in form.text) == (409, True)


def test_a_market_without_bars_says_what_to_switch_on_and_shows_decisions_all_the_same(
    server: SecureServer, viewer: Visitor, console: RunningConsole
) -> None:
    assert f'<option value="{INSTRUMENTS[0]}" selected>' in viewer.get("/market").text
    (decision_id,) = decided(server, "by-eye")
    path = f"/market/chart.json?instrument={INSTRUMENTS[1]}"

    def chart() -> dict[str, Any]:
        found: dict[str, Any] = viewer.get(path, **{"hx-request": "true"}).json()
        return found

    found = eventually(chart, lambda found: decision_id in found["rows"])
    assert "`pretrade up --bars` keeps them" in found["problem"]
    assert (found["time"], found["newest"], found["missing"]) == ([], "", "")
    assert "Redis, where feature workers publish books, does not answer" in viewer.part(
        f"/market/book?instrument={INSTRUMENTS[1]}"
    )
    with Visitor(console.url) as trader:
        assert trader.log_in(server.token("trader", sub="tim")).status_code == 303
        for refused in ("/market", path, f"/market/book?instrument={INSTRUMENTS[1]}"):
            assert trader.get(refused).status_code == 403, refused
        assert 'href="/market"' not in trader.get("/").text
