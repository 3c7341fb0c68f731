"""Bars in SQL, PostgreSQL or SQLite: the table `bars`, one row for each instrument, interval and start.

A bar that is written again replaces the row if it says no less than that: after a restart the same bars are made again
from the log, and the first of them, whose beginning was not read, must not take the place of whole ones.

Where PostgreSQL has the extension `timescaledb`, the table is a hypertable by start; else it is a plain table.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from feature_cache.bars.bar import INTERVALS, SECOND_NS, Bar, Lacks, notional_of

_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_LOCK: Final = 0x5052_4242
"""Key of PostgreSQL's advisory lock: several writers start at once."""
_ROWS: Final = 500
"""Of one statement: PostgreSQL takes 65,535 parameters."""
_NO_LONGER: Final = {"connect_timeout": 5, "tcp_user_timeout": 10_000}
"""Seconds to connect, and milliseconds for which what was sent may stay unacknowledged: else a database that is cut off
would be waited for until the operating system gives up."""
_METADATA: Final = sa.MetaData()

BARS: Final = sa.Table(
    "bars",
    _METADATA,
    sa.Column("instrument", sa.String, primary_key=True),
    sa.Column("interval", sa.String, primary_key=True, comment="1s, 10s, 1m or 5m"),
    sa.Column(
        "start", sa.DateTime(timezone=True), primary_key=True, comment="event time, UTC; its end is the next start"
    ),
    sa.Column("open", sa.Double, comment="prices of trades in the quote currency; NULL without a trade"),
    sa.Column("high", sa.Double),
    sa.Column("low", sa.Double),
    sa.Column("close", sa.Double),
    sa.Column("vwap", sa.Double, comment="mean price by size"),
    sa.Column("trades", sa.BigInteger, nullable=False, comment="0 says that there was none"),
    sa.Column("volume", sa.Double, nullable=False, comment="units of the base"),
    sa.Column("buy_volume", sa.Double, nullable=False, comment="that takers bought"),
    sa.Column("sell_volume", sa.Double, nullable=False, comment="that takers sold"),
    sa.Column("mid_open", sa.Double, comment="mids; NULL where none was known"),
    sa.Column("mid_high", sa.Double),
    sa.Column("mid_low", sa.Double),
    sa.Column("mid_close", sa.Double),
    sa.Column("complete", sa.Boolean, nullable=False, comment="every trade is in it"),
    sa.Column("lacks", sa.SmallInteger, nullable=False, comment="bits: 1 mid, 2 continuity, 4 beginning"),
    sa.Column("price_decimals", sa.SmallInteger, nullable=False, comment="of the venue's prices"),
    sa.Column("size_decimals", sa.SmallInteger, nullable=False, comment="of its sizes"),
)
COLUMNS: Final = tuple(BARS.c.keys())


class BarStoreError(Exception):
    """The database cannot be used; the message says why."""


class BarStore:
    """The table. Every method raises BarStoreError if the database cannot be reached, or refuses.

    Args:
        url: SQLAlchemy URL, for example `sqlite:///bars.db` or `postgresql+psycopg://user@host/database`.

    Raises:
        ValueError: The URL is of no database that is supported.
    """

    def __init__(self, url: str) -> None:
        try:
            parsed = sa.make_url(url)
        except sa.exc.ArgumentError:
            raise ValueError("must be a URL such as sqlite:///bars.db or postgresql+psycopg://user@host/name") from None
        if parsed.drivername not in {"sqlite", "postgresql+psycopg"}:
            raise ValueError(f"must begin with sqlite:// or postgresql+psycopg://, not {parsed.drivername}://")
        self._engine = sa.create_engine(parsed, connect_args={} if parsed.drivername == "sqlite" else _NO_LONGER)
        insert: Any = (sqlite if parsed.drivername == "sqlite" else postgresql).insert(BARS)
        new, key = insert.excluded, [column.name for column in BARS.primary_key]
        says_more = (new.lacks < BARS.c.lacks) | ((new.lacks == BARS.c.lacks) & (new.trades >= BARS.c.trades))
        changed = {name: new[name] for name in COLUMNS if name not in key}
        self._upsert = insert.on_conflict_do_update(index_elements=key, set_=changed, where=says_more)

    def close(self) -> None:
        """Ends its connections."""
        self._engine.dispose()

    def prepare(self) -> bool:
        """Makes the table where there is none.

        Returns:
            Whether it is a hypertable.
        """
        with _Transaction(self._engine) as connection:
            if connection.dialect.name != "postgresql":
                _METADATA.create_all(connection)
                return False
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            _METADATA.create_all(connection)
            if not connection.scalar(sa.text("SELECT 1 FROM pg_extension WHERE extname = 'timescaledb'")):
                return False
            connection.execute(
                sa.text("SELECT create_hypertable('bars', 'start', if_not_exists => true, migrate_data => true)")
            )
            return True

    def write(self, bars: Sequence[Bar]) -> None:
        """Writes bars, all or none of them."""
        rows = [as_row(bar) for bar in bars]
        with _Transaction(self._engine) as connection:
            for first in range(0, len(rows), _ROWS):
                connection.execute(self._upsert, rows[first : first + _ROWS])

    def last(
        self, instrument: str, interval: str, count: int, until: dt.datetime | None = None
    ) -> list[dict[str, Any]]:
        """The newest rows, oldest first; none that starts after `until`."""
        wanted = (BARS.c.instrument == instrument) & (BARS.c.interval == interval)
        if until is not None:
            wanted &= BARS.c.start <= until
        found = self._read(sa.select(BARS).where(wanted).order_by(BARS.c.start.desc()).limit(count))
        return found[::-1]

    def after(self, instrument: str, interval: str, start: dt.datetime) -> list[dict[str, Any]]:
        """All rows that start later, in order."""
        wanted = (BARS.c.instrument == instrument) & (BARS.c.interval == interval) & (BARS.c.start > start)
        return self._read(sa.select(BARS).where(wanted).order_by(BARS.c.start))

    def of_day(self, day: dt.date) -> list[dict[str, Any]]:
        """All rows that start on a day, UTC, in order."""
        start = dt.datetime.combine(day, dt.time(), dt.UTC)
        wanted = (BARS.c.start >= start) & (BARS.c.start < start + dt.timedelta(days=1))
        return self._read(sa.select(BARS).where(wanted).order_by(BARS.c.interval, BARS.c.instrument, BARS.c.start))

    def has_table(self) -> bool:
        """Whether a keeper of bars has ever written here."""
        with _Transaction(self._engine) as connection:
            return sa.inspect(connection).has_table(BARS.name)

    def instruments(self) -> list[str]:
        """The instruments that have bars, by name."""
        found = self._read(sa.select(BARS.c.instrument).distinct().order_by(BARS.c.instrument))
        return [row["instrument"] for row in found]

    def _read(self, statement: sa.Select[Any]) -> list[dict[str, Any]]:
        with _Transaction(self._engine) as connection:
            return [_with_zone(row._asdict()) for row in connection.execute(statement)]


