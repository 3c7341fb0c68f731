"""The live features that the demos follow: whether they are available, and the mid prices that orders are made from."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from feature_cache.store.l1 import FeatureCache
from local.stack.errors import StackError

_FRESH_SECONDS: Final = 60.0


async def wait_for_features(cache: FeatureCache) -> None:
    """Waits until every instrument has a book to decide on.

    Raises:
        StackError: That does not happen within a minute.
    """
    try:
        async with asyncio.timeout(_FRESH_SECONDS):
            # The cache has no event for this.
            while any(cache.get(instrument) is None for instrument in cache.instruments):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise StackError(f"no features within {_FRESH_SECONDS:.0f} s; see the worker's log") from None


def mids(cache: FeatureCache) -> Mapping[str, float]:
    """The current mid price of each instrument that has one."""
    entries = ((instrument, cache.get(instrument)) for instrument in cache.instruments)
    return {instrument: entry.snapshot.mid for instrument, entry in entries if entry is not None}
