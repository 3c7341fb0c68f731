"""Requests and answers in JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrade.decision.v1 import decision_pb2 as pb
from server.errors import InvalidOrderError
from server.http import problems, transcoding

ORDER = {"instrument": "BTCUSDT.SIM", "side": "buy", "quantity": 0.05, "limit_price": 60_000, "strategy": "twap"}


def read(document: object) -> pb.DecideRequest:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return asyncio.run(transcoding.request_of(body, pb.DecideRequest))


def refused(document: object) -> InvalidOrderError:
    with pytest.raises(InvalidOrderError) as found:
        read(document)
    return found.value


def test_an_order_is_read() -> None:
    request = read({"order": {**ORDER, "timeout": "0.025s", "features": {"values": [1, 2.5]}}, "explain": True})
    order = request.order
    assert (order.instrument, order.side, order.quantity, order.limit_price) == (
        "BTCUSDT.SIM",
        pb.SIDE_BUY,
        0.05,
        60_000.0,
    )
    assert order.timeout.ToMilliseconds() == 25
    assert list(order.features.values) == [1, 2.5]
    assert request.explain
    assert not read({"order": {"limit_price": None}}).order.HasField("limit_price"), "null is absent"
    assert read({"order": {"limitPrice": 5}}).order.limit_price == 5


@pytest.mark.parametrize("side", ["buy", "Buy", "BUY", "SIDE_BUY", "side_buy", 1])
def test_an_enum_value_may_be_short_and_in_any_case(side: object) -> None:
    assert read({"order": {"side": side}}).order.side == pb.SIDE_BUY


@pytest.mark.parametrize(
    ("document", "reason", "field", "words"),
    [
        ({"order": {**ORDER, "limit_prize": 1}}, "UNKNOWN_FIELD", "order.limit_prize", "did you mean limit_price?"),
        ({"ordr": ORDER}, "UNKNOWN_FIELD", "ordr", "did you mean order?"),
        ({"order": {"zzzz": 1}}, "UNKNOWN_FIELD", "order.zzzz", "there are order_ref, instrument, side"),
        ({"order": {"side": "by"}}, "UNKNOWN_ENUM_VALUE", "order.side", "did you mean BUY?"),
        ({"order": {"side": "up"}}, "UNKNOWN_ENUM_VALUE", "order.side", "there are SIDE_BUY, SIDE_SELL"),
        ({"order": {"side": True}}, "UNKNOWN_ENUM_VALUE", "order.side", "true"),
        ({"order": {"quantity": "much"}}, "MALFORMED_REQUEST", "order.quantity", "much"),
        ({"order": {"quantity": True}}, "MALFORMED_REQUEST", "order.quantity", "must not be true"),
        ({"order": {"timeout": 1}}, "MALFORMED_REQUEST", "order.timeout", "order.timeout: "),
        ({"order": {"features": {"values": 1}}}, "MALFORMED_REQUEST", "order.features.values", "JSON array, not 1"),
        ({"order": {"limit_price": 1, "limitPrice": 2}}, "MALFORMED_REQUEST", "order.limitPrice", "twice"),
        (b'{"order": {"quantity": 1, "quantity": 2}}', "MALFORMED_REQUEST", "", "twice"),
        ({"order": []}, "MALFORMED_REQUEST", "order", "JSON object"),
        ([], "MALFORMED_REQUEST", "", "JSON object"),
        (b"{", "MALFORMED_REQUEST", "", "not JSON"),
        (b"[" * 100_000, "MALFORMED_REQUEST", "", "not JSON"),
        (b'{"\xff": 1}', "MALFORMED_REQUEST", "", "not JSON"),
        (b'{"order": {"strategy": "\\ud800"}}', "MALFORMED_REQUEST", "order.strategy", "order.strategy: "),
        (b'{"\\ud800": 1}', "UNKNOWN_FIELD", "\\ud800", "no such field"),
        (b"", "MISSING_REQUEST", "", "no body"),
    ],
)
def test_what_is_no_request_is_refused_and_says_where(document: object, reason: str, field: str, words: str) -> None:
    error = refused(document)
    assert (error.reason, error.field) == (reason, field)
    assert words in str(error)


def test_a_wrong_order_of_a_batch_says_which_it_is() -> None:
    body = json.dumps({"orders": [ORDER, {**ORDER, "limit_prize": 1}]}).encode()
    with pytest.raises(InvalidOrderError) as found:
        asyncio.run(transcoding.request_of(body, pb.DecideBatchRequest))
    assert found.value.field == "orders[1].limit_prize"


async def test_a_large_batch_leaves_others_their_turn() -> None:
    turns = 0

    async def another() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.ensure_future(another())
    body = json.dumps({"orders": [ORDER] * 1_024}).encode()
    request: pb.DecideBatchRequest = await transcoding.request_of(body, pb.DecideBatchRequest)
    assert len(request.orders) == 1_024
    while_read, turns = turns, 0
    results = [pb.OrderResult(order_ref=f"{number}") for number in range(1_024)]
    written = json.loads(await transcoding.answer_of(pb.DecideBatchResponse(results=results)))
    assert [result["order_ref"] for result in written["results"]] == [f"{number}" for number in range(1_024)]
    other.cancel()
    assert min(while_read, turns) >= 60


def test_an_answer_has_the_names_of_the_contract() -> None:
    decision = pb.Decision(
        order_ref="a", action=pb.ACTION_NO_TRADE, score=0.25, reasons=[pb.REASON_CODE_SCORE_BELOW_THRESHOLD]
    )
    document: dict[str, Any] = json.loads(asyncio.run(transcoding.answer_of(pb.DecideResponse(decision=decision))))
    assert document["decision"] == {
        "order_ref": "a",
        "action": "ACTION_NO_TRADE",
        "score": 0.25,
        "reasons": ["REASON_CODE_SCORE_BELOW_THRESHOLD"],
    }
    assert asyncio.run(transcoding.answer_of(pb.DecideResponse())) == b"{}"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda part: (
        st.lists(part, max_size=3)
        | st.dictionaries(st.sampled_from([*pb.Order.DESCRIPTOR.fields_by_name, "values", "x"]), part, max_size=4)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["order", "explain", "x"]), _JSON, max_size=2))
def test_whatever_is_sent_is_read_or_refused(document: dict[str, object]) -> None:
    body = json.dumps(document).encode()
    refusal: InvalidOrderError | None = None
    try:
        request = read(body)
    except InvalidOrderError as error:
        refusal = error
    if refusal is not None:
        assert json.loads(problems.refusal(refusal).body)["detail"] == str(refusal)
        return
    again = read(asyncio.run(transcoding.answer_of(request)))
    assert again.SerializeToString(deterministic=True) == request.SerializeToString(deterministic=True)
