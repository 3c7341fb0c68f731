"""Pages of bars, from a real table."""

from __future__ import annotations

import datetime as dt
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from feature_cache.bars.bar import SECOND_NS, Bar, Lacks
from feature_cache.bars.maker import BarMaker
from feature_cache.bars.store import BarStore
from feature_cache.sources.simulator import simulate
from feature_cache.ta1.indicators import FEATURES
from feature_cache.ta1.series import Series, along
from pretrade.admin.v1 import admin_pb2 as pb
from server.errors import BarsUnavailableError, InvalidRequestError
from server.rpc.bars import page_of

NAME: Final = "A.SIM"
MIDNIGHT_NS: Final = int(dt.datetime(2026, 11, 23, tzinfo=dt.UTC).timestamp()) * SECOND_NS
BAR: Final = Bar(
    instrument=NAME,
    start_ns=MIDNIGHT_NS,
    width_ns=10 * SECOND_NS,
    price_decimals=2,
    size_decimals=3,
    open=100_00,
    high=101_00,
    low=99_00,
    close=100_50,
    trades=3,
    bought=1500,
    sold=500,
    lots=2000,
    notional=2000 * 100_25,
    mid_open=200_01,
    mid_high=202_00,
    mid_low=198_00,
    mid_close=201_00,
    lacks=Lacks.NOTHING,
)


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[BarStore]:
    """A database in which nobody keeps bars."""
    store = BarStore(f"sqlite:///{tmp_path / 'bars.db'}")
    yield store
    store.close()


@pytest.fixture
def store(empty: BarStore) -> BarStore:
    empty.prepare()
    empty.write([replace(BAR, start_ns=MIDNIGHT_NS + number * BAR.width_ns) for number in range(5)])
    return empty


def asked(page_size: int = 2, token: str = "", interval: str = "10s", instrument: str = NAME) -> pb.ListBarsRequest:
    return pb.ListBarsRequest(instrument=instrument, interval=interval, page_size=page_size, page_token=token)


