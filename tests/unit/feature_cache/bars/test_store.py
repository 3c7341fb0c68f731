from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import psycopg
import pyarrow.parquet
import pytest
import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.engine import make_url

from feature_cache.bars.bar import SECOND_NS, Bar, Lacks
from feature_cache.bars.parquet import write_day
from feature_cache.bars.store import BARS, COLUMNS, BarStore, BarStoreError, as_row, bar_of, lacks_of

STUB: Final = Path(__file__).parents[3] / "support" / "timescaledb_stub.sql"
DAY: Final = dt.date(2026, 11, 23)
MIDNIGHT_NS: Final = int(dt.datetime(2026, 11, 23, tzinfo=dt.UTC).timestamp()) * SECOND_NS
BAR: Final = Bar(
    instrument="BTCUSDT.TEST",
    start_ns=MIDNIGHT_NS,
    width_ns=SECOND_NS,
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
QUIET: Final = replace(
    BAR,
    start_ns=MIDNIGHT_NS + SECOND_NS,
    open=None,
    high=None,
    low=None,
    close=None,
    trades=0,
    bought=0,
    sold=0,
    lots=0,
    notional=0,
)


@pytest.fixture
def store(audit_url: str) -> Iterator[BarStore]:
    store = BarStore(audit_url)
    assert store.prepare() is False  # no TimescaleDB here
    yield store
    store.close()


def test_a_bar_is_a_row_in_units_that_people_use(store: BarStore) -> None:
    store.write([QUIET, BAR])
    first, second = store.last("BTCUSDT.TEST", "1s", 10)
    assert (first["open"], first["high"], first["low"], first["close"]) == (100.0, 101.0, 99.0, 100.5)
    assert (first["vwap"], first["trades"], first["volume"]) == (100.25, 3, 2.0)
    assert (first["buy_volume"], first["sell_volume"]) == (1.5, 0.5)
    assert (first["mid_open"], first["mid_close"]) == (100.005, 100.5)
    assert first["start"] == dt.datetime(2026, 11, 23, tzinfo=dt.UTC)
    assert first["complete"]
    assert (second["trades"], second["close"], second["vwap"], second["mid_close"]) == (0, None, None, 100.5)


@pytest.mark.parametrize(
    "bar",
    [
        BAR,
        QUIET,
        replace(QUIET, mid_open=None, mid_high=None, mid_low=None, mid_close=None, lacks=Lacks.MID | Lacks.BEGINNING),
        # As Binance's are: eight decimals each, and a notional far beyond 2^53.
        replace(
            BAR,
            price_decimals=8,
            size_decimals=8,
            lots=123_456_789_012,
            notional=1_234_567_890_123_456_789_012,
            open=6_012_345_678_901,
            high=6_012_345_678_903,
            mid_close=12_024_691_357_803,
        ),
    ],
)
def test_a_row_is_the_bar_that_it_was_written_from(store: BarStore, bar: Bar) -> None:
    store.write([bar])
    (row,) = store.last("BTCUSDT.TEST", "1s", 1)
    found = bar_of(row)
    assert replace(found, notional=bar.notional) == bar
    assert repr(found.vwap) == repr(bar.vwap)  # to the bit, or NaN
    if bar.notional < 2**52:
        assert found.notional == bar.notional


def test_the_last_rows_may_end_earlier_than_the_newest(store: BarStore) -> None:
    store.write([replace(BAR, start_ns=MIDNIGHT_NS + second * SECOND_NS) for second in range(5)])
    until = dt.datetime(2026, 11, 23, 0, 0, 3, tzinfo=dt.UTC)
    assert [row["start"].second for row in store.last("BTCUSDT.TEST", "1s", 2, until)] == [2, 3]


def test_a_bar_that_is_made_again_is_never_a_second_row_and_replaces_only_one_that_says_no_more(
    store: BarStore,
) -> None:
    cut = replace(BAR, trades=1, lacks=Lacks.BEGINNING | Lacks.MID)
    store.write([cut])
    store.write([BAR, BAR])
    store.write([cut, replace(BAR, lacks=Lacks.MID)])
    (row,) = store.last("BTCUSDT.TEST", "1s", 10)
    assert row == as_row(BAR)


def test_of_two_that_lack_the_same_the_one_with_more_trades_stays(store: BarStore) -> None:
    longer, shorter = (replace(BAR, trades=count, lacks=Lacks.BEGINNING) for count in (3, 2))
    store.write([longer])
    store.write([shorter])
    (row,) = store.last("BTCUSDT.TEST", "1s", 10)
    assert row["trades"] == 3
    assert lacks_of(row) == "beginning"
    assert not row["complete"]


def test_the_last_rows_come_in_order_and_of_one_interval_and_instrument_only(store: BarStore) -> None:
    others = [replace(BAR, instrument="A.TEST"), replace(BAR, width_ns=10 * SECOND_NS)]
    store.write([replace(BAR, start_ns=MIDNIGHT_NS + n * SECOND_NS) for n in range(5)] + others)
    assert [row["start"].second for row in store.last("BTCUSDT.TEST", "1s", 3)] == [2, 3, 4]
    assert store.instruments() == ["A.TEST", "BTCUSDT.TEST"]
    assert store.last("NONE.TEST", "1s", 3) == []


def test_many_bars_are_written_at_once_and_a_table_that_is_there_is_left_as_it_is(store: BarStore) -> None:
    store.write([replace(BAR, start_ns=MIDNIGHT_NS + n * SECOND_NS) for n in range(1201)])
    store.prepare()
    assert len(store.last("BTCUSDT.TEST", "1s", 5000)) == 1201


def test_a_day_is_a_parquet_file_with_the_same_values_and_its_last_version(store: BarStore, tmp_path: Path) -> None:
    after = replace(BAR, start_ns=MIDNIGHT_NS + 86_400 * SECOND_NS)
    store.write([BAR, QUIET, after, replace(BAR, start_ns=MIDNIGHT_NS - SECOND_NS)])
    for _ in range(2):
        path = write_day(tmp_path / "bars", DAY, store.of_day(DAY))
    assert path.name == "bars-2026-11-23.parquet"
    table = pyarrow.parquet.read_table(path)
    assert table.column_names == list(COLUMNS)
    assert table.to_pylist() == [as_row(BAR), as_row(QUIET)]
    assert [one.name for one in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("mysql://host/name", r"must begin with sqlite:// or postgresql\+psycopg://, not mysql://"),
        ("nonsense", "must be a URL such as sqlite:///"),
    ],
)
def test_a_database_that_is_not_supported_is_refused(url: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        BarStore(url)


def test_a_database_that_is_away_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(BarStoreError, match="refused"):
        BarStore("postgresql+psycopg://nobody@127.0.0.1:1/none").write([BAR])
    with pytest.raises(BarStoreError, match="no such table"):
        (empty := BarStore(f"sqlite:///{tmp_path / 'empty.db'}")).instruments()
    empty.close()


@pytest.fixture
def with_timescaledb(database_url: str) -> Iterator[str]:
    """URL of an empty PostgreSQL database that has an extension of this name, which stands in for the real one."""
    with TemporaryDirectory() as directory:  # of which PostgreSQL, another user, must be able to read
        extension = Path(directory) / "extension"
        extension.mkdir()
        (extension / "timescaledb.control").write_text("default_version = '2.23.0'\n")
        (extension / "timescaledb--2.23.0.sql").write_text(STUB.read_text())
        Path(directory).chmod(0o755)
        with psycopg.connect(libpq(database_url)) as connection:
            path = sql.Literal(f"{directory}:$system")
            connection.execute(sql.SQL("SET extension_control_path = {}").format(path))
            connection.execute("CREATE EXTENSION timescaledb")
        yield database_url


def libpq(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def hypertables(url: str) -> list[tuple[str, str]]:
    with psycopg.connect(libpq(url)) as connection:
        return connection.execute("SELECT relation::text, time_column FROM stub_hypertables").fetchall()


@pytest.mark.stack
def test_where_the_extension_is_there_the_table_becomes_a_hypertable_once_and_is_written_as_ever(
    with_timescaledb: str,
) -> None:
    store = BarStore(with_timescaledb)
    assert store.prepare() is True
    assert hypertables(with_timescaledb) == [("bars", "start")]
    store.write([BAR])
    assert store.prepare() is True, "another process begins"
    assert hypertables(with_timescaledb) == [("bars", "start")]
    store.write([replace(BAR, trades=5), QUIET])
    store.write([replace(BAR, trades=4)])
    assert [row["trades"] for row in store.last("BTCUSDT.TEST", "1s", 10)] == [5, 0], "the better bar stays"
    store.close()


@pytest.mark.stack
def test_a_table_that_has_rows_when_the_extension_comes_becomes_a_hypertable_with_them(with_timescaledb: str) -> None:
    engine = sa.create_engine(with_timescaledb)
    with engine.begin() as connection:
        BARS.create(connection)
        connection.execute(sa.insert(BARS), [as_row(BAR)])
    engine.dispose()
    store = BarStore(with_timescaledb)
    assert store.prepare() is True
    assert hypertables(with_timescaledb) == [("bars", "start")]
    assert len(store.last("BTCUSDT.TEST", "1s", 10)) == 1
    store.close()
