"""Features at the times of other people's orders: what was known then, and nothing that came later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from support.guest_sets import ALL, RECORDED, know
from typer.testing import CliRunner

from feature_cache import features
from feature_cache.feature_set import CALLER, Feature, FeatureSet, FeatureSetError
from feature_cache.feature_sets import Registered
from feature_cache.sources.simulator import simulate
from pretrade.client.cli.main import app
from pretrade.market.v1 import market_pb2 as pb
from torchserve.dataset import Samples, SamplesError, collect
from torchserve.point_in_time import MAX_AGE_NS, known_at, read_orders, with_features
from torchserve.sources import load_events

BTC = "BTCUSDT.SIM"
EVENTS = list(simulate(11, duration_seconds=24))
FIRST, LAST = EVENTS[0].event_time_ns, EVENTS[-1].event_time_ns
DESK = FeatureSet(
    "desk",
    (
        Feature("urgency", "", "Theirs.", 0.0, 1.0, source=CALLER),
        Feature("last_ticks", "", "Ours: the last trade's price, and its sign says nothing.", signed=True),
        Feature("book_age_ms", "ms", "Copied.", lowest=0.0, is_age=True, source="mf1"),
        Feature("ofi_1s", "", "Copied.", signed=True, source="mf1"),
    ),
)


class LastPrice:
    def __init__(self, instrument: str) -> None:
        self.instrument = instrument
        self.ticks = np.nan

    def on_event(self, event: pb.MarketEvent) -> None:
        assert event.instrument == self.instrument
        if event.HasField("trade"):
            self.ticks = event.trade.price_ticks

    def values(self) -> NDArray[np.float32]:
        return np.array([self.ticks], dtype=np.float32)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> FeatureSet:
    know(monkeypatch, Registered(DESK, LastPrice, "the tests"))
    return DESK


def test_orders_at_the_instants_of_a_dataset_have_its_rows_to_the_bit() -> None:
    samples = collect(EVENTS, "")
    shuffled = np.random.default_rng(1).permutation(len(samples.rows))
    samples = samples.take(shuffled)
    joined = with_features(orders_at(samples), EVENTS)
    assert len(joined) > 100
    for index, name in enumerate(features.NAMES):
        np.testing.assert_array_equal(joined.column(name).to_numpy(), samples.rows[:, index])


def orders_at(samples: Samples) -> pa.Table:
    return pa.table(
        {
            "instrument": [samples.instruments[number] for number in samples.instrument],
            "time": pa.array(samples.time_ns, pa.timestamp("ns", tz="UTC")),
            "side": ["sell" if sell else "buy" for sell in samples.sell],
        }
    )


def test_of_another_set_too_the_rows_are_those_of_a_dataset_beside_those_of_mf1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    know(monkeypatch, *ALL)
    samples, of_mf1 = collect(EVENTS, "", feature_set=RECORDED), collect(EVENTS, "")
    assert samples.beside is not None
    np.testing.assert_array_equal(samples.beside, of_mf1.rows)
    assert samples.of_mf1.sha256() == of_mf1.sha256() != samples.sha256()
    for name in ("imbalance_l1", "weighted_mid_bps", "book_age_ms"):
        np.testing.assert_array_equal(
            samples.rows[:, RECORDED.index[name]], of_mf1.rows[:, features.INDEX[name]], err_msg=name
        )
    assert len(np.unique(samples.rows[:, RECORDED.index["bought"]])) > 20
    joined = with_features(orders_at(samples), EVENTS, RECORDED)
    for index, name in enumerate(RECORDED.names):
        np.testing.assert_array_equal(joined.column(name).to_numpy(), samples.rows[:, index])


def test_computers_of_another_set_see_instruments_that_no_order_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()

    class Elsewhere:
        def __init__(self, instrument: str) -> None:
            self.instrument = instrument

        def on_event(self, event: pb.MarketEvent) -> None:
            seen[self.instrument] += 1

        def values(self) -> NDArray[np.float32]:
            return np.array([seen.total() - seen[self.instrument]], dtype=np.float32)

    lead = FeatureSet("lead", (Feature("elsewhere", "", "Events of other instruments."),))
    know(monkeypatch, Registered(lead, Elsewhere, "the tests"))
    rows = known_at(load_events([], {BTC}, lead, seed=11, simulated_seconds=24), [BTC], np.array([LAST]), lead)
    assert rows[0, 0] > 1_000
    assert {event.instrument for event in load_events([], {BTC}, seed=11, simulated_seconds=5)} == {BTC}


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


def test_orders_get_a_mixed_set_from_engine_computer_and_caller(desk: FeatureSet) -> None:
    times = np.linspace(FIRST + 10**9, LAST, 40).astype(np.int64)
    urgency = np.linspace(0, 1, 40, dtype=np.float32)
    orders = pa.table({"instrument": [BTC] * 40, "urgency": urgency, "time": times, "side": ["buy", "sell"] * 20})
    joined = with_features(orders, EVENTS, desk)
    assert joined.column_names == ["instrument", "time", "side", *desk.names]
    np.testing.assert_array_equal(joined.column("urgency").to_numpy(), urgency)
    of_mf1 = with_features(orders.drop_columns("urgency"), EVENTS)
    for name in ("book_age_ms", "ofi_1s"):
        np.testing.assert_array_equal(joined.column(name).to_numpy(), of_mf1.column(name).to_numpy())
    of_btc = [event for event in EVENTS if event.instrument == BTC]
    for place, at in enumerate(times.tolist()):
        # All that was received before the first event of the instant or later, and nothing else.
        first = next((number for number, one in enumerate(of_btc) if one.event_time_ns >= at), len(of_btc))
        ticks = [one.trade.price_ticks for one in of_btc[:first] if one.HasField("trade")]
        turned = -1.0 if place % 2 else 1.0
        assert joined.column("last_ticks")[place].as_py() == np.float32(turned * ticks[-1])


def test_while_the_book_is_unknown_nothing_of_a_mixed_set_is_known(desk: FeatureSet) -> None:
    reset = pb.MarketEvent(instrument=BTC, event_time_ns=LAST + 1, receive_time_ns=LAST + 1)
    reset.price_decimals, reset.size_decimals = EVENTS[0].price_decimals, EVENTS[0].size_decimals
    reset.reset.SetInParent()
    times = np.array([LAST + 1, LAST + 2])
    rows = known_at([*EVENTS, reset], [BTC] * 2, times, desk)
    assert np.isfinite(rows[0, 1:]).all()
    assert np.isnan(rows[1]).all()


def test_what_a_computer_must_not_give_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = FeatureSet("narrow", (Feature("last_ticks", "", "Ours.", 0.0, 1.0),))
    know(monkeypatch, Registered(narrow, LastPrice, "sets.py"))
    with pytest.raises(FeatureSetError, match=r"narrow of sets\.py: last_ticks is .* from 0 to 1"):
        known_at(EVENTS, [BTC], np.array([LAST]), narrow)


@pytest.mark.parametrize(
    ("brought", "said"),
    [
        (pa.array([0.5, 1.5]), "column urgency must be finite and from 0 to 1, not 1.5"),
        (pa.array(["high", "low"]), "column urgency must hold numbers"),
    ],
)
def test_what_a_caller_could_not_bring_is_refused(desk: FeatureSet, brought: pa.Array, said: str) -> None:
    orders = pa.table({"instrument": [BTC] * 2, "time": [LAST] * 2, "urgency": brought})
    with pytest.raises(SamplesError, match=said):
        with_features(orders, EVENTS, desk)


def test_a_caller_may_leave_out_only_what_the_set_allows(desk: FeatureSet, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = pa.table({"instrument": [BTC] * 2, "time": [LAST] * 2, "urgency": pa.array([None, 0.5], pa.float64())})
    np.testing.assert_array_equal(with_features(orders, EVENTS, desk).column("urgency").to_numpy(), [np.nan, 0.5])
    strict = FeatureSet("strict", (Feature("urgency", "", "Theirs.", source=CALLER, may_be_undefined=False),))
    know(monkeypatch, Registered(strict, None, "the tests"))
    with pytest.raises(SamplesError, match="column urgency has holes, and strict does not allow an order without it"):
        with_features(orders, EVENTS, strict)


def test_orders_must_have_a_column_for_what_callers_bring(tmp_path: Path, desk: FeatureSet) -> None:
    path = tmp_path / "orders.csv"
    path.write_text("instrument,time\nX,1\n")
    with pytest.raises(SamplesError, match="has no column urgency, which callers bring with their orders"):
        read_orders(path, desk)


@pytest.mark.long
def test_without_recordings_the_command_takes_the_session_that_datasets_are_built_of(
    tmp_path: Path, desk: FeatureSet
) -> None:
    dataset, out = tmp_path / "dataset.parquet", tmp_path / "out.parquet"
    run = CliRunner()
    session = ["--seed", "3", "--seconds", "60"]
    built = run.invoke(app, ["dataset", "build", *session, "--out", str(dataset)])
    assert built.exit_code == 0, built.output
    table = pq.read_table(dataset)
    orders = pa.table(
        {
            "instrument": table.column("instrument").cast(pa.string()),
            "time": table.column("time"),
            "side": ["sell" if sell else "buy" for sell in table.column("sell").to_pylist()],
            "urgency": np.full(len(table), 0.25),
        }
    )
    pq.write_table(orders, tmp_path / "orders.parquet")
    given = ["dataset", "features", str(tmp_path / "orders.parquet"), "--features", "desk", *session, "--out", str(out)]
    ended = run.invoke(app, given, env={"COLUMNS": "400"})
    assert ended.exit_code == 0, ended.output
    assert f"{len(table):,} orders, {len(table):,} with a known book" in ended.output
    np.testing.assert_array_equal(pq.read_table(out).column("ofi_1s").to_numpy(), table.column("ofi_1s").to_numpy())
    pq.write_table(orders.set_column(0, "instrument", pa.array(["X.OKEX"] * len(table))), tmp_path / "orders.parquet")
    refused = run.invoke(app, given, env={"COLUMNS": "400"})
    assert refused.exit_code == 1
    assert "without recordings the market is simulated: X.OKEX" in refused.output


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
        ("", "orders.csv is no CSV that can be read: "),
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
