"""What callers may rely on in a `FakeServer`, because a real server does the same: one suite for both."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from typing import Final

import grpc
import pytest
from support.server_group import server_group

from pretrade.client import AsyncClient, Client, Decision, InvalidOrderError, KeyReusedError, Order
from pretrade.client.testing import FakeServer
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

SECONDS: Final = 10.0


@pytest.fixture(scope="module", params=["fake", pytest.param("real", marks=pytest.mark.stack)])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "fake":
        with FakeServer() as server:
            yield server.address
    else:
        with server_group(tmp_path_factory.mktemp("real"), 1) as group:
            yield group.decision


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client.connect(address, deadline_seconds=SECONDS) as client:
        yield client


def order(ref: str = "mine", **changes: object) -> Order:
    fields: dict[str, object] = {"instrument": "BTCUSDT.SIM", "side": "buy", "quantity": 1.0, "strategy": "test"}
    return Order(order_ref=ref, **(fields | changes))  # type: ignore[arg-type]


@pytest.mark.long
def test_a_sound_order_has_a_decision_with_id_reference_time_and_reasons(client: Client) -> None:
    found = client.decide(order())
    assert uuid.UUID(found.decision_id)
    assert found.order_ref == "mine"
    assert found.action in ("TRADE", "NO_TRADE", "ABSTAIN")
    assert found.reasons
    assert found.decided_at.year > 2020
    assert client.decide(order()).decision_id != found.decision_id


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"instrument": ""}, "instrument", "UNKNOWN_INSTRUMENT"),
        ({"quantity": 0.0}, "quantity", "INVALID_QUANTITY"),
        ({"quantity": float("inf")}, "quantity", "INVALID_QUANTITY"),
        ({"limit_price": -1.0}, "limit_price", "INVALID_LIMIT_PRICE"),
        ({"strategy": ""}, "strategy", "INVALID_STRATEGY"),
        ({"strategy": "s" * 65}, "strategy", "INVALID_STRATEGY"),
        ({"ref": "r" * 65}, "order_ref", "INVALID_ORDER_REF"),
        ({"idempotency_key": "k" * 65}, "idempotency_key", "INVALID_IDEMPOTENCY_KEY"),
    ],
)
def test_a_broken_rule_is_named_alone_and_in_a_batch(
    client: Client, changes: dict[str, object], field: str, reason: str
) -> None:
    broken = order(**changes)  # type: ignore[arg-type]
    with pytest.raises(InvalidOrderError) as raised:
        client.decide(broken)
    sound, other = client.decide_batch([order(), broken])
    assert isinstance(sound, Decision)
    assert isinstance(other, InvalidOrderError)
    assert {(one.field, one.reason) for one in (raised.value, other)} == {(field, reason)}


def test_an_order_without_side_is_refused(client: Client) -> None:
    with pytest.raises(InvalidOrderError) as raised:
        client.decide(pb.Order(instrument="BTCUSDT.SIM", quantity=1.0, strategy="test"))
    assert (raised.value.field, raised.value.reason) == ("side", "UNKNOWN_SIDE")


def test_a_key_gives_the_same_decision_for_the_same_order_alone(client: Client) -> None:
    key = uuid.uuid4().hex
    first = client.decide(order(idempotency_key=key))
    assert client.decide(order(idempotency_key=key)).decision_id == first.decision_id
    (again,) = client.decide_batch([order(idempotency_key=key)])
    assert isinstance(again, Decision)
    assert again.decision_id == first.decision_id
    with pytest.raises(KeyReusedError) as raised:
        client.decide(order(idempotency_key=key, quantity=2.0))
    assert (raised.value.field, raised.value.reason) == ("idempotency_key", "IDEMPOTENCY_KEY_REUSED")
    assert client.decide(order(idempotency_key=key, strategy="other")).decision_id != first.decision_id


@pytest.mark.parametrize("size", [0, 1_025])
def test_a_batch_of_no_orders_or_of_too_many_is_refused(address: str, size: int) -> None:
    request = pb.DecideBatchRequest(orders=[order().message()] * size)
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
        decision_pb2_grpc.DecisionServiceStub(channel).DecideBatch(request, timeout=SECONDS)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_stream_answers_every_order_and_goes_on_after_a_broken_one(address: str) -> None:
    async with AsyncClient.connect(address, deadline_seconds=SECONDS) as client, client.stream() as stream:
        refs = [f"{number}" for number in range(50)]
        *found, broken = await asyncio.gather(
            *(stream.decide(order(ref)) for ref in refs),
            stream.decide(order("broken", quantity=-1.0)),
            return_exceptions=True,
        )
        assert isinstance(broken, InvalidOrderError)
        assert broken.field == "quantity"
        assert [one.order_ref for one in found if isinstance(one, Decision)] == refs
        assert (await stream.decide(order())).decision_id


def test_its_health_is_told_on_the_same_port(client: Client, address: str) -> None:
    assert client.health() == {address: "SERVING"}
