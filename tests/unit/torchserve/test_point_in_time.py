"""Features at the times of other people's orders: what was known then, and nothing that came later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from feature_cache import features
from feature_cache.sources.simulator import simulate
from pretrade.client.cli.main import app
from pretrade.market.v1 import market_pb2 as pb
from torchserve.dataset import SamplesError, collect
from torchserve.point_in_time import MAX_AGE_NS, known_at, read_orders, with_features

BTC = "BTCUSDT.SIM"
EVENTS = list(simulate(11, duration_seconds=24))
FIRST, LAST = EVENTS[0].event_time_ns, EVENTS[-1].event_time_ns


def test_orders_at_the_instants_of_a_dataset_have_its_rows_to_the_bit() -> None:
    samples = collect(EVENTS, "")
    shuffled = np.random.default_rng(1).permutation(len(samples.rows))
    samples = samples.take(shuffled)
    orders = pa.table(
        {
            "instrument": [samples.instruments[number] for number in samples.instrument],
            "time": pa.array(samples.time_ns, pa.timestamp("ns", tz="UTC")),
            "side": ["sell" if sell else "buy" for sell in samples.sell],
        }
    )
    joined = with_features(orders, EVENTS)
    assert len(joined) > 100
    for index, name in enumerate(features.NAMES):
        np.testing.assert_array_equal(joined.column(name).to_numpy(), samples.rows[:, index])


def test_nothing_that_is_received_later_changes_what_is_known() -> None:
    times = np.linspace(FIRST, LAST, 50).astype(np.int64)
    wanted = known_at(EVENTS, [BTC] * 50, times)
    assert np.isfinite(wanted[25:, features.INDEX["ret_5s_bps"]]).all()
    for cut in (20, 35):
        earlier = (event for event in EVENTS if event.event_time_ns < times[cut])
        np.testing.assert_array_equal(known_at(earlier, [BTC] * (cut + 1), times[: cut + 1]), wanted[: cut + 1])


def test_before_the_first_event_and_long_after_the_last_nothing_is_known() -> None:
    last = max(event.event_time_ns for event in EVENTS if event.instrument == BTC)
    times = np.array([FIRST - 1, FIRST, last + MAX_AGE_NS, last + MAX_AGE_NS + 1, last + 1])
    rows = known_at(EVENTS, [BTC, BTC, BTC, BTC, "X.SIM"], times)
    assert np.isnan(rows[[0, 1, 3, 4]]).all()
    assert rows[2, features.INDEX["book_age_ms"]] >= 10_000
    assert np.isfinite(rows[2, features.INDEX["spread_bps"]])


def csv_rows() -> Iterator[str]:
    yield "exchange,symbol,timestamp,local_timestamp,is_snapshot,side,price,amount\n"
    yield "okex,X,1723161255000000,1723161255000000,true,bid,99,1\n"
    yield "okex,X,1723161255000000,1723161255000000,true,ask,101,3\n"
    yield "okex,X,1723161256000000,1723161256000000,false,ask,101,1\n"


def test_the_command_keeps_the_columns_of_the_orders_and_adds_the_features(tmp_path: Path) -> None:
    (tmp_path / "book.csv").write_text("".join(csv_rows()))
    (tmp_path / "orders.csv").write_text(
        "instrument,time,side,note\n"
        "X.OKEX,2024-08-08T23:54:16.5Z,sell,late\n"
        "X.OKEX,2024-08-08T23:54:15.5Z,sell,early\n"
        "X.OKEX,2024-08-08T23:54:15.5Z,buy,early\n"
        "Y.OKEX,2024-08-08T23:54:15.5Z,buy,other\n"
    )
    out = tmp_path / "out.parquet"
    given = [str(tmp_path / "orders.csv"), str(tmp_path / "book.csv"), "--out", str(out)]
    ended = CliRunner().invoke(app, ["dataset", "features", *given], env={"COLUMNS": "400"})
    assert ended.exit_code == 0, ended.output
    assert "4 orders, 3 with a known book" in ended.output
    joined = pq.read_table(out)
    assert joined.column_names == ["instrument", "time", "side", "note", *features.NAMES]
    assert joined.column("note").to_pylist() == ["late", "early", "early", "other"]
    np.testing.assert_array_equal(
        joined.column("imbalance_l1").to_numpy(), np.array([0, 0.5, -0.5, np.nan], np.float32)
    )
    np.testing.assert_array_equal(
        joined.column("book_age_ms").to_numpy(), np.array([500, 500, 500, np.nan], np.float32)
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("instrument,when\nX,1\n", "has no column 'time'; it has instrument, when"),
        ("instrument,time,imbalance_l1\nX,1,2\n", "has features already: imbalance_l1"),
        ("instrument,time\nX,noon\n", "time must be a date and time in UTC, or nanoseconds"),
        ("instrument,time\nX,\nX,1\n", "every order needs an instrument and a time"),
        ("instrument,time,side\nX,1,hold\n", "side must be buy or sell, not 'hold'"),
        ("", "orders.csv: "),
    ],
)
def test_orders_that_cannot_be_used_are_refused_with_the_rule(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "orders.csv"
    path.write_text(text)
    with pytest.raises(SamplesError, match=said):
        read_orders(path)


def test_times_may_be_nanoseconds(tmp_path: Path) -> None:
    path = tmp_path / "orders.parquet"
    pq.write_table(pa.table({"instrument": [BTC], "time": [LAST]}), path)
    joined = with_features(read_orders(path), EVENTS)
    np.testing.assert_array_equal(
        [joined.column(name)[0].as_py() for name in features.NAMES],
        known_at(EVENTS, [BTC], np.array([LAST]))[0].astype(float),
    )


def test_an_event_that_is_not_usable_answers_nothing() -> None:
    broken = pb.MarketEvent()
    broken.CopyFrom(next(event for event in EVENTS if event.HasField("trade") and event.instrument == BTC))
    broken.trade.lots = -1
    broken.event_time_ns = LAST + 5
    times = np.array([LAST + 3])
    np.testing.assert_array_equal(known_at([*EVENTS, broken], [BTC], times), known_at(EVENTS, [BTC], times))
