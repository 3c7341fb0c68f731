"""The definitions for Feast: the entity `instrument` and the feature view `mf1`, pushed by the feature worker.

Feast's release has narrower pins than ours, so it needs an environment of its own (`pip install
'pretrade-server[feast]'`, without the other extras), and the worker reaches it over HTTP::

    export PRETRADE_FEAST_DIR=/srv/feast PRETRADE_FEAST_REDIS=127.0.0.1:6379
    feast --chdir feature_cache/feature_repo apply
    feast --chdir feature_cache/feature_repo serve --port 6566
    PRETRADE_WORKER_FEAST_URL=http://127.0.0.1:6566 python -m feature_cache

Undefined features are null online and NaN in training sets. Every write of Feast's file store copies the Parquet file
as a whole: rotate it daily, or let Feast use a warehouse.
"""

import os
from datetime import timedelta
from pathlib import Path

import pandas
import pyarrow
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, PushSource, ValueType
from feast.types import Float32
from pyarrow import parquet

from feature_cache.features import FEATURE_SET_ID, NAMES

PARQUET = Path(os.environ["PRETRADE_FEAST_DIR"]).absolute() / f"{FEATURE_SET_ID}.parquet"
if not PARQUET.exists():  # Feast appends to a file that is there
    columns = {
        "instrument": pyarrow.string(),
        "event_timestamp": pyarrow.timestamp("us", "UTC"),
        **dict.fromkeys(NAMES, pyarrow.float32()),
    }
    parquet.write_table(pyarrow.schema(list(columns.items())).empty_table(), PARQUET)

instrument = Entity(name="instrument", join_keys=["instrument"], value_type=ValueType.STRING)

pushed = PushSource(
    name=FEATURE_SET_ID,
    batch_source=FileSource(name="mf1_parquet", path=str(PARQUET), timestamp_field="event_timestamp"),
)

mf1 = FeatureView(
    name=FEATURE_SET_ID,
    entities=[instrument],
    ttl=timedelta(seconds=10),  # as long as the decision server uses a vector
    schema=[Field(name=name, dtype=Float32) for name in NAMES],
    source=pushed,
)

service = FeatureService(name=FEATURE_SET_ID, features=[mf1])


def training_set(store: FeatureStore, orders: pandas.DataFrame) -> pandas.DataFrame:
    """Each order with the features as they were known at its time: never those of a later event.

    Args:
        store: This repository.
        orders: Columns `instrument`, `event_timestamp` (UTC, exchange time) and any others, which are kept.

    Returns:
        The orders with a column for each feature; NaN where none was known within the view's TTL.
    """
    # Feast's file store leaves rows out for which nothing was known: they are put back by their number.
    numbered = orders.assign(row=range(len(orders)))
    found = store.get_historical_features(numbered, features=store.get_feature_service(FEATURE_SET_ID)).to_df()
    known = found.set_index("row")[list(NAMES)].reindex(range(len(orders)))
    return orders.assign(**{name: known[name].to_numpy() for name in NAMES})
