"""JSON over HTTP: one suite for the HTTP port, on both edges, and for Envoy's decision port."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import httpx
import pytest
from support.harness import INSTRUMENTS, eventually
from support.server_group import EDGES, Group, reply_statuses, server_group
from websockets import InvalidStatus, Subprotocol
from websockets.sync.client import connect

from local.stack.ports import free_ports
from pretrade.client import operator_token
from server.http import examples, openapi
from server.http.document import FILE
from server.http.events import SUBPROTOCOL
from server.journal.reply_status import REPLIED

pytestmark = pytest.mark.stack
DECIDE: Final = "/pretrade.decision.v1.DecisionService/Decide"
_MAX_BYTES: Final = 1_048_576
_PATIENCE_SECONDS: Final = 60.0
_PROBLEM: Final = "application/problem+json"
_ORIGIN: Final = "https://desk.example.com"


@dataclass
class Served:
    """A server, and the port on which it speaks JSON."""

    group: Group
    url: str
    of_all_services: bool

    @property
    def shown(self) -> dict[str, str]:
        """What shows the operator token."""
        token = operator_token.path_from(self.group.env).read_text().strip()
        return {"authorization": f"Bearer {token}"}

    def wait_for_watchers(self, count: int) -> None:
        eventually(lambda: self.group.metric("pretrade_decision_watchers"), lambda watchers: watchers == count)


@pytest.fixture(scope="module", params=["http port", "http port beside envoy", "envoy"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    (port,) = free_ports(1)
    settings = {
        "PRETRADE_GRPC__EDGE": "envoy" if "envoy" in request.param else "grpcio",
        "PRETRADE_GRPC__READ_SECONDS": "0.5",
        "PRETRADE_HTTP__CORS_ORIGINS": json.dumps([_ORIGIN]),
    }
    if request.param != "envoy":
        settings["PRETRADE_HTTP__PORT"] = str(port)
    with server_group(tmp_path_factory.mktemp("http"), 1, **settings) as group:
        at = group.decision if request.param == "envoy" else f"127.0.0.1:{port}"
        yield Served(group, f"http://{at}", request.param != "envoy")


@pytest.fixture
def web(served: Served) -> Iterator[httpx.Client]:
    # The process that reads the audit starts with the first question, which takes long on a machine with other work.
    with httpx.Client(base_url=served.url, timeout=_PATIENCE_SECONDS) as web:
        yield web


def order(ref: str, **changes: Any) -> dict[str, Any]:
    sound = {"order_ref": ref, "instrument": INSTRUMENTS[0], "side": "buy", "quantity": 1, "strategy": "t"}
    return sound | changes


@pytest.mark.parametrize("path", [DECIDE, "/v1/decide"])
def test_an_order_is_decided_audited_and_heard(served: Served, web: httpx.Client, path: str) -> None:
    decided = web.post(path, json={"order": order(path)}, headers={"grpc-timeout": "2S"})
    assert (decided.status_code, decided.headers["content-type"]) == (200, "application/json")
    decision = decided.json()["decision"]
    assert (decision["order_ref"], decision["action"]) == (path, "ACTION_ABSTAIN")
    statuses = eventually(lambda: reply_statuses(served.group), lambda found: path in found)
    assert statuses[path] == REPLIED


def test_a_batch_has_a_result_for_each_order(web: httpx.Client) -> None:
    batch = web.post("/v1/decide:batch", json={"orders": [order("a"), order("b", quantity=-1)]}).json()["results"]
    assert ["decision" in result for result in batch] == [True, False]
    assert batch[1]["error"]["reason"] == "INVALID_QUANTITY"


def test_the_same_key_gets_the_same_decision(web: httpx.Client) -> None:
    asked = {"order": order("k", idempotency_key="one")}
    first, second = (web.post("/v1/decide", json=asked).json()["decision"]["decision_id"] for _ in range(2))
    assert first == second
    other = web.post("/v1/decide", json={"order": order("k", idempotency_key="one", quantity=2)})
    assert (other.status_code, other.json()["reason"]) == (409, "IDEMPOTENCY_KEY_REUSED")


def test_the_header_grpc_timeout_is_the_deadline_and_the_cap_holds(web: httpx.Client) -> None:
    def allowed(timeout: str) -> int:
        answer = web.post("/v1/decide", json={"order": order("t")}, headers={"grpc-timeout": timeout})
        return int(answer.json()["decision"]["budget"]["allowed_us"])

    assert allowed("900m") <= 900_000
    assert allowed("20S") == 1_500_000, "the server's cap"


def test_a_compressed_request_is_read(web: httpx.Client) -> None:
    zipped = gzip.compress(json.dumps({"order": order("z")}).encode())
    answer = web.post("/v1/decide", content=zipped, headers={"content-encoding": "gzip"})
    assert answer.json()["decision"]["order_ref"] == "z"


def test_health_and_version_are_for_everybody(web: httpx.Client) -> None:
    assert web.get("/health").json() == {"status": "SERVING"}
    assert web.head("/health").status_code == 200
    assert set(web.get("/version").json()) == {"version", "contract"}
    assert web.post("/grpc.health.v1.Health/Check", json={}).json() == {"status": "SERVING"}


def test_the_openapi_document_describes_what_is_on_this_port(served: Served, web: httpx.Client) -> None:
    described = web.get("/openapi.json").json()
    whole = json.loads(FILE.read_text())["paths"]
    ours = {
        path for path in whole if served.of_all_services or not path.startswith(("/pretrade.a", "/models", "/signals"))
    }
    if not served.of_all_services:
        ours -= {"/v1/decisions/events", "/v1/signals/events"}
    assert set(described["paths"]) == ours
    for path in described["paths"]:
        assert web.options(path).status_code == 204
        assert web.options(path).headers["allow"].partition(",")[0].lower() in described["paths"][path]


def test_the_page_to_try_it_takes_everything_from_this_port_and_runs_no_other_script(web: httpx.Client) -> None:
    page = web.get("/docs")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    taken = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert taken == ["/docs/try.js", "/openapi.json"]
    for path in taken:
        assert web.get(path).status_code == 200
    script = web.get("/docs/try.js")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    for answer in (page, script):
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?! src)|<style|\s(style|on\w+)=", page.text), "the policy would refuse it"
    assert set(re.findall(r'at\("(\w+)"\)', script.text)) <= set(re.findall(r'id="(\w+)"', page.text))


def visited(served: Served, path: str, body: str = "", token: str = "", **fields: str) -> dict[str, Any]:
    """What the page shows to somebody who sends this."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    command = [node, str(Path(__file__).parents[1] / "try_page/visitor.js"), served.url, path, body, token]
    command.append(json.dumps({name.replace("__", "."): value for name, value in fields.items()}))
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=True)
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown


