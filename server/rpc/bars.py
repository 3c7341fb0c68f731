"""A page of bars in the contract's words, from the table that the keeper of bars writes."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from feature_cache.bars.bar import INTERVALS, Lacks
from feature_cache.bars.store import BarStore, BarStoreError, bar_of
from feature_cache.ta1.indicators import FEATURES, HISTORY_BARS
from pretrade.admin.v1 import admin_pb2 as pb
from server.errors import BarsUnavailableError, InvalidRequestError
from server.rpc.instruments import shown

LARGEST_PAGE: Final = 500
_DEFAULT_PAGE: Final = 100
MOST_INDICATORS: Final = 8
_PLACES: Final = {feature.name: place for place, feature in enumerate(FEATURES)}
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_LONGEST_TOKEN: Final = 12
"""Digits of the seconds of a year that a date can have."""
_LATEST_SECONDS: Final = int((dt.datetime.max.replace(tzinfo=dt.UTC) - _EPOCH).total_seconds())
_COPIED: Final = (
    *("open", "high", "low", "close", "vwap", "trades", "volume", "buy_volume", "sell_volume"),
    *("mid_open", "mid_high", "mid_low", "mid_close", "complete"),
)
_NO_TABLE: Final = (
    "No bars are kept in the database that this server reads. `pretrade up --bars` keeps them, and so does "
    "`python -m feature_cache.bars`; PRETRADE_MARKET__BARS_DATABASE_URL says where the server looks."
)

_NO_TALIB: Final = "Indicators are computed by TA-Lib, which this server lacks: pip install 'pretrade-server[ta]'."


def page_of(store: BarStore, request: pb.ListBarsRequest) -> pb.ListBarsResponse:
    """One page. Blocks.

    Raises:
        InvalidRequestError: A field breaks a rule.
        BarsUnavailableError: The database cannot be read.
    """
    if request.interval not in INTERVALS:
        raise InvalidRequestError(f"interval: must be one of {', '.join(INTERVALS)}, not {request.interval[:20]!r}")
    if request.page_size > LARGEST_PAGE:
        raise InvalidRequestError(f"page_size: must be 1 to {LARGEST_PAGE}; 0 for {_DEFAULT_PAGE}")
    _check_indicators(request.indicators)
    count, before = request.page_size or _DEFAULT_PAGE, _before(request.page_token)
    history = HISTORY_BARS if request.indicators else 1  # one more says whether there are older ones
    try:
        rows = store.last(request.instrument, request.interval, count + history, before)
    except BarStoreError as error:
        return pb.ListBarsResponse(problem=_without_rows(store, error))
    has_older = len(rows) > count
    page = rows[-count:]
    problem = "" if page or before is not None else _none_of(request)
    token = _token(page[0]["start"]) if has_older else ""
    response = pb.ListBarsResponse(bars=map(_bar, page), next_page_token=token, problem=problem)
    if request.indicators and page:
        _add_indicators(response, rows, request.indicators)
    return response


def _check_indicators(names: Sequence[str]) -> None:
    """Raises InvalidRequestError where one is not known, or there are too many."""
    if len(names) > MOST_INDICATORS:
        raise InvalidRequestError(f"indicators: at most {MOST_INDICATORS} at once")
    for name in names:
        if name not in _PLACES:
            raise InvalidRequestError(f"indicators: {shown(name)} is none; docs/bars.md lists them")


def _add_indicators(response: pb.ListBarsResponse, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Adds the indicators to the bars of a page.

    Args:
        response: The page.
        rows: Its rows, and those before them.
        names: Which.
    """
    try:
        from feature_cache.ta1.series import along  # noqa: PLC0415 - TA-Lib, which not every server has
    except ImportError:
        response.indicators_problem = _NO_TALIB
        return
    values = along([bar_of(row) for row in rows], len(response.bars))
    for bar, found in zip(response.bars, values, strict=True):
        for name in names:
            value = float(found[_PLACES[name]])
            if not math.isnan(value):
                bar.indicators[name] = value


def _without_rows(store: BarStore, error: BarStoreError) -> str:
    """What a database without the table means.

    Raises:
        BarsUnavailableError: The database cannot be read, or has the table.
    """
    try:
        if not store.has_table():
            return _NO_TABLE
    except BarStoreError as again:
        error = again
    raise BarsUnavailableError(f"the database of bars cannot be read: {error}") from error


def _none_of(request: pb.ListBarsRequest) -> str:
    return (
        f"There is no bar of {request.instrument} of {request.interval} yet. A bar is kept when it has ended: if this "
        "stays so, see whether the keeper of bars (`pretrade up --bars`) runs and reads this market."
    )


def _before(token: str) -> dt.datetime | None:
    """The newest start that a page may have; None for any.

    Raises:
        InvalidRequestError: It is no token of ours.
    """
    if not token:
        return None
    if not (token.isascii() and token.isdigit() and len(token) <= _LONGEST_TOKEN and int(token) <= _LATEST_SECONDS):
        raise InvalidRequestError("page_token: must be the next_page_token of an earlier page")
    return _EPOCH + dt.timedelta(seconds=int(token), microseconds=-1)


def _token(start: dt.datetime) -> str:
    return str((start - _EPOCH) // dt.timedelta(seconds=1))


def _bar(row: Mapping[str, Any]) -> pb.Bar:
    bar = pb.Bar(
        **{name: row[name] for name in _COPIED if row[name] is not None},
        lacks=[str(one.name).lower() for one in Lacks(row["lacks"])],
    )
    bar.start.FromDatetime(row["start"])
    return bar
