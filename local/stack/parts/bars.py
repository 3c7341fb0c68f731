"""The keeper of bars, `python -m feature_cache.bars`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Final

from pretrade.client.stack_file import Endpoints

_DATABASE: Final = "PRETRADE_BARS_DATABASE_URL"


def argv() -> list[str]:
    """Runs it; what it needs is in its environment."""
    return [sys.executable, "-m", "feature_cache.bars"]


def database_url(endpoints: Endpoints) -> str:
    """Where bars are kept: what the user has said, else the database of the audit."""
    url = os.environ.get(_DATABASE) or endpoints.database_url
    assert url is not None
    return url


def env(endpoints: Endpoints, metrics_port: int) -> Mapping[str, str]:
    """Its environment: ours, so that a user's settings of it reach it, and what it connects to."""
    assert endpoints.kafka_bootstrap_servers is not None
    return os.environ | {
        _DATABASE: database_url(endpoints),
        "PRETRADE_BARS_KAFKA_BOOTSTRAP_SERVERS": endpoints.kafka_bootstrap_servers,
        "PRETRADE_BARS_METRICS_PORT": str(metrics_port),
    }