def test_the_page_sends_what_is_typed_and_shows_the_answer(served: Served) -> None:
    shown = visited(served, "POST /v1/decide", json.dumps({"order": order("typed")}))
    assert shown["status"].startswith("HTTP 200, ")
    assert json.loads(shown["answer"])["decision"]["order_ref"] == "typed"
    assert shown["offered"][:2] == ["POST /v1/decide", "POST /v1/decide:batch"]
    (_, first), *_ = examples.REQUESTS[DECIDE].values()
    assert json.loads(shown["example"]) == first
    refused = visited(served, "POST /v1/decide", "{")
    assert refused["status"].startswith("HTTP 400, ")
    assert json.loads(refused["answer"])["reason"] == "MALFORMED_REQUEST"
    if served.of_all_services:
        token = served.shown["authorization"].removeprefix("Bearer ")
        status = visited(served, "POST /pretrade.admin.v1.AdminService/GetStatus", token=token)
        assert json.loads(status["answer"])["ready"] is True


@pytest.mark.long
def test_the_page_has_fields_for_path_and_query_and_shows_events(served: Served, web: httpx.Client) -> None:
    if not served.of_all_services:
        return
    token = served.shown["authorization"].removeprefix("Bearer ")
    one = visited(served, "GET /signals/{instrument}", token=token, instrument=INSTRUMENTS[1])
    assert one["fields"] == ["instrument"]
    assert [signal["instrument"] for signal in json.loads(one["answer"])["signals"]] == [INSTRUMENTS[1]]
    several = visited(served, "GET /signals", token=token, instruments=f"{INSTRUMENTS[1]}, {INSTRUMENTS[0]}")
    assert [signal["instrument"] for signal in json.loads(several["answer"])["signals"]] == [*INSTRUMENTS[::-1]]
    assert web.post("/v1/decide", json={"order": order("tried", strategy="tried")}).status_code == 200
    watched = visited(served, "GET /v1/decisions/events", token=token, from_oldest="true", filter__strategies="tried")
    assert watched["status"] == "Stopped."
    assert '"order_ref":"tried"' in watched["answer"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (path, name)
        for path in (DECIDE, f"{DECIDE}Batch", "/pretrade.audit.v1.AuditService/ListDecisions")
        for name in examples.REQUESTS[path]
    ],
)
def test_an_example_of_the_openapi_document_is_answered(
    served: Served, web: httpx.Client, path: str, name: str
) -> None:
    _, request = examples.REQUESTS[path][name]
    body = json.dumps(request).replace("BTCUSDT.BINANCE", INSTRUMENTS[0])
    answer = web.post(path, content=body, headers=served.shown)
    if not (served.of_all_services or path.startswith("/pretrade.decision.")):
        assert answer.status_code == 404, "no path of this port"
        return
    assert answer.status_code == 200, answer.text
    assert all("decision" in result for result in answer.json().get("results", ()))


