"""What the server knows of its instruments, over HTTP: of a whole server with real replicas and features."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from redis import Redis
from support.guest_model import write_guest_model
from support.guest_sets import know
from support.harness import INSTRUMENTS, MID, ROOMY, Product, eventually
from support.rig import OpenRig

from feature_cache.feature_set import Feature, FeatureSet
from feature_cache.feature_sets import Registered
from feature_cache.features import MF1
from feature_cache.store.codec import BookState, FeatureSnapshot, encode
from feature_cache.store.vectors import key_of
from local.stack.ports import free_ports
from local.stack.stack import Stack
from pretrade.admin.v1 import admin_pb2
from pretrade.client import operator_token

pytestmark = pytest.mark.stack
SWELL: Final = FeatureSet("swell", (Feature("height", "", "How high."), Feature("flow", "", "How fast.", signed=True)))
_SETS: Final = """
from feature_cache.feature_set import Feature, FeatureSet
from feature_cache.feature_sets import ComputedSet

SWELL = FeatureSet("swell", (Feature("height", "", "How high."), Feature("flow", "", "How fast.", signed=True)))
FEATURE_SETS = [ComputedSet(SWELL, lambda instrument: None)]
"""


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


@pytest.mark.long
def test_the_features_of_a_set_that_a_model_takes_are_shown_and_watched_beside_those_of_mf1(
    open_rig: OpenRig, replica_stack: Stack, model_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(monkeypatch, Registered(SWELL, lambda instrument: None, "this test"))  # type: ignore[arg-type, return-value]
    archive = write_guest_model(SWELL, tmp_path / "swell.mar", "swell")
    # At once, because tests in other processes read the store.
    (tmp_path / "swell.mar").rename(model_store / "versions" / f"{archive.version}.mar")
    (tmp_path / "sets.py").write_text(_SETS)
    (port,) = free_ports(1)
    settings = {
        "MODELS": json.dumps({"swell": {}}),
        "FEATURES__FILE": str(tmp_path / "sets.py"),
        "REPLICAS__MANAGEMENT": json.dumps(replica_stack.endpoints.management),
        "REPLAY__MODEL_STORE": str(model_store),
        "HTTP__PORT": str(port),
    }
    server = open_rig(ROOMY | settings, warm_up_calls=1).server
    token = operator_token.token_path(server.journal_path).read_text().strip()
    shown = {"authorization": f"Bearer {token}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=shown, timeout=60.0) as web:
        path, asked = f"/signals/{INSTRUMENTS[0]}", {"instruments": INSTRUMENTS[0], "feature_sets": "swell"}
        (signal,) = signals(web, path)
        assert "other_features" not in signal
        refused = web.get("/v1/signals/events", params=asked)
        assert (refused.status_code, refused.json()["reason"]) == (404, "UNKNOWN_SUBJECT")
        alias = {"model": "swell", "alias": "champion", "model_version": archive.version}
        why = {"author": "ann", "reason": "a test"}
        made = web.post("/pretrade.admin.v1.AdminService/SetModelAlias", json=alias | why)
        assert made.status_code == 200, made.text
        server.wait_until_well("swell/primary", "swell/secondary")

        def of_swell() -> dict[str, Any]:
            write(str(replica_stack.endpoints.redis_url))
            (signal,) = signals(web, path)
            (found,) = signal.get("other_features", [{}])
            return dict(found)

        found = eventually(of_swell, lambda one: bool(one.get("usable")))
        assert (found["vector_version"], found["values"], found["bid"]) == (SWELL.version, {"height": 0.25}, 99.5)
        with web.stream("GET", "/v1/signals/events", params=asked) as answer:
            line = next(line for line in answer.iter_lines() if line.startswith("data: "))
        watched = json.loads(line.removeprefix("data: "))["features"]
        assert (watched["vector_version"], watched["values"]) == (SWELL.version, {"height": 0.25})


def write(redis_url: str) -> None:
    """A vector of this moment, as a worker that computes the set writes it."""
    values = np.array([0.25, np.nan], dtype=np.float32)
    with Redis.from_url(redis_url) as redis:
        seconds, micros = redis.time()
        now_ns = seconds * 10**9 + micros * 1_000
        vector = FeatureSnapshot(
            INSTRUMENTS[0], now_ns, now_ns, now_ns, 0, now_ns, 0, 99.5, np.nan, BookState.VALID, values, SWELL
        )
        redis.set(key_of(INSTRUMENTS[0], "swell"), encode(vector), px=60_000)
