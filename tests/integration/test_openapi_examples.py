"""Every example request of the OpenAPI document is answered by a whole server, and the answers it shows are such ones.

`TEST_OPENAPI=docs` writes the answers that the document shows anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from socket import gethostname
from typing import Any, Final

import httpx
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass
from redis import Redis
from support.harness import INSTRUMENTS, Product, eventually

from feature_cache.bars.bar import Bar
from feature_cache.bars.maker import BarMaker
from feature_cache.bars.store import BarStore
from feature_cache.engine.engine import FeatureEngine
from feature_cache.sources.simulator import simulate
from feature_cache.store.books import PublishedBook
from feature_cache.store.vectors import book_key_of
from pretrade.admin.v1 import admin_pb2
from server.http import examples

pytestmark = pytest.mark.stack
_ADMIN: Final = "/pretrade.admin.v1.AdminService/"
_MOST_NAMES: Final = 8
_OF_A_CANARY: Final = [f"{_ADMIN}{name}Canary" for name in ("Promote", "Abort", "Get")] + [f"{_ADMIN}SetCanaryWeight"]
"""Methods that need one under way."""
_AFTER_A_PROMOTION: Final = f"{_ADMIN}RollBack"
_OF_AN_ALERT_RULE: Final = f"{_ADMIN}DeleteAlertRule"


@pytest.fixture
def web(product: Product) -> Iterator[httpx.Client]:
    endpoints = product.stack.endpoints
    token = Path(str(endpoints.operator_token_file)).read_text().strip()
    shown = {"authorization": f"Bearer {token}"}
    with httpx.Client(base_url=str(endpoints.http_url), headers=shown, timeout=120.0) as web:
        yield web


@pytest.fixture
def challenger(product: Product) -> Iterator[str]:
    """A version that is no champion; the canary of it that a test leaves is ended."""
    models = product.admin.ListModels(admin_pb2.ListModelsRequest()).models
    (champion,) = (model for model in models if "champion" in model.aliases)
    # Other tests leave models of their own sets in the store, which this server's champion's workers do not take.
    alike = (model for model in models if model.feature_set == champion.feature_set)
    yield next(model.model_version for model in alike if "champion" not in model.aliases)
    found = product.admin.GetCanary(admin_pb2.GetCanaryRequest())
    if found.canary.state == admin_pb2.CANARY_STATE_RUNNING:
        product.admin.AbortCanary(admin_pb2.AbortCanaryRequest(author="test", reason="heal"))


@pytest.mark.long
def test_every_example_is_answered_and_what_is_shown_is_an_answer(
    product: Product, web: httpx.Client, challenger: str
) -> None:
    decision_id = product.decide(order_ref="1").decision_id
    keep_market(product)
    # Replaying and explaining read what was written.
    eventually(lambda: asked(web, "audit.v1.AuditService/GetDecision", {"decision_id": decision_id}), bool)
    ours = {examples.INSTRUMENT: INSTRUMENTS[0], examples.DECISION: decision_id, examples.MODEL: challenger}
    theirs = {name: one for one, name in ours.items()}
    theirs |= {INSTRUMENTS[1]: "ETHUSDT.BINANCE", gethostname(): "pretrade-0"}
    answered: dict[str, Any] = {}
    refused: dict[str, str] = {}

    def ask(path: str) -> None:
        for title, request in examples.REQUESTS[path].values():
            answer = web.post(path, content=renamed(json.dumps(request), ours))
            if answer.status_code != 200:
                refused[title] = answer.text
            answered.setdefault(path, shortened(json.loads(renamed(answer.text, theirs))))

    for path in examples.REQUESTS:
        if path not in (*_OF_A_CANARY, _AFTER_A_PROMOTION, _OF_AN_ALERT_RULE):
            ask(path)
    why = {"author": "ann", "reason": "an example"}
    rule = examples.ALERT_RULE
    change(web, "SetAlertRule", {"rule": rule, **why})
    ask(_OF_AN_ALERT_RULE)
    change(web, "DeleteAlertRule", {"name": rule["name"], **why})
    change(web, "StartCanary", {"model_version": challenger, "steps": [0.05, 1.0], **why})
    for path in _OF_A_CANARY:
        ask(path)
    change(web, "AbortCanary", why)
    change(web, "SetModelAlias", {"alias": "previous", "model_version": challenger, **why})
    ask(_AFTER_A_PROMOTION)
    assert not refused
    assert answered[f"{_ADMIN}ListBars"]["bars"]
    assert answered[f"{_ADMIN}GetBook"]["bids"]
    if os.environ.get("TEST_OPENAPI") == "docs":
        in_order = {path: answered[path] for path in examples.REQUESTS}
        examples.ANSWERS.write_text(json.dumps(in_order, indent=1, ensure_ascii=False) + "\n")
    shown = examples.answers()
    assert shown.keys() == examples.REQUESTS.keys()
    for path, answer in shown.items():
        method = descriptor_pool.Default().FindMethodByName(path[1:].replace("/", "."))
        parsed = ParseDict(answer, GetMessageClass(method.output_type)())
        assert parsed.ListFields(), path


def keep_market(product: Product) -> None:
    """What the keeper of bars and a feature worker would keep of the first instrument: this stack has neither."""
    bars: list[Bar] = []
    maker, engine = BarMaker(INSTRUMENTS[0], bars.append), FeatureEngine(INSTRUMENTS[0])
    for event in simulate(1, INSTRUMENTS[:1], duration_seconds=185, events_per_second=4):
        maker.on_event(event)
        engine.on_event(event)
    with closing(BarStore(str(product.stack.endpoints.database_url))) as store:
        store.prepare()
        store.write([bar for bar in bars if bar.interval == "1m"])
    bids, asks = engine.depth(10)
    book = PublishedBook(
        state=engine.state,
        unknown_because=engine.unknown_because,
        event_time_ns=engine.time_ns,
        written_ns=engine.time_ns,
        bids=bids,
        asks=asks,
    )
    with Redis.from_url(str(product.stack.endpoints.redis_url)) as redis:
        redis.set(book_key_of(INSTRUMENTS[0]), book.model_dump_json(), px=600_000)


def asked(web: httpx.Client, method: str, request: dict[str, Any]) -> bool:
    return web.post(f"/pretrade.{method}", json=request).status_code == 200


def change(web: httpx.Client, method: str, request: dict[str, Any]) -> None:
    answer = web.post(f"{_ADMIN}{method}", json=request)
    assert answer.status_code == 200, answer.text


def renamed(text: str, names: dict[str, str]) -> str:
    for one, other in names.items():
        text = text.replace(one, other)
    return text


def shortened(answer: Any) -> Any:
    """An answer with no more of each list and map than shows what is in it."""
    if isinstance(answer, list):
        return [shortened(one) for one in answer[:2]]
    if isinstance(answer, dict):
        plain = all(not isinstance(one, dict | list) for one in answer.values())
        most = 4 if plain and len(answer) > _MOST_NAMES and not answer.keys() & _FIELDS else len(answer)
        return {name: shortened(one) for name, one in list(answer.items())[:most]}
    return answer


_FIELDS: Final = frozenset(
    field.name
    for module in ("pretrade/admin/v1/admin.proto", "pretrade/audit/v1/packet.proto")
    for message in descriptor_pool.Default().FindFileByName(module).message_types_by_name.values()
    for field in message.fields
)