@pytest.mark.parametrize("field", openapi.REQUIRED["pretrade.decision.v1.Order"])
def test_a_field_that_the_openapi_document_requires_is_required(web: httpx.Client, field: str) -> None:
    without = {name: value for name, value in order("without").items() if name != field}
    assert web.post("/v1/decide", json={"order": order("with")}).status_code == 200
    assert web.post("/v1/decide", json={"order": without}).json()["code"] == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("call", "http_status", "reason"),
    [
        ({"json": {"order": {"quantity": -1}}}, 400, "UNKNOWN_INSTRUMENT"),
        ({"json": {"order": {"limit_prize": 1}}}, 400, "UNKNOWN_FIELD"),
        ({"json": {"order": {"side": "by"}}}, 400, "UNKNOWN_ENUM_VALUE"),
        ({"content": "{"}, 400, "MALFORMED_REQUEST"),
        ({}, 400, "MISSING_REQUEST"),
        ({"json": {}, "headers": {"grpc-timeout": "soon"}}, 400, "PROTOCOL_ERROR"),
        ({"json": {}, "headers": {"grpc-timeout": "0S"}}, 504, "DEADLINE_EXPIRED"),
        ({"json": {}, "params": {"limit_price": 1}}, 400, "QUERY_STRING"),
        ({"content": "{}", "headers": {"content-encoding": "br"}}, 415, "UNSUPPORTED_ENCODING"),
        ({"content": b" " * (_MAX_BYTES + 1)}, 413, "MESSAGE_TOO_LARGE"),
        ({"url": "/v1/decide:batch", "json": {"orders": []}}, 400, "BATCH_SIZE"),
        ({"url": "/pretrade.decision.v1.DecisionService/DecideStream", "json": {}}, 400, "STREAM_IN_JSON"),
        ({"url": "/pretrade.decision.v1.DecisionService/Guess", "json": {}}, 404, "UNKNOWN_METHOD"),
        ({"url": "/", "method": "GET"}, 404, "UNKNOWN_METHOD"),
        ({"method": "GET"}, 405, "METHOD_NOT_ALLOWED"),
        ({"json": {}, "headers": {"origin": "https://elsewhere.example"}}, 403, "ORIGIN_NOT_ALLOWED"),
    ],
)
def test_every_error_is_a_problem_and_counted_once(
    served: Served, web: httpx.Client, call: dict[str, Any], http_status: int, reason: str
) -> None:
    before = served.group.metric("pretrade_errors_total", reason=reason)
    answer = web.request(**{"method": "POST", "url": "/v1/decide", **call})
    assert (answer.status_code, answer.headers["content-type"]) == (http_status, _PROBLEM), answer.text
    problem = answer.json()
    assert (problem["status"], problem["reason"]) == (http_status, reason)
    assert problem["type"] == f"urn:pretrade:reason:{reason}"
    assert problem["title"]
    assert problem["detail"]
    assert served.group.metric("pretrade_errors_total", reason=reason) == before + 1


def test_a_misspelt_limit_price_decides_nothing(served: Served, web: httpx.Client) -> None:
    refused = web.post("/v1/decide", json={"order": order("misspelt", limit_prize=60_000)})
    assert (refused.status_code, refused.json()["detail"]) == (
        400,
        "order.limit_prize: there is no such field; did you mean limit_price?",
    )
    assert web.post("/v1/decide", json={"order": order("spelt")}).status_code == 200
    assert "misspelt" not in eventually(lambda: reply_statuses(served.group), lambda found: "spelt" in found)