class _Transaction:
    """A transaction whose errors are BarStoreErrors."""

    def __init__(self, engine: sa.Engine) -> None:
        self._begun = engine.begin()

    def __enter__(self) -> sa.Connection:
        try:
            return self._begun.__enter__()
        except sa.exc.SQLAlchemyError as error:
            raise BarStoreError(_reason(error)) from error

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._begun.__exit__(kind, error, trace)
        except sa.exc.SQLAlchemyError as failed:
            raise BarStoreError(_reason(failed)) from failed
        if isinstance(error, sa.exc.SQLAlchemyError):
            raise BarStoreError(_reason(error)) from error


def as_row(bar: Bar) -> dict[str, Any]:
    """A bar as a row of the table."""
    prices = {name: _or_null(bar.price(getattr(bar, name))) for name in ("open", "high", "low", "close")}
    mids = {name: _or_null(bar.mid(getattr(bar, name))) for name in ("mid_open", "mid_high", "mid_low", "mid_close")}
    return {
        "instrument": bar.instrument,
        "interval": bar.interval,
        "start": _EPOCH + dt.timedelta(microseconds=bar.start_ns // 1000),
        **prices,
        "vwap": _or_null(bar.vwap),
        "trades": bar.trades,
        "volume": bar.size(bar.lots),
        "buy_volume": bar.size(bar.bought),
        "sell_volume": bar.size(bar.sold),
        **mids,
        "complete": bar.is_complete,
        "lacks": int(bar.lacks),
        "price_decimals": bar.price_decimals,
        "size_decimals": bar.size_decimals,
    }


def bar_of(row: Mapping[str, Any]) -> Bar:
    """A row as the bar that it was written from.

    Exact up to 2^52 ticks and lots; a greater size is the nearest that a double holds, and so is the notional, which
    still gives the same mean price.
    """
    per_price, per_size = 10 ** row["price_decimals"], 10 ** row["size_decimals"]

    def ticks(name: str, unit: int) -> int | None:
        return None if row[name] is None else round(row[name] * unit)

    lots = round(row["volume"] * per_size)
    return Bar(
        instrument=row["instrument"],
        start_ns=(row["start"] - _EPOCH) // dt.timedelta(seconds=1) * SECOND_NS,
        width_ns=INTERVALS[row["interval"]],
        price_decimals=row["price_decimals"],
        size_decimals=row["size_decimals"],
        open=ticks("open", per_price),
        high=ticks("high", per_price),
        low=ticks("low", per_price),
        close=ticks("close", per_price),
        trades=row["trades"],
        bought=round(row["buy_volume"] * per_size),
        sold=round(row["sell_volume"] * per_size),
        lots=lots,
        notional=0 if row["vwap"] is None else notional_of(row["vwap"], lots, row["price_decimals"]),
        mid_open=ticks("mid_open", 2 * per_price),
        mid_high=ticks("mid_high", 2 * per_price),
        mid_low=ticks("mid_low", 2 * per_price),
        mid_close=ticks("mid_close", 2 * per_price),
        lacks=Lacks(row["lacks"]),
    )


def lacks_of(row: Mapping[str, Any]) -> str:
    """What a row lacks, for people: `mid, continuity`; empty for nothing."""
    return ", ".join(str(one.name).lower() for one in Lacks(row["lacks"]))


def width_of(row: Mapping[str, Any]) -> dt.timedelta:
    """The width of a row's interval."""
    return dt.timedelta(microseconds=INTERVALS[row["interval"]] // 1000)


def _with_zone(row: Mapping[str, Any]) -> dict[str, Any]:
    """SQLite gives instants back without a time zone."""
    start = row.get("start")
    return dict(row) | ({"start": start.replace(tzinfo=dt.UTC)} if start is not None and not start.tzinfo else {})


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _reason(error: sa.exc.SQLAlchemyError) -> str:
    """The first line of what the database says, without parameters."""
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]
