"""The reply and the audit packet of a decision."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cases import new_case

from fallback.order import Answer, Attempt
from feature_cache import features
from feature_cache.store.codec import BookState, FeatureSnapshot
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.control.file import ControlFile
from server.control.state import ControlSettings, ControlState
from server.decision import record
from server.decision.record import hash_of
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


def decided(answer: Answer = SCORED, age_seconds: float = math.nan) -> record.Decided:
    case = new_case()
    case.feature_age_seconds = age_seconds
    return record.Decided(
        case, answer, answer.action, [answer.reason], "decision-1", 1_000.01, 1_700_000_000_123_456_789
    )


def read(decided: record.Decided) -> pb.Decision:
    return pb.Decision.FromString(decided.wire)


def test_a_scored_decision_carries_score_threshold_and_model() -> None:
    message = read(decided(age_seconds=0.25))
    assert (message.score, message.threshold) == (0.75, 0.5)
    assert (message.model_name, message.model_version) == ("champion", "ab" * 8)
    assert message.feature_age.ToNanoseconds() == 250_000_000
    assert message.decided_at.ToNanoseconds() == 1_700_000_000_123_456_789
    assert message.budget.allowed_us == pytest.approx(50_000, abs=1)
    assert message.budget.used_us == pytest.approx(10_000, abs=1)


def test_an_abstention_carries_none() -> None:
    message = read(decided(ABSTAINED))
    assert not message.HasField("score")
    assert not message.HasField("threshold")
    assert not message.HasField("feature_age")
    assert (message.model_name, message.model_version) == ("", "")


@given(
    arrived=st.floats(0, 1e7),
    steps=st.lists(st.tuples(st.floats(0, 0.05), st.floats(0, 0.05), st.floats(0, 1)), max_size=8),
    audit=st.floats(0, 0.05),
)
def test_the_stages_together_never_use_more_than_the_whole(
    arrived: float, steps: list[tuple[float, float, float]], audit: float
) -> None:
    """`steps` holds (time between stages, time of the stage, allowance)."""
    case = new_case(arrived=arrived)
    now = arrived
    for between, used, allowed in steps:
        started = now + between
        now = started + used
        case.budget.charge(pb.STAGE_PRIMARY, allowed, now - started)
    made = record.Decided(case, ABSTAINED, ABSTAINED.action, [ABSTAINED.reason], "decision-1", now, 0)
    message = read(made)
    assert sum(stage.used_us for stage in message.budget.stages) <= message.budget.used_us + 1
    made.charge_audit(case.budget, audit, now, now + audit)
    message = read(made)
    assert [stage.stage for stage in message.budget.stages] == [pb.STAGE_PRIMARY] * len(steps) + [pb.STAGE_AUDIT]
    assert sum(stage.used_us for stage in message.budget.stages) <= message.budget.used_us + 1


@pytest.fixture
def packets(tmp_path: Path) -> record.PacketWriter:
    journal = Journal(JournalSettings(path=tmp_path / "journal.db"))
    control = ControlState(
        ControlSettings(shadow=False, halted=True),
        ControlFile(tmp_path / "control.json"),
        {},
        journal,
        "server-1",
        str,
        lambda: 0,
        lambda: 0.0,
    )
    return record.PacketWriter("server-1", "hash", "fsync", control)


def snapshot() -> FeatureSnapshot:
    values = np.zeros(features.N_FEATURES, dtype=np.float32)
    return FeatureSnapshot("BTCUSDT.BINANCE", 42, 7, 7, 7, 7, 0, 99.0, 101.0, BookState.VALID, values)


def test_a_packet_holds_what_proves_the_decision(packets: record.PacketWriter) -> None:
    case = new_case(values=np.arange(features.N_FEATURES, dtype=np.float32))
    case.snapshot, case.snapshot_age_seconds = snapshot(), 0.25
    case.attempts.append(Attempt("primary", "transport", 0.001, ""))
    case.attempts.append(Attempt("secondary", "success", 0.002, "ab" * 8, 7, 5))
    made = decided()
    entry = packet_pb2.JournalEntry.FromString(packets.packet(case, SCORED, made, 1_000.01))
    packet = entry.decision
    assert packet.order == case.order.message
    assert packet.decision == read(made)
    assert np.frombuffer(packet.model_input, dtype="<f4").tolist() == list(range(features.N_FEATURES))
    assert packet.feature_set_id == "mf1"
    assert (packet.features.sequence, packet.features.age_us, packet.features.from_caller) == (42, 250_000, False)
    assert (packet.features.age_seconds, packet.features.book_state) == (0.25, packet_pb2.BOOK_STATE_VALID)
    assert (packet.attempts[1].batch_rows, packet.attempts[1].batch_index) == (7, 5)
    assert [(a.replica, a.outcome, a.used_us) for a in packet.attempts] == [
        ("primary", "transport", 1_000),
        ("secondary", "success", 2_000),
    ]
    assert (packet.mid_price, packet.trading_state, list(packet.flags_on)) == (
        100.0,
        "HALTED",
        ["cached_score", "embedded"],
    )
    assert (packet.instance_id, packet.config_hash, packet.durability) == ("server-1", "hash", "fsync")
    assert packet.decided_monotonic_ns - packet.arrived_monotonic_ns == pytest.approx(10_000_000, abs=1_000)


def test_a_packet_without_features_says_so(packets: record.PacketWriter) -> None:
    case = new_case(problem=pb.REASON_CODE_FEATURES_MISSING, mid=math.nan)
    packet = packet_pb2.JournalEntry.FromString(packets.packet(case, ABSTAINED, decided(ABSTAINED), 1_000.0)).decision
    assert (packet.model_input, packet.feature_set_id, packet.mid_price) == (b"", "", 0.0)
    assert not packet.HasField("features")


def test_a_packet_with_the_callers_own_features_still_says_what_the_server_knew(packets: record.PacketWriter) -> None:
    own = np.ones(features.N_FEATURES, dtype=np.float32)
    case = new_case(caller_features=own, values=own)
    case.snapshot, case.snapshot_age_seconds = snapshot(), 0.25
    packet = packet_pb2.JournalEntry.FromString(packets.packet(case, SCORED, decided(), 1_000.0)).decision
    assert packet.features.from_caller
    assert (packet.features.sequence, packet.features.age_seconds) == (42, 0.25)


def test_settings_are_kept_under_the_hash_that_packets_name(packets: record.PacketWriter) -> None:
    entry = packet_pb2.JournalEntry.FromString(packets.settings('{"a":1}', "1.2.3", 7)).settings
    assert (entry.config_hash, entry.settings_json) == ("hash", '{"a":1}')
    assert (entry.software_version, entry.instance_id, entry.recorded_at_ns) == ("1.2.3", "server-1", 7)


def test_settings_in_the_audit_hold_no_password(packets: record.PacketWriter) -> None:
    urls = {"redis_url": "redis://user:hunter2@r:6379", "database_url": "postgresql+psycopg://user:hunter2@p/audit"}
    settings = Settings.model_validate(urls)
    entry = packets.settings(settings.model_dump_json(), "1.0", 1)
    assert b"hunter2" not in entry
    assert hash_of(packet_pb2.JournalEntry.FromString(entry).settings.settings_json) == settings.config_hash()
