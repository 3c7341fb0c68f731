"""What people look at of a market: from a real process that reads a real table."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from feature_cache.bars.store import BarStore
from feature_cache.store.books import BookReader
from feature_cache.store.vectors import FeatureStore, connect
from pretrade.admin.v1 import admin_pb2 as pb
from server.audit.reading.reading import Reading, ReadingProcess, Task
from server.errors import BarsUnavailableError, InvalidRequestError, UnknownInstrumentError
from server.rpc.market import MarketReading

ASKED = pb.ListBarsRequest(instrument="A.SIM", interval="1s")


@pytest.fixture
async def market(tmp_path: Path) -> AsyncIterator[MarketReading]:
    bars = f"sqlite:///{tmp_path / 'later' / 'bars.db'}"
    task = Task(journal=tmp_path / "journal.db", database_url="sqlite://", model_store=None, bars_database_url=bars)
    async with ReadingProcess("reads", task) as process, connect("redis://127.0.0.1:1", 1.0) as nowhere:
        yield MarketReading(("A.SIM", "B.SIM"), Reading("bars", process), BookReader(FeatureStore(nowhere, 60, 1)))


async def test_a_database_of_bars_that_is_away_is_counted_and_is_read_when_it_is_there(
    market: MarketReading, tmp_path: Path
) -> None:
    with pytest.raises(BarsUnavailableError, match="the database of bars cannot be read"):
        await market.bars(ASKED)
    assert market.without_bars == 1
    (tmp_path / "later").mkdir()
    store = BarStore(f"sqlite:///{tmp_path / 'later' / 'bars.db'}")
    store.prepare()
    store.close()
    assert "no bar of A.SIM of 1s yet" in (await market.bars(ASKED)).problem
    assert market.without_bars == 1
    with pytest.raises(InvalidRequestError, match="interval: must be one of"):
        await market.bars(pb.ListBarsRequest(instrument="A.SIM", interval="2s"))


async def test_a_book_without_redis_says_so_and_is_counted(market: MarketReading) -> None:
    found = await market.book(pb.GetBookRequest(instrument="A.SIM"))
    assert (len(found.bids), found.book) == (0, pb.BOOK_STATE_UNSPECIFIED)
    assert found.problem == "Redis, where feature workers publish books, does not answer."
    assert market.without_books == 1
    with pytest.raises(InvalidRequestError, match="levels: must be 1 to 100"):
        await market.book(pb.GetBookRequest(instrument="A.SIM", levels=101))


async def test_an_instrument_that_is_not_followed_is_named_with_the_nearest(market: MarketReading) -> None:
    with pytest.raises(UnknownInstrumentError, match="instrument: this server does not follow") as one:
        await market.bars(pb.ListBarsRequest(instrument="A.SIN", interval="1s"))
    assert one.value.field == "instrument"
    with pytest.raises(UnknownInstrumentError):
        await market.book(pb.GetBookRequest(instrument="A.SIN"))
