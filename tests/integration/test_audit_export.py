"""Cold storage: what was exported is opened as its users open it, and holds the evidence."""

from __future__ import annotations

import datetime as dt
import hashlib
from contextlib import closing
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from support.batches import together
from support.guest_sets import MIXED, REGISTERED, know
from typer.testing import CliRunner

from feature_cache.feature_sets import Registered
from feature_cache.features import MF1
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.commands import app
from server.audit.store.store import Store
from server.journal.journal_file import GENESIS, Head, Row, follow, link

JOURNAL = "journal-1"
YESTERDAY = dt.datetime.now(dt.UTC).replace(hour=12) - dt.timedelta(days=1)
ROWS = 6_000
TOGETHER = 32
"""Decisions of an entry."""


@pytest.fixture(scope="module")
def random() -> np.random.Generator:
    return np.random.default_rng(5)


def packet(i: int, random: np.random.Generator) -> packet_pb2.DecisionPacket:
    """A decision as the server writes it, with everything that varies from one to the next."""
    whole = packet_pb2.DecisionPacket()
    order, answer = whole.order, whole.decision
    at = YESTERDAY + dt.timedelta(seconds=i / 1000) + (dt.timedelta(days=1) if i >= ROWS - 100 else dt.timedelta())
    at_ns = int(at.timestamp() * 1e9)
    order.instrument, order.side = ("BTCUSDT.BINANCE", "ETHUSDT.BINANCE")[i % 2], pb.SIDE_BUY
    order.quantity, order.limit_price = round(random.exponential(0.05), 4), round(61_000 + random.normal(0, 50), 2)
    order.strategy, order.order_ref = "twap", f"order-{i}"
    answer.decision_id = f"{at_ns // 1_000_000:012x}7{random.bytes(10).hex()}"
    answer.order_ref, answer.action, answer.source = order.order_ref, pb.ACTION_TRADE, pb.SOURCE_PRIMARY
    answer.reasons.append(pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD)
    answer.score, answer.threshold = random.uniform(0.7, 1.0), 0.7
    answer.model_name, answer.model_version = "champion", "0123456789abcdef"
    answer.feature_age.FromMicroseconds(int(random.integers(20_000)))
    answer.decided_at.FromNanoseconds(at_ns)
    answer.budget.used_us, answer.budget.allowed_us = int(random.integers(9_000)), 20_000
    for stage in (pb.STAGE_FEATURES, pb.STAGE_PRIMARY, pb.STAGE_GUARDS):
        answer.budget.stages.add(stage=stage, allowed_us=20_000, used_us=int(random.integers(5_000)))
    whole.model_input = random.normal(size=len(MF1)).astype("<f4").tobytes()
    whole.feature_set_id = MF1.id
    if i % 60 == 0:
        whole.scored_input = np.array([i, np.nan, 0.5], dtype="<f4").tobytes()
        whole.scored_feature_set = MIXED.version
    if i % 600 == 0:
        whole.parts.add(model_version="a" * 16, weight=0.25, score=float(np.float32(i / ROWS)))
        whole.parts.add(model_version="b" * 16, weight=0.75, score=0.5)
    whole.features.sequence, whole.features.event_time_ns = i, at_ns - int(random.integers(20_000_000))
    whole.features.age_us = int(random.integers(20_000))
    whole.attempts.add(
        replica="primary", outcome="success", used_us=int(random.integers(5_000)), model_version="0123456789abcdef"
    )
    whole.arrived_monotonic_ns, whole.decided_monotonic_ns = at_ns, at_ns + int(random.integers(9_000_000))
    whole.instance_id, whole.config_hash, whole.durability = "server-1", "0123456789abcdef", "fsync"
    whole.trading_state, whole.mid_price = "ACTIVE", 61_000.5
    whole.flags_on.extend(["shadow", "cached_score"])
    return whole


@pytest.fixture(scope="module")
def packets(random: np.random.Generator) -> list[packet_pb2.DecisionPacket]:
    return [packet(i, random) for i in range(ROWS)]


@pytest.fixture(scope="module")
def rows(packets: list[packet_pb2.DecisionPacket]) -> list[Row]:
    """The entries of a journal, with some decisions each."""
    head, rows = Head(0, GENESIS), []
    for first in range(0, ROWS, TOGETHER):
        entry = together(packets[first : first + TOGETHER]).SerializeToString()
        rows.append(Row(head.position + 1, entry, link(head.hash, entry)))
        head = follow(head, rows[-1])
    return rows


@pytest.fixture
def url(audit_url: str, rows: list[Row]) -> str:
    """A database with the decisions of yesterday and a few of today."""
    with closing(Store(audit_url)) as store:
        store.migrate()
        assert store.write(JOURNAL, store.shipped(JOURNAL, Head(0, GENESIS)), rows)
    return audit_url


def export(url: str, to: Path, *options: str) -> str:
    result = CliRunner().invoke(
        app, ["export", "--database-url", url, "--since", f"{YESTERDAY:%Y-%m-%d}", "--to", str(to), *options]
    )
    assert result.exit_code == 0, result.output
    return result.output


