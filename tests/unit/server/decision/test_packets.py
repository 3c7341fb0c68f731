"""The journal entry of decisions: every packet comes out of it as it would be written by itself."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cases import new_case
from support.guest_sets import MIXED
from support.twins import compiled_here

from fallback.order import MODEL_SOURCES, Answer, Attempt, CallContext, Case, Part
from feature_cache import features
from feature_cache.feature_set import SetRow
from feature_cache.store.codec import BookState, FeatureSnapshot
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.control.file import ControlFile
from server.control.state import ControlSettings, ControlState
from server.decision.convert import order_timeout_seconds
from server.decision.idempotency import identify
from server.decision.packets import PacketWriter, write_entry_plainly
from server.decision.record import Decided, hash_of
from server.inference import model_sets
from server.journal.entries import decision_ids, entry_of, packet_of, packets, singly
from server.journal.journal import Journal, JournalSettings
from server.settings import Settings

SCORED = Answer(
    pb.ACTION_TRADE,
    pb.SOURCE_PRIMARY,
    pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD,
    0.75,
    0.5,
    "champion",
    "ab" * 8,
)
ABSTAINED = Answer(pb.ACTION_ABSTAIN, pb.SOURCE_NONE, pb.REASON_CODE_NO_SOURCE)
NOW, WALL_NS = 1_000.01, 1_700_000_000_123_456_789


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> ControlState:
    path: Path = tmp_path_factory.mktemp("packets")
    return ControlState(
        ControlSettings(shadow=False, halted=True),
        ControlFile(path / "control.json"),
        {},
        Journal(JournalSettings(path=path / "journal.db")),
        "server-1",
        str,
        lambda: 0,
        lambda: 0.0,
    )


@pytest.fixture(scope="module", autouse=True)
def guests_model() -> None:
    model_sets.learn(GUESTS, MIXED)


@pytest.fixture(scope="module")
def writer(control: ControlState) -> PacketWriter:
    return PacketWriter("server-1", "hash", "fsync", control)


def snapshot(sequence: int = 42, state: BookState = BookState.VALID) -> FeatureSnapshot:
    values = np.zeros(features.N_FEATURES, dtype=np.float32)
    values[features.INDEX["book_age_ms"]] = 5.0 + sequence
    return FeatureSnapshot("BTCUSDT.BINANCE", sequence, 7, 7, 7, 7, 0, 99.0, 101.0, state, values)


def made(case: Case, answer: Answer, decision_id: str = "decision-1") -> Decided:
    return Decided(case, answer, answer.action, [answer.reason], decision_id, NOW, WALL_NS, 3)


def written(writer: PacketWriter, *decisions: tuple[Case, Answer]) -> packet_pb2.JournalEntry:
    batch = writer.batch()
    for number, (case, answer) in enumerate(decisions):
        batch.add(case, answer, made(case, answer, f"decision-{number}"), NOW, WALL_NS)
    return entry_of(batch.entry())


def by_itself(case: Case, answer: Answer, decided: Decided, control: ControlState) -> packet_pb2.DecisionPacket:
    """The packet of one decision, field by field: what the columns are held against."""
    packet = packet_pb2.DecisionPacket(
        order=case.order.message,
        decision=pb.Decision.FromString(decided.wire),
        arrived_monotonic_ns=int(case.budget.arrived * 1e9),
        decided_monotonic_ns=int(NOW * 1e9),
        instance_id="server-1",
        config_hash="hash",
        durability="fsync",
        trading_state=control.trading_state_name,
        flags_on=control.flags_on,
        chain_stages=case.stages,
        chosen_model="" if case.model == "default" else case.model,
        cached_from_decision_id=answer.cached_from,
        model_expires_at=answer.model_expires_at,
        trace_id=case.order.context.trace_id,
        correlation_id=case.order.context.correlation_id,
        caller=case.order.caller if case.order.idempotency_key else "",
    )
    packet.decision.control_version = control.version
    if case.features is not None:
        packet.model_input, packet.feature_set_id = case.row(), features.MF1.id
    if case.from_caller:
        packet.features.from_caller = True
    if case.others and answer.source in MODEL_SOURCES and answer.model_version == GUESTS:
        packet.scored_input, packet.scored_feature_set = case.others[MIXED] or b"", MIXED.version
    known = case.snapshot
    if known is not None:
        about = packet.features
        about.sequence, about.event_time_ns = known.sequence, known.event_time_ns
        about.book_state = packet_pb2.BookState.Value(f"BOOK_STATE_{known.state.name}")
        about.book_age_ms = known.values[features.INDEX["book_age_ms"]]
        about.age_us, about.age_seconds = int(case.snapshot_age_seconds * 1e6), case.snapshot_age_seconds
    for part, score in zip(answer.parts, answer.part_scores, strict=True):
        packet.parts.add(model_version=part.version, weight=part.weight, score=score)
    for one in case.attempts:
        packet.attempts.add(
            replica=one.replica,
            outcome=one.outcome,
            used_us=max(0, int(one.used_seconds * 1e6)),
            model_version=one.model_version,
            batch_rows=one.batch_rows,
            batch_index=one.batch_index,
        )
    if not math.isnan(case.mid):
        packet.mid_price = case.mid
    return packet


GUESTS = "c0" * 8
"""Version of a model that takes another set."""
SHORT = st.text(max_size=6)
SECONDS = st.floats(0, 100)
SNAPSHOTS = [snapshot(), snapshot(43, BookState.LOCKED), snapshot(44, BookState.UNKNOWN)]
VECTORS = [np.full(features.N_FEATURES, value, dtype=np.float32) for value in (0.0, 1.0)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, Answer]:
    own = draw(st.none() | st.sampled_from(VECTORS))
    case = new_case(values=draw(st.sampled_from(VECTORS)), caller_features=own, arrived=draw(st.floats(0, 1e7)))
    limit_price = draw(st.none() | st.floats(0.01, 1e9))
    message = pb.Order(
        order_ref=draw(SHORT),
        instrument=draw(st.sampled_from(("A", "B"))),
        side=draw(st.sampled_from((pb.SIDE_BUY, pb.SIDE_SELL))),
        quantity=draw(st.floats(0.01, 1e9)),
        limit_price=limit_price,
        strategy=draw(SHORT),
        idempotency_key=draw(SHORT),
        reduce_only=draw(st.booleans()),
    )
    if own is not None:
        message.features.feature_set_id = features.MF1.id
        message.features.values.extend(own.tolist())
    if draw(st.booleans()):
        message.timeout.FromNanoseconds(draw(st.integers(1, 10**12) | st.just(315_576_000_000_999_999_999)))
    case.order = replace(
        case.order,
        wire=message.SerializeToString(),
        instrument=message.instrument,
        side=message.side,
        quantity=message.quantity,
        limit_price=math.nan if limit_price is None else limit_price,
        strategy=message.strategy,
        reduce_only=message.reduce_only,
        order_ref=message.order_ref,
        idempotency_key=message.idempotency_key,
        timeout_seconds=order_timeout_seconds(message),
        context=draw(st.sampled_from((case.order.context, CallContext("ab" * 16, correlation_id="mine")))),
        caller=draw(st.sampled_from(("", "desk"))),
    )
    if draw(st.booleans()):
        case.features = None
    case.feature_age_seconds = draw(st.just(math.nan) | st.floats(-10, 1e6))
    case.snapshot = draw(st.none() | st.sampled_from(SNAPSHOTS))
    case.snapshot_age_seconds = draw(st.floats(-10, 1e6))
    case.others = draw(st.sampled_from((None, {}, {MIXED: SetRow.of(MIXED, bytes(range(12)))})))
    case.mid = draw(st.just(math.nan) | st.floats(0.01, 1e9))
    case.stages = draw(st.sampled_from(((), ("rules",), ("model", "rules"))))
    case.model = draw(st.sampled_from(("", "default", "scalper")))
    case.degradations.extend(draw(st.lists(st.sampled_from(pb.Degradation.values()[1:]), max_size=3)))
    case.attempts.extend(
        draw(
            st.lists(
                st.builds(
                    Attempt,
                    st.sampled_from(("primary", "secondary")),
                    st.sampled_from(("success", "timeout")),
                    st.floats(-1, 100),
                    SHORT,
                    st.integers(0, 3),
                    st.integers(0, 2**31),
                ),
                max_size=3,
            )
        )
    )
    for stage in draw(st.lists(st.sampled_from(pb.Stage.values()[1:]), max_size=3)):
        case.budget.charge(stage, draw(SECONDS), draw(SECONDS))
    scored = draw(st.booleans())
    parts = draw(st.sampled_from(((), (Part("0a" * 8, 0.5),), (Part("0a" * 8, 0.5), Part("0b" * 8, -1.5)))))
    answer = Answer(
        draw(st.sampled_from(pb.Action.values()[1:])),
        draw(st.sampled_from(pb.Source.values()[1:])),
        draw(st.sampled_from(pb.ReasonCode.values()[1:])),
        draw(st.floats(0, 1)) if scored else math.nan,
        draw(st.floats(0, 1)) if scored else math.nan,
        draw(SHORT),
        draw(SHORT | st.just(GUESTS)),
        draw(st.integers(0, 2**40)),
        draw(SHORT),
        parts,
        tuple(draw(st.floats(0, 1, width=32)) for _ in parts),
    )
    return case, answer


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(decisions=st.lists(cases(), min_size=1, max_size=4), data=st.data())
def test_an_entry_gives_back_every_packet(
    writer: PacketWriter, control: ControlState, decisions: list[tuple[Case, Answer]], data: st.DataObject
) -> None:
    split = data.draw(st.integers(0, len(decisions) - 1))
    first, second = writer.batch(), writer.batch()
    expected = []
    for number, (case, answer) in enumerate(decisions):
        decided = Decided(case, answer, answer.action, [answer.reason], f"id-{number}", NOW, WALL_NS, control.version)
        (first if number <= split else second).add(case, answer, decided, NOW, WALL_NS)
        expected.append(by_itself(case, answer, decided, control))
    assert first.can_join(second)
    entry = entry_of(first.entry([second]))
    assert list(packets(entry)) == expected
    assert [packet_of(entry, row) for row in range(len(expected))] == expected
    assert [one.decision for one in singly(entry)] == expected
    assert list(decision_ids(entry)) == [packet.decision.decision_id for packet in expected]


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(decisions=st.lists(cases(), min_size=1, max_size=4))
def test_compiled_and_plain_write_the_same_entry(writer: PacketWriter, decisions: list[tuple[Case, Answer]]) -> None:
    batch = writer.batch()
    for number, (case, answer) in enumerate(decisions):
        batch.add(case, answer, made(case, answer, f"decision-{number}"), NOW, WALL_NS)
    plain = write_entry_plainly(batch._shared, batch._rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.decision.packets._compiled", compiled_here("server.decision.entry_wire_c"))
        assert batch.entry() == plain


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(one=cases())
def test_a_packet_names_the_key_and_the_order_as_a_repeat_does(writer: PacketWriter, one: tuple[Case, Answer]) -> None:
    """What a killed process left is found by it."""
    case, answer = one
    batch, order = writer.batch(), case.order
    batch.add(case, answer, made(case, answer), NOW, WALL_NS)
    (packet,) = packets(entry_of(batch.entry()))
    assert packet.caller == (order.caller if order.idempotency_key else "")
    assert identify(packet.order, "") == identify(order.message, "")


def test_an_entry_says_once_what_its_decisions_have_in_common(writer: PacketWriter) -> None:
    known = snapshot()

    def case() -> Case:
        case = new_case(values=VECTORS[1])
        case.snapshot, case.snapshot_age_seconds = known, 0.25
        case.attempts.append(Attempt("primary", "success", 0.001, "ab" * 8, 2))
        return case

    batch = written(writer, (case(), SCORED), (case(), SCORED)).decisions
    assert len(batch.orders) == len(batch.answers) == len(batch.books) == len(batch.attempts) == 1
    assert list(batch.model_inputs) == [VECTORS[1].tobytes()]
    assert (batch.shared.instance_id, batch.shared.trading_state) == ("server-1", "HALTED")
    assert list(batch.shared.flags_on) == ["cached_score", "embedded", "out_of_domain"]
    assert not batch.rest


def test_what_happens_to_a_decision_later_is_not_in_its_packet(writer: PacketWriter) -> None:
    case = new_case()
    decided = made(case, SCORED)
    before = decided.wire
    batch = writer.batch()
    batch.add(case, SCORED, decided, NOW, WALL_NS)
    decided.abstain(pb.REASON_CODE_AUDIT_LATE)
    decided.charge_audit(case.budget, 0.01, NOW, NOW + 0.02)
    case.attempts.append(Attempt("primary", "timeout", 0.001, ""))
    case.degradations.append(pb.DEGRADATION_PRIMARY_TIMEOUT)
    (packet,) = packets(entry_of(batch.entry()))
    recorded = pb.Decision.FromString(before)
    assert (packet.decision.action, list(packet.decision.reasons)) == (recorded.action, list(recorded.reasons))
    assert packet.decision.budget == recorded.budget
    assert not packet.attempts
    assert not packet.decision.degradations


def test_decisions_under_another_control_state_are_another_entry(control: ControlState) -> None:
    writer = PacketWriter("server-1", "hash", "fsync", control)
    before = writer.batch()
    writer.config_hash = "another"
    assert not before.can_join(writer.batch())
    assert writer.batch().can_join(writer.batch())


def test_a_packet_without_features_says_so(writer: PacketWriter) -> None:
    case = new_case(problem=pb.REASON_CODE_FEATURES_MISSING, mid=math.nan)
    packet = packet_of(written(writer, (case, ABSTAINED)), 0)
    assert (packet.model_input, packet.feature_set_id, packet.mid_price) == (b"", "", 0.0)
    assert not packet.HasField("features")


def test_a_packet_with_the_callers_own_features_still_says_what_the_server_knew(writer: PacketWriter) -> None:
    own = np.ones(features.N_FEATURES, dtype=np.float32)
    case = new_case(caller_features=own, values=own)
    case.snapshot, case.snapshot_age_seconds = snapshot(), 0.25
    packet = packet_of(written(writer, (case, SCORED)), 0)
    assert packet.features.from_caller
    assert (packet.features.sequence, packet.features.age_seconds) == (42, 0.25)


def test_settings_are_kept_under_the_hash_that_packets_name(writer: PacketWriter) -> None:
    entry = packet_pb2.JournalEntry.FromString(writer.settings('{"a":1}', "1.2.3", 7)).settings
    assert (entry.config_hash, entry.settings_json) == ("hash", '{"a":1}')
    assert (entry.software_version, entry.instance_id, entry.recorded_at_ns) == ("1.2.3", "server-1", 7)


def test_settings_in_the_audit_hold_no_password(writer: PacketWriter) -> None:
    urls = {"redis_url": "redis://user:hunter2@r:6379", "database_url": "postgresql+psycopg://user:hunter2@p/audit"}
    settings = Settings.model_validate(urls)
    entry = writer.settings(settings.model_dump_json(), "1.0", 1)
    assert b"hunter2" not in entry
    assert hash_of(packet_pb2.JournalEntry.FromString(entry).settings.settings_json) == settings.config_hash()
