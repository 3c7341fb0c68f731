"""Rows that are made from an entry's bytes are those that are made from its columns, byte for byte."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Sequence
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.twins import compiled_here

from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.store.binary_copy import binary_copy, start_of_row
from server.audit.store.schema import DECISIONS
from server.audit.store.shipment import Shipment
from server.journal.entries import NO_AGE
from server.journal.journal_file import Row

SHIPPED_AT: Final = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
JOURNAL: Final = "ab" * 16

# Mostly plain, so that most entries are taken.
TEXTS: Final = st.text("abc-1", max_size=12) | st.sampled_from(["", "x" * 40, "é", "a\0b"])
NUMBERS: Final = st.floats(width=64)
SMALL: Final = st.integers(0, 2**32 - 1)
WIDE: Final = st.integers(-(2**63), 2**63 - 1)
INSTANTS: Final = st.integers(1_700_000_000 * 10**9, 1_800_000_000 * 10**9) | WIDE
AGES: Final = st.just(NO_AGE) | st.integers(-5_000, 10**12) | WIDE
FIXED: Final[dict[str, st.SearchStrategy[Any]]] = {
    **dict.fromkeys(("quantity", "limit_price", "score", "age_seconds", "mid_price"), NUMBERS),
    **dict.fromkeys(("allowed_us", "used_us"), SMALL),
    **dict.fromkeys(("age_us", "arrived_monotonic_ns", "decided_monotonic_ns"), WIDE),
    **dict.fromkeys(("decision_id", "order_ref"), TEXTS),
    "feature_age_ns": AGES,
    "decided_at_ns": INSTANTS,
    "ledger": st.binary(max_size=6),
}
ORDERS: Final = st.builds(
    pb.Order, instrument=TEXTS, side=st.sampled_from([0, 1, 2, 2, 9]), strategy=TEXTS, reduce_only=st.booleans()
)
DECISIONS_OF_ANSWERS: Final = st.builds(
    pb.Decision,
    action=st.sampled_from(list(pb.Action.values())),
    source=st.sampled_from(list(pb.Source.values())),
    reasons=st.lists(st.sampled_from(list(pb.ReasonCode.values())), max_size=3),
    degradations=st.lists(st.sampled_from(list(pb.Degradation.values())), max_size=2),
    model_name=TEXTS,
    model_version=TEXTS,
    threshold=st.none() | NUMBERS,
)


@st.composite
def batches(draw: st.DrawFn) -> packet_pb2.DecisionBatch:
    """A batch whose columns fit."""
    rows = draw(st.integers(0, 5))

    def column(values: st.SearchStrategy[Any], size: int = rows) -> list[Any]:
        return draw(st.lists(values, min_size=size, max_size=size))

    orders = draw(st.lists(ORDERS, max_size=3))
    answers = draw(st.lists(st.builds(packet_pb2.DecisionPacket, decision=DECISIONS_OF_ANSWERS), max_size=3))
    books = draw(st.lists(st.builds(packet_pb2.FeatureProvenance, sequence=WIDE, age_us=WIDE), max_size=2))
    attempts = draw(st.lists(st.builds(packet_pb2.Attempt, replica=TEXTS, outcome=TEXTS), max_size=2))
    counts = column(st.integers(0, 3 if attempts else 0))
    rest = sorted(draw(st.sets(st.integers(0, max(0, rows - 1)), max_size=rows)))
    inputs = draw(st.lists(st.binary(max_size=8), max_size=2))
    batch = packet_pb2.DecisionBatch(
        shared=packet_pb2.DecisionPacket(instance_id=draw(TEXTS), config_hash="c", durability="fsync"),
        orders=orders,
        answers=answers,
        books=books,
        model_inputs=inputs,
        feature_set_id=draw(TEXTS),
        attempts=attempts,
        idempotency_key=draw(st.just([]) | st.lists(TEXTS, min_size=rows, max_size=rows)),
        order=column(st.integers(0, len(orders))),
        answer=column(st.integers(0, len(answers))),
        model_input=column(st.integers(0, len(inputs))),
        book=column(st.integers(0, len(books))),
        attempt_count=counts,
        attempt=column(st.integers(0, len(attempts)), sum(counts)),
        attempt_used_us=column(SMALL, sum(counts)),
        attempt_batch_index=column(SMALL, sum(counts)),
        rest_row=rest,
        rest=[draw(st.binary(max_size=5)) for _ in rest],
    )
    for name, values in FIXED.items():
        getattr(batch, name).extend(column(values))
    return batch


def plain(rows: int = 3) -> packet_pb2.DecisionBatch:
    """What nearly every entry is like."""
    batch = packet_pb2.DecisionBatch(
        shared=packet_pb2.DecisionPacket(instance_id="server-1", config_hash="c0ffee", durability="fsync"),
        orders=[pb.Order(instrument="BTCUSDT.SIM", side=pb.SIDE_BUY, strategy="s")],
        answers=[packet_pb2.DecisionPacket(decision=pb.Decision(action=pb.ACTION_TRADE, threshold=0.5))],
        decision_id=[f"id-{row}" for row in range(rows)],
        order_ref=[f"ref-{row}" for row in range(rows)],
        order=[1] * rows,
        answer=[1] * rows,
        model_input=[0] * rows,
        book=[0] * rows,
        attempt_count=[0] * rows,
        ledger=[b"\x08\x01"] * rows,
        decided_at_ns=[1_767_000_000 * 10**9 + row for row in range(rows)],
    )
    for name in FIXED.keys() - {"decision_id", "order_ref", "ledger", "decided_at_ns"}:
        getattr(batch, name).extend([7] * rows)
    return batch


def entry(batch: packet_pb2.DecisionBatch) -> bytes:
    return packet_pb2.JournalEntry(decisions=batch).SerializeToString()


def shipped(entries: Sequence[bytes], *, for_copy: bool) -> Shipment:
    rows = [Row(position, each, bytes(32)) for position, each in enumerate(entries, 1)]
    shipment = Shipment(JOURNAL, rows, for_copy=for_copy)
    shipment.stamp(SHIPPED_AT)
    return shipment


def data(shipment: Shipment) -> tuple[str, bytes]:
    columns = shipment.decisions
    return binary_copy(DECISIONS, columns, shipment.copied.write(start_of_row(DECISIONS, columns)))


@pytest.fixture(autouse=True)
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    module = compiled_here("server.audit.store.decision_rows_c")
    monkeypatch.setattr("server.audit.store.decision_rows._compiled", module)


def assert_same(one: bytes) -> Shipment:
    by_column, by_row = shipped([one], for_copy=False), shipped([one], for_copy=True)
    assert data(by_row) == data(by_column)
    assert (by_row.days(), by_row.keyed()) == (by_column.days(), by_column.keyed())
    return by_row


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@example(batch=plain())
@given(batch=batches())
def test_rows_are_those_of_the_columns(batch: packet_pb2.DecisionBatch) -> None:
    assert_same(entry(batch))


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(batch=batches() | st.just(plain()), draw=st.data())
def test_whatever_became_of_an_entry_both_make_the_same_of_it(
    batch: packet_pb2.DecisionBatch, draw: st.DataObject
) -> None:
    """An entry of another format is evidence and nothing else, on both ways."""
    content = bytearray(entry(batch))
    for _ in range(draw.draw(st.integers(1, 3))):
        place = draw.draw(st.integers(0, max(0, len(content) - 1)))
        match draw.draw(st.sampled_from(["change", "remove", "add", "cut"])):
            case "change" if content:
                content[place] = draw.draw(st.integers(0, 255))
            case "remove":
                del content[place : place + draw.draw(st.integers(1, 9))]
            case "add":
                content[place:place] = draw.draw(st.binary(min_size=1, max_size=9))
            case _:
                del content[place:]
    assert_same(bytes(content))


def test_a_usual_entry_is_taken() -> None:
    batch = plain()
    batch.limit_price[1] = math.nan
    batch.idempotency_key.extend(["", "key", ""])
    found = assert_same(entry(batch))
    assert (found.copied.rows, found.decisions.rows) == (3, 0)
    assert found.keyed() == {"id-1"}
    assert found.days() == {dt.date(2025, 12, 29)}


def not_ascii(batch: packet_pb2.DecisionBatch) -> None:
    batch.order_ref[0] = "é"


def of_an_ensemble(batch: packet_pb2.DecisionBatch) -> None:
    batch.answers[0].parts.add(model_version="a")
    batch.part_score.extend([0.5] * 3)


def without_its_scores(batch: packet_pb2.DecisionBatch) -> None:
    batch.answers[0].parts.add(model_version="a")


def of_no_side(batch: packet_pb2.DecisionBatch) -> None:
    batch.orders[0].side = 9  # type: ignore[assignment]


def with_a_choice_of_nothing(batch: packet_pb2.DecisionBatch) -> None:
    batch.order[0] = 2


def with_a_column_too_short(batch: packet_pb2.DecisionBatch) -> None:
    del batch.mid_price[0]


@pytest.mark.parametrize(
    "change",
    [
        not_ascii,
        of_an_ensemble,
        without_its_scores,
        of_no_side,
        with_a_choice_of_nothing,
        with_a_column_too_short,
    ],
)
def test_an_entry_that_is_not_plain_is_left_to_the_columns(change: Any) -> None:
    batch = plain()
    change(batch)
    assert assert_same(entry(batch)).copied.rows == 0


def test_plain_and_other_entries_are_shipped_together() -> None:
    other = plain(2)
    not_ascii(other)
    both = shipped([entry(plain()), entry(other), entry(plain(1))], for_copy=True)
    assert (both.copied.rows, both.decisions.rows) == (4, 2)
    _, written = data(both)
    alone = [shipped([b"", entry(other)], for_copy=False), shipped([entry(plain())], for_copy=False)]
    start, end = len(b"PGCOPY\n\xff\r\n\0" + bytes(8)), -2
    for one in alone:
        assert data(one)[1][start:end] in written


def test_without_the_compiled_module_all_goes_by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.audit.store.decision_rows._compiled", None)
    found = shipped([entry(plain())], for_copy=True)
    assert (found.copied.rows, found.decisions.rows) == (0, 3)