def test_duckdb_and_pandas_open_the_export_and_the_evidence_in_it_verifies(
    url: str, rows: list[Row], packets: list[packet_pb2.DecisionPacket], tmp_path: Path
) -> None:
    cold = tmp_path / "cold"
    export(url, cold)
    assert len(list(cold.glob("day=*/instrument=*/decisions.parquet"))) == 4  # two days, two instruments
    assert len(list(cold.rglob("*.parquet"))) == 6  # and their entries
    with duckdb.connect() as duck:
        table = f"read_parquet('{cold}/day=*/*/*.parquet')"
        written = f"SELECT journal_position, journal_row, packet FROM {table} ORDER BY 1, 2"
        exported = duck.execute(written).fetchall()
        entries = f"read_parquet('{cold}/_entries/*/*.parquet')"
        evidence = duck.execute(f"SELECT DISTINCT position, entry, hash FROM {entries} ORDER BY 1").fetchall()
        by_instrument = duck.execute(
            f"SELECT instrument, count(*), min(reasons[1]) FROM {table} WHERE day = '{YESTERDAY:%Y-%m-%d}' GROUP BY 1"
        ).fetchall()
    assert [Row(*one) for one in evidence] == rows
    assert [(position, row) for position, row, _ in exported] == [
        (1 + i // TOGETHER, i % TOGETHER) for i in range(ROWS)
    ]
    assert [packet_pb2.DecisionPacket.FromString(one) for _, _, one in exported] == packets
    assert sorted(by_instrument) == [
        (f"{name}.BINANCE", (ROWS - 100) // 2, "SCORE_AT_OR_ABOVE_THRESHOLD") for name in ("BTCUSDT", "ETHUSDT")
    ]
    frame = pd.read_parquet(cold)
    assert len(frame) == ROWS
    assert frame["decided_at"].dt.tz is not None
    assert set(frame["action"]) == {"TRADE"}
    assert set(frame["features"].map(len)) == {len(MF1)}


@pytest.mark.long
@pytest.mark.parametrize(("known", "names"), [((REGISTERED,), MIXED.names), ((), ("0", "1", "2"))])
def test_what_models_of_another_set_scored_is_queried_by_name_where_the_set_is_known(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: tuple[Registered, ...], names: tuple[str, ...]
) -> None:
    know(monkeypatch, *known)
    export(url, tmp_path / "cold")
    table = f"read_parquet('{tmp_path}/cold/day=*/*/*.parquet')"
    with duckdb.connect() as duck:
        columns = ", ".join(f"scored_features['{name}']" for name in names)
        found = duck.execute(
            f"SELECT {columns} FROM {table} WHERE scored_feature_set = '{MIXED.version}' ORDER BY 1"
        ).fetchall()
        others = f"SELECT count(*) FROM {table} WHERE scored_feature_set IS NULL AND scored_features IS NULL"
        assert duck.execute(others).fetchall() == [(ROWS - len(found),)]
    assert [one[0] for one in found] == list(range(0, ROWS, 60))
    assert all(np.isnan(one[1]) and one[2] == 0.5 for one in found)


def test_what_the_parts_of_an_ensemble_said_is_queried(url: str, tmp_path: Path) -> None:
    export(url, tmp_path / "cold")
    table = f"read_parquet('{tmp_path}/cold/day=*/*/*.parquet')"
    with duckdb.connect() as duck:
        found = duck.execute(
            "SELECT one.model_version, one.weight, sum(one.score), count(*)"
            f" FROM (SELECT unnest(parts) AS one FROM {table}) GROUP BY ALL ORDER BY 1"
        ).fetchall()
        others = duck.execute(f"SELECT count(*) FROM {table} WHERE parts IS NULL").fetchall()
    scores = [np.float32(i / ROWS) for i in range(0, ROWS, 600)]
    assert found == [
        ("a" * 16, 0.25, pytest.approx(sum(scores)), len(scores)),
        ("b" * 16, 0.75, len(scores) / 2, len(scores)),
    ]
    assert others == [(ROWS - len(scores),)]


def test_a_packet_takes_little_space(url: str, tmp_path: Path) -> None:
    export(url, tmp_path / "cold")
    size = sum(file.stat().st_size for file in (tmp_path / "cold").rglob("*.parquet"))
    print(f"{size / ROWS:.0f} bytes a packet")
    assert size / ROWS <= 605


@pytest.mark.long
def test_an_export_that_is_repeated_gives_the_same_files_and_one_that_was_interrupted_is_completed(
    url: str, tmp_path: Path
) -> None:
    def content() -> dict[Path, str]:
        files = (file for file in (tmp_path / "cold").rglob("*") if file.is_file())
        return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    first_output = export(url, tmp_path / "cold")
    first = content()
    lost = next(iter(first))
    lost.rename(lost.with_name(f".{lost.name}.partial"))  # as a run that was killed leaves it
    assert export(url, tmp_path / "cold") == first_output
    assert content() == first


def test_only_the_days_asked_for_are_written(url: str, tmp_path: Path) -> None:
    export(url, tmp_path / "cold", "--until", f"{YESTERDAY:%Y-%m-%d}")
    assert {one.name for one in (tmp_path / "cold").rglob("day=*")} == {f"day={YESTERDAY:%Y-%m-%d}"}


def test_a_last_day_before_the_first_is_refused(tmp_path: Path) -> None:
    days = ("--since", "2026-11-21", "--until", "2026-11-20")
    url = f"sqlite:///{tmp_path / 'audit.db'}"
    result = CliRunner().invoke(app, ["export", "--database-url", url, "--to", str(tmp_path / "cold"), *days])
    assert result.exit_code == 2
    assert "must not be before --since" in result.stderr


def test_a_destination_that_cannot_be_written_is_a_clear_error(tmp_path: Path, rows: list[Row]) -> None:
    url = f"sqlite:///{tmp_path / 'audit.db'}"
    with closing(Store(url)) as store:
        store.migrate()
        store.write(JOURNAL, store.shipped(JOURNAL, Head(0, GENESIS)), rows[:10])
    (tmp_path / "file").touch()
    for to in (f"{tmp_path}/file/below", "nonsense://bucket"):
        since = f"{YESTERDAY:%Y-%m-%d}"
        result = CliRunner().invoke(app, ["export", "--database-url", url, "--since", since, "--to", to])
        assert result.exit_code == 1
        assert result.stderr.startswith("pretrade audit: ")