def test_a_body_that_does_not_come_is_not_waited_for(served: Served) -> None:
    host, _, port = served.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10.0) as caller:
        caller.sendall(b"POST /v1/decide HTTP/1.1\r\nhost: here\r\ncontent-length: 100\r\n\r\n{")
        answer = b""
        while b"REQUEST_TOO_SLOW" not in answer:
            piece = caller.recv(65_536)
            assert piece, answer
            answer += piece
    assert answer.startswith(b"HTTP/1.1 504 "), answer


def test_a_caller_who_leaves_leaves_nothing_under_way(served: Served, web: httpx.Client) -> None:
    host, _, port = served.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10.0) as caller:
        caller.sendall(b"POST /v1/decide HTTP/1.1\r\nhost: here\r\ncontent-length: 100\r\n\r\n{")
    asked = json.dumps({"orders": [order(f"gone-{number}") for number in range(64)]}).encode()
    for _ in range(20):
        with socket.create_connection((host, int(port)), timeout=10.0) as caller:
            head = f"POST /v1/decide:batch HTTP/1.1\r\nhost: here\r\ncontent-length: {len(asked)}\r\n\r\n"
            caller.sendall(head.encode() + asked)
    eventually(lambda: served.group.metric("pretrade_in_flight"), lambda count: count == 0)
    eventually(lambda: served.group.metric("pretrade_replies_owed"), lambda count: count == 0)
    assert web.get("/health").status_code == 200


def test_a_page_of_an_allowed_origin_may_call_and_read(web: httpx.Client) -> None:
    asked = web.options("/v1/decide", headers={"origin": _ORIGIN, "access-control-request-method": "POST"})
    assert asked.status_code == 204
    assert asked.headers["access-control-allow-origin"] == _ORIGIN
    assert asked.headers["access-control-allow-methods"] == "POST"
    assert "authorization" in asked.headers["access-control-allow-headers"]
    for answer in (
        web.post("/v1/decide", json={"order": order("o")}, headers={"origin": _ORIGIN}),
        web.post("/v1/decide", json={}, headers={"origin": _ORIGIN}),
    ):
        assert answer.headers["access-control-allow-origin"] == _ORIGIN
        assert answer.headers["vary"] == "origin"
    same = web.post("/v1/decide", json={"order": order("o")}, headers={"origin": str(web.base_url).rstrip("/")})
    assert same.status_code == 200
    assert "access-control-allow-origin" not in same.headers
    stranger = web.options("/v1/decide", headers={"origin": "https://elsewhere.example"})
    assert (stranger.status_code, "access-control-allow-origin" in stranger.headers) == (403, False)


def test_administration_and_audit_are_on_the_http_port_alone_and_ask_for_the_operator_token(
    served: Served, web: httpx.Client
) -> None:
    path = "/pretrade.admin.v1.AdminService/GetStatus"
    if not served.of_all_services:
        assert web.post(path, json={}).status_code == 404
        assert web.get("/models").status_code == 404
        return
    refused = web.post(path, json={})
    assert (refused.status_code, refused.json()["reason"]) == (401, "NO_TOKEN")
    assert web.get("/models").status_code == 401
    shown = served.shown
    assert web.post("/v1/decide", json={"order": order("audited")}).status_code == 200
    assert web.post(path, json={}, headers=shown).json()["ready"] is True
    listed = web.post("/pretrade.audit.v1.AuditService/ListDecisions", json={"page_size": 1}, headers=shown)
    assert len(listed.json()["decisions"]) == 1
    nothing = web.post("/pretrade.audit.v1.AuditService/GetDecision", json={"decision_id": "x"}, headers=shown)
    assert (nothing.status_code, nothing.json()["reason"]) == (404, "UNKNOWN_DECISION")
    flags = web.post("/pretrade.admin.v1.AdminService/SetFlag", json={"name": "x"}, headers=shown)
    assert (flags.status_code, flags.json()["reason"]) == (400, "INVALID_CHANGE")