def test_pages_lead_from_the_newest_bars_to_the_oldest_and_none_is_missing_or_there_twice(store: BarStore) -> None:
    token, starts = "", []
    for _ in range(3):
        page = page_of(store, asked(token=token))
        starts.append([(bar.start.seconds - MIDNIGHT_NS // SECOND_NS) // 10 for bar in page.bars])
        token = page.next_page_token
        assert not page.problem
    assert starts == [[3, 4], [1, 2], [0]], "the oldest of a page first"
    assert token == ""
    assert len(page_of(store, asked(0)).bars) == 5


def test_a_bar_has_what_the_table_has_in_units_that_people_use(store: BarStore) -> None:
    (bar,) = page_of(store, asked(1)).bars
    assert (bar.open, bar.high, bar.low, bar.close, bar.vwap) == (100.0, 101.0, 99.0, 100.5, 100.25)
    assert (bar.trades, bar.volume, bar.buy_volume, bar.sell_volume) == (3, 2.0, 1.5, 0.5)
    assert (bar.mid_open, bar.mid_high, bar.mid_low, bar.mid_close) == (100.005, 101.0, 99.0, 100.5)
    assert (bar.complete, list(bar.lacks)) == (True, [])


def test_a_bar_without_a_trade_has_no_prices_and_says_what_it_lacks(store: BarStore) -> None:
    prices = ("open", "high", "low", "close", "mid_open", "mid_high", "mid_low", "mid_close")
    nothing: dict[str, Any] = dict.fromkeys(prices)
    none: dict[str, Any] = dict.fromkeys(("trades", "bought", "sold", "lots", "notional"), 0)
    lacks = Lacks.MID | Lacks.CONTINUITY
    store.write([replace(BAR, start_ns=MIDNIGHT_NS + 5 * BAR.width_ns, **nothing, **none, lacks=lacks)])
    (bar,) = page_of(store, asked(1)).bars
    assert not any(bar.HasField(name) for name in ("open", "high", "low", "close", "vwap", "mid_open", "mid_close"))
    assert (bar.complete, list(bar.lacks)) == (False, ["mid", "continuity"])


def test_where_nobody_keeps_bars_it_is_said_what_to_switch_on(empty: BarStore) -> None:
    page = page_of(empty, asked())
    assert (len(page.bars), page.next_page_token) == (0, "")
    assert "`pretrade up --bars` keeps them" in page.problem


def test_an_instrument_without_a_bar_is_told_from_one_whose_bars_end(store: BarStore) -> None:
    assert "no bar of B.SIM of 10s yet" in page_of(store, asked(instrument="B.SIM")).problem
    beyond = page_of(store, asked(token=str(MIDNIGHT_NS // SECOND_NS)))
    assert (len(beyond.bars), beyond.problem) == (0, "")


def test_a_database_that_cannot_be_read_is_no_database_without_bars(tmp_path: Path) -> None:
    store = BarStore(f"sqlite:///{tmp_path / 'nowhere' / 'bars.db'}")
    with pytest.raises(BarsUnavailableError, match="the database of bars cannot be read: unable to open"):
        page_of(store, asked())
    store.close()


@pytest.fixture
def moving(empty: BarStore) -> list[Bar]:
    """Bars of 650 seconds, in the database: more than the history that indicators have."""
    made: list[Bar] = []
    maker = BarMaker(NAME, made.append)
    for event in simulate(1, [NAME], duration_seconds=652, events_per_second=4):
        maker.on_event(event)
    bars = [bar for bar in made if bar.interval == "1s"][:650]
    empty.prepare()
    empty.write(bars)
    return bars


def test_indicators_are_those_of_a_worker_that_has_found_the_bars_before(empty: BarStore, moving: list[Bar]) -> None:
    names = ("rsi_14", "macd_hist_bps", "obv_20")
    request = asked(10, interval="1s")
    request.indicators.extend(names)
    page = page_of(empty, request)
    worker = Series()
    worker.resume(moving[-610:-10])
    for bar, made in zip(page.bars, moving[-10:], strict=True):
        worker.add(made)
        found = dict(zip((feature.name for feature in FEATURES), worker.values.tolist(), strict=True))
        assert dict(bar.indicators) == {name: found[name] for name in names}
    assert page.next_page_token, "there are older bars"
    assert len(page_of(empty, asked(500, page.next_page_token, "1s")).bars) == 500, "as many as without"


@pytest.mark.long
def test_an_indicator_that_is_not_defined_yet_is_absent(empty: BarStore, moving: list[Bar]) -> None:
    request = asked(20, interval="1s", token=str(moving[20].start_ns // SECOND_NS))
    request.indicators.extend(["rsi_14", "ret_bps"])
    bars = page_of(empty, request).bars
    assert [len(bars), "rsi_14" in bars[5].indicators, "rsi_14" in bars[-1].indicators] == [20, False, True]


def test_after_a_gap_indicators_begin_anew(moving: list[Bar]) -> None:
    after = moving[110:130]
    values = along([*moving[:100], *after], 30)
    fresh = along(after, 20)
    assert all(np.array_equal(one, other, equal_nan=True) for one, other in zip(values[10:], fresh, strict=True))
    assert not np.isnan(values[9]).all()
    assert np.isnan(values[10]).sum() > np.isnan(values[9]).sum()


def test_a_server_without_talib_has_bars_all_the_same_and_says_what_it_lacks(
    store: BarStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "talib", None)
    for name in [name for name in sys.modules if name == "server.rpc.bars" or name.startswith("feature_cache.ta1.")]:
        monkeypatch.delitem(sys.modules, name)
    anew = importlib.import_module("server.rpc.bars")
    request = asked(3)
    request.indicators.append("rsi_14")
    page = anew.page_of(store, request)
    assert (len(page.bars), "pip install 'pretrade-server[ta]'" in page.indicators_problem) == (3, True)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (asked(interval="2m"), "interval: must be one of 1s, 10s, 1m, 5m, not '2m'"),
        (asked(interval=""), "interval: must be one of"),
        (asked(501), "page_size: must be 1 to 500"),
        (pb.ListBarsRequest(interval="1s", indicators=["rsi_15"]), 'indicators: "rsi_15" is none; docs/bars.md'),
        (pb.ListBarsRequest(interval="1s", indicators=["rsi_14"] * 9), "indicators: at most 8 at once"),
        (asked(token="x"), "page_token: must be the next_page_token of an earlier page"),
        (asked(token="9" * 12), "page_token: must be"),
        (asked(token="1" * 5_000), "page_token: must be"),
    ],
)
def test_what_cannot_be_asked_names_the_field_and_the_rule(
    store: BarStore, request_: pb.ListBarsRequest, said: str
) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        page_of(store, request_)
