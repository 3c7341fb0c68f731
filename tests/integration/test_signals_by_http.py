"""What the server knows of its instruments, over HTTP: of a whole server with real replicas and features."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from support.harness import INSTRUMENTS, MID, Product, eventually

from feature_cache.features import MF1
from feature_cache.store.codec import BookState
from pretrade.admin.v1 import admin_pb2

pytestmark = pytest.mark.stack


@pytest.fixture
def web(product: Product) -> Iterator[httpx.Client]:
    endpoints = product.stack.endpoints
    token = Path(str(endpoints.operator_token_file)).read_text().strip()
    with httpx.Client(
        base_url=str(endpoints.http_url), headers={"authorization": f"Bearer {token}"}, timeout=60.0
    ) as web:
        yield web


def signals(web: httpx.Client, path: str = "/signals") -> list[dict[str, Any]]:
    answer = web.get(path)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["signals"])


def test_a_signal_has_the_features_that_a_decision_would_use_and_the_newest_decision(
    product: Product, web: httpx.Client
) -> None:
    decision = product.decide(order_ref="by-http")

    def of_first() -> dict[str, Any]:
        (signal,) = signals(web, f"/signals/{INSTRUMENTS[0]}")
        return signal

    signal = eventually(of_first, lambda one: decision.decision_id in json.dumps(one))
    features = signal["features"]
    assert (features["usable"], features["book"], features["vector_version"]) == (
        True,
        "BOOK_STATE_VALID",
        MF1.version,
    )
    assert (features["bid"], features["ask"]) == (MID - 0.5, MID + 0.5)
    values = dict(zip(MF1.names, product.market.values.tolist(), strict=True))
    assert features["values"] == pytest.approx(values)
    assert 0.0 <= float(signal["age"].removesuffix("s")) < 5.0
    newest = signal["decision"]["packet"]
    assert (newest["order"]["order_ref"], newest["decision"]["source"]) == ("by-http", "SOURCE_PRIMARY")
    assert [one["instrument"] for one in signals(web)] == list(INSTRUMENTS)


def test_the_models_are_those_that_grpc_tells_of(product: Product, web: httpx.Client) -> None:
    told = web.get("/models")
    assert told.status_code == 200
    expected = product.admin.ListModels(admin_pb2.ListModelsRequest())
    assert expected.models
    assert ParseDict(told.json(), admin_pb2.ListModelsResponse()) == expected
    assert told.json() == MessageToDict(expected, preserving_proto_field_name=True)


def test_features_are_watched_as_they_change(product: Product, web: httpx.Client) -> None:
    asked = {"instruments": INSTRUMENTS[0], "interval": "0.1s"}
    with web.stream("GET", "/v1/signals/events", params=asked) as answer:
        lines = answer.iter_lines()

        def features() -> dict[str, Any]:
            line = next(line for line in lines if line.startswith("data: "))
            found: dict[str, Any] = json.loads(line.removeprefix("data: "))["features"]
            return found

        first, second = features(), features()
        assert int(first["sequence"]) < int(second["sequence"])
        assert (first["instrument"], first["bid"]) == (INSTRUMENTS[0], MID - 0.5)
        product.market.state = BookState.UNKNOWN
        try:
            assert eventually(features, lambda one: not one.get("usable"))["problem"] == "book unknown"
        finally:
            product.market.state = BookState.VALID
        assert product.metric("pretrade_feature_watchers") == 1
    eventually(lambda: product.metric("pretrade_feature_watchers"), lambda watchers: watchers == 0)