def test_signals_have_the_newest_decision_of_each_instrument_for_viewers_alone(
    served: Served, web: httpx.Client
) -> None:
    if not served.of_all_services:
        assert web.get("/signals").status_code == 404, "no path of this port"
        return
    assert (web.get("/signals").status_code, web.get(f"/signals/{INSTRUMENTS[0]}").status_code) == (401, 401)
    shown = served.shown
    decided = web.post("/v1/decide", json={"order": order("signalled")}).json()["decision"]["decision_id"]

    def newest() -> dict[str, Any]:
        (signal,) = web.get(f"/signals/{INSTRUMENTS[0]}", headers=shown).json()["signals"]
        return dict(signal)

    signal = eventually(newest, lambda one: decided in json.dumps(one))
    assert signal["decision"]["packet"]["order"]["order_ref"] == "signalled"
    assert signal["features"]["problem"] == "no features"
    every = web.get("/signals", headers=shown).json()["signals"]
    assert [one["instrument"] for one in every] == list(INSTRUMENTS)
    asked = web.get("/signals", params={"instruments": list(INSTRUMENTS[:1])}, headers=shown).json()["signals"]
    assert [one["instrument"] for one in asked] == list(INSTRUMENTS[:1])
    unknown = web.get(f"/signals/{INSTRUMENTS[0][:-1]}", headers=shown)
    assert (unknown.status_code, unknown.json()["reason"]) == (404, "UNKNOWN_INSTRUMENT")
    misspelt = web.get("/signals", params={"instrument": "x"}, headers=shown)
    assert misspelt.json()["detail"] == "instrument: there is no such field; did you mean instruments?"


_EVENTS: Final = "/v1/decisions/events"
_WITH_ALL_SERVICES: Final = pytest.mark.parametrize(
    "served", ["http port", "http port beside envoy"], indirect=True, scope="module"
)


@contextmanager
def watching(served: Served, **query: str) -> Iterator[Iterator[str]]:
    """The lines of a watch of decisions, from the first one on."""
    with (
        httpx.Client(base_url=served.url, timeout=_PATIENCE_SECONDS) as web,
        web.stream("GET", _EVENTS, params=query, headers=served.shown) as answer,
    ):
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream")
        lines = answer.iter_lines()
        assert next(lines) == "retry: 1000"
        yield lines


def next_event(lines: Iterator[str]) -> tuple[str, str]:
    """The next event of a watch: where to go on after it, and which order it is about."""
    at = next(line for line in lines if line.startswith("id: ")).removeprefix("id: ")
    event = json.loads(next(lines).removeprefix("data: "))
    assert event["cursor"] == at
    return at, event["decision"]["packet"]["order"]["order_ref"]


@_WITH_ALL_SERVICES
def test_decisions_are_watched_and_a_watch_goes_on_where_it_broke(served: Served, web: httpx.Client) -> None:
    with watching(served) as lines:
        for ref in ("w-1", "w-2"):
            assert web.post("/v1/decide", json={"order": order(ref)}).status_code == 200
        events = [next_event(lines), next_event(lines)]
        while events[-1][1] != "w-2":  # what was decided a moment before may come first
            events.append(next_event(lines))
        (cursor, first), (_, second) = events[-2:]
        assert (first, second) == ("w-1", "w-2")
        served.wait_for_watchers(1)
    served.wait_for_watchers(0)
    with watching(served, cursor=cursor) as lines:
        assert next_event(lines)[1] == "w-2"
    again = {**served.shown, "last-event-id": cursor}
    with web.stream("GET", _EVENTS, params={"cursor": "nothing of this"}, headers=again) as answer:
        assert next_event(answer.iter_lines())[1] == "w-2"
    assert web.post("/v1/decide", json={"order": order("w-3", strategy="wanted")}).status_code == 200
    with watching(served, cursor=cursor, **{"filter.strategies": "wanted"}) as lines:
        assert next_event(lines)[1] == "w-3"


@_WITH_ALL_SERVICES
def test_a_websocket_has_the_same_events(served: Served, web: httpx.Client) -> None:
    url = f"{served.url.replace('http', 'ws')}{_EVENTS}"
    token = served.shown["authorization"].removeprefix("Bearer ")
    offered = [Subprotocol(one) for one in (SUBPROTOCOL, f"bearer.{token}")]
    page = {"origin": _ORIGIN}
    with watching(served) as lines, connect(url, subprotocols=offered, additional_headers=page) as socket:
        assert socket.subprotocol == SUBPROTOCOL
        assert web.post("/v1/decide", json={"order": order("s-1")}).status_code == 200
        event = json.loads(socket.recv(timeout=_PATIENCE_SECONDS))
        assert (event["cursor"], event["decision"]["packet"]["order"]["order_ref"]) == next_event(lines)
        served.wait_for_watchers(2)
    served.wait_for_watchers(0)


