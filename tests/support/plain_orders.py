"""Plain orders, as a batch has them, models that score by chance, and what two runs of them have in common."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from google.protobuf.json_format import MessageToDict
from numpy.typing import NDArray

from fallback.order import Order, Part
from feature_cache.feature_set import FeatureSet
from feature_cache.features import MF1
from feature_cache.store.codec import encode
from pretrade.decision.v1 import decision_pb2 as pb
from server.inference.wire import ModelIdentity, ScoreBatch
from support.planes import INSTRUMENT, Plane, market, plane
from support.scripted_replica import Script

_OF_THE_RUN = {
    "age_seconds",
    "age_us",
    "allowed_us",
    "arrived_monotonic_ns",
    "book_age_ms",
    "cached_from_decision_id",
    "decided_at",
    "decided_monotonic_ns",
    "decision_id",
    "event_time_ns",
    "feature_age",
    "model_input",
    "sequence",
    "used_us",
}
"""What two runs do not have in common."""


def orders_of(
    random: Random, count: int, instruments: Sequence[str] = (INSTRUMENT,), strategies: Sequence[str] = ("twap", "vwap")
) -> list[Order]:
    """Plain orders, some of which a guard objects to."""
    made = []
    for number in range(count):
        instrument = random.choice(instruments) if len(instruments) > 1 else instruments[0]
        side = random.choice((pb.SIDE_BUY, pb.SIDE_SELL))
        price = random.choice((None, 100.0, 100.4, 99.6, 250.0))
        quantity = random.choice((0.5, 1.0, 5_000.0))
        message = pb.Order(
            order_ref=f"o-{number}",
            instrument=instrument,
            side=side,
            quantity=quantity,
            limit_price=price,
            strategy=random.choice(strategies),
        )
        made.append(
            Order(
                message.SerializeToString(),
                instrument,
                side,
                quantity,
                float("nan") if price is None else price,
                message.strategy,
                False,
                None,
                message.order_ref,
            )
        )
    return made


def some_scores(random: Random, count: int, least: float = math.nan) -> NDArray[np.float32]:
    """Scores; the least may be none."""
    return np.array([random.choice((0.1, 0.45, 0.55, 0.9, 0.9, 0.9, least)) for _ in range(count)], dtype=np.float32)


PARTS = (Part("0a" * 8, 0.25), Part("0b" * 8, 0.75))


def parts_of(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """What each of `PARTS` says where these are the scores."""
    return np.stack([scores / 2, scores / 4], axis=1)


def scores(random: Random, version: str = "aa" * 8, feature_set: FeatureSet = MF1) -> Script:
    """An ensemble that gives each row of a batch a score; some are none."""

    async def script(rows: list[bytes]) -> ScoreBatch:
        await asyncio.sleep(0.001)
        assert {len(row) for row in rows} == {feature_set.row_bytes}
        given = some_scores(random, len(rows))
        return ScoreBatch(ModelIdentity("champion", version, 0.5, 0, feature_set, PARTS), given, parts_of(given))

    return script


@asynccontextmanager
async def busy_plane(path: Path, primary: Script, secondary: Script, **changes: Any) -> AsyncIterator[Plane]:
    path.mkdir(exist_ok=True)  # noqa: ASYNC240 - nothing else runs yet
    async with plane(path, primary, secondary, max_in_flight=1_000, max_age_seconds=60.0, **changes) as made:
        made.feature_cache.accept(encode(market(0.1)))
        yield made


def meaning(message: Any) -> Any:
    """A message without what two runs do not have in common."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k not in _OF_THE_RUN}
        return [without(one) for one in value] if isinstance(value, list) else value

    return without(MessageToDict(message, preserving_proto_field_name=True))