@_WITH_ALL_SERVICES
@pytest.mark.parametrize(
    ("query", "headers", "http_status", "reason"),
    [
        ({}, {"authorization": ""}, 401, "NO_TOKEN"),
        ({}, {"authorization": "Bearer guessed"}, 401, "WRONG_OPERATOR_TOKEN"),
        ({}, {"origin": "https://elsewhere.example"}, 403, "ORIGIN_NOT_ALLOWED"),
        ({"cursor": "nothing of this"}, {}, 400, "INVALID_REQUEST"),
        ({"curser": "x"}, {}, 400, "UNKNOWN_FIELD"),
    ],
)
def test_who_may_not_watch_is_told_before_it_begins(
    served: Served,
    web: httpx.Client,
    query: dict[str, str],
    headers: dict[str, str],
    http_status: int,
    reason: str,
) -> None:
    shown = {name: value for name, value in {**served.shown, **headers}.items() if value}
    refused = web.get(_EVENTS, params=query, headers=shown)
    assert (refused.status_code, refused.json()["reason"]) == (http_status, reason)
    url = f"{served.url.replace('http', 'ws')}{_EVENTS}?{urlencode(query)}"
    with pytest.raises(InvalidStatus) as answered:
        connect(url, additional_headers=shown)
    assert (answered.value.response.status_code, answered.value.response.body) == (http_status, refused.content)
    served.wait_for_watchers(0)


@_WITH_ALL_SERVICES
def test_a_page_of_an_allowed_origin_may_read_events(served: Served) -> None:
    with (
        httpx.Client(base_url=served.url) as web,
        web.stream("GET", _EVENTS, headers={**served.shown, "origin": _ORIGIN}) as answer,
    ):
        assert answer.headers["access-control-allow-origin"] == _ORIGIN


@_WITH_ALL_SERVICES
def test_only_so_many_watch_decisions_and_the_others_are_told_when_to_come_back(
    served: Served, web: httpx.Client
) -> None:
    with ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(watching(served))
        refused = web.get(_EVENTS, headers=served.shown)
        assert (refused.status_code, refused.json()["reason"]) == (429, "TOO_MANY_WATCHERS")
        assert int(refused.headers["retry-after"]) > 0
    served.wait_for_watchers(0)
    with watching(served):
        served.wait_for_watchers(1)
    served.wait_for_watchers(0)


@_WITH_ALL_SERVICES
def test_features_are_watched_by_viewers_alone(served: Served, web: httpx.Client) -> None:
    path = "/v1/signals/events"
    assert web.get(path).status_code == 401
    with web.stream("GET", path, params={"instruments": INSTRUMENTS[1]}, headers=served.shown) as answer:
        line = next(line for line in answer.iter_lines() if line.startswith("data: "))
    features = json.loads(line.removeprefix("data: "))["features"]
    assert (features["instrument"], features["problem"]) == (INSTRUMENTS[1], "no features")


def test_what_the_transport_says_of_a_caller_is_not_believed_if_the_caller_says_it(web: httpx.Client) -> None:
    late = {"x-pretrade-arrived": f"{time.time() - 5:.6f}", "grpc-timeout": "2S", "x-pretrade-peer": "unix:sibling"}
    assert web.post("/v1/decide", json={"order": order("p")}, headers=late).status_code == 200
    assert web.post("/pretrade.admin.v1.AdminService/GetStatus", json={}, headers=late).status_code in (401, 404)


@pytest.mark.long
@pytest.mark.parametrize("edge", EDGES)
def test_a_server_that_stops_does_not_wait_for_those_who_watch(tmp_path: Path, edge: str) -> None:
    (port,) = free_ports(1)
    settings = {"PRETRADE_GRPC__EDGE": edge, "PRETRADE_HTTP__PORT": str(port), "PRETRADE_GRPC__GRACE_SECONDS": "80"}
    with server_group(tmp_path, 1, **settings) as group:
        served = Served(group, f"http://127.0.0.1:{port}", of_all_services=True)
        with watching(served) as lines:
            group.supervisor.terminate()
            problem = [line for line in lines if line][-1].removeprefix("data: ")
        assert json.loads(problem)["reason"] == "DRAINING"
        assert group.supervisor.wait(60) == 0


@pytest.mark.long
def test_calls_under_way_are_answered_when_the_server_stops(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    settings = {"PRETRADE_GRPC__EDGE": "grpcio", "PRETRADE_HTTP__PORT": str(port)}
    with server_group(tmp_path, 2, **settings) as group:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as web:
            assert web.post("/v1/decide", json={"order": order("a")}).status_code == 200
        assert group.stop() == 0
        assert "the transport did not end" not in group.log()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/health")
