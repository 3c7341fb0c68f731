"""The feature worker, `python -m feature_cache`."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Final

from local.stack.errors import NotReadyError
from local.stack.parts.sets_file import sets_file
from local.stack.ports import LOOPBACK
from pretrade.client.stack_file import Endpoints

_POLL: Final = "PRETRADE_WORKER_POLL_INTERVAL_SECONDS"
_SETS: Final = "PRETRADE_WORKER_FEATURES_FILE"
_BARS: Final = "PRETRADE_TA1_BARS_DATABASE_URL"


def url(metrics_port: int) -> str:
    """Where its metrics and its health are served."""
    return f"http://{LOOPBACK}:{metrics_port}"


def argv() -> list[str]:
    """Runs it; what it needs is in its environment."""
    return [sys.executable, "-m", "feature_cache"]


def env(endpoints: Endpoints, metrics_port: int, bars_url: str | None) -> Mapping[str, str]:
    """Its environment: ours, so that a user's settings of the worker reach it, and what it connects to.

    Args:
        endpoints: What it connects to.
        metrics_port: Of its metrics and its health.
        bars_url: Where this stack keeps bars; None where it does not.
    """
    assert endpoints.redis_url is not None
    assert endpoints.kafka_bootstrap_servers is not None
    bars = {} if bars_url is None else {_BARS: os.environ.get(_BARS, bars_url)}
    return (
        os.environ
        | bars
        | {
            "PRETRADE_WORKER_REDIS_URL": endpoints.redis_url,
            "PRETRADE_WORKER_KAFKA_BOOTSTRAP_SERVERS": endpoints.kafka_bootstrap_servers,
            "PRETRADE_WORKER_METRICS_PORT": str(metrics_port),
            # For the same reason as in market.py: fewer fetches of the embedded broker.
            _POLL: os.environ.get(_POLL, "0.04"),
            **sets_file(_SETS),
        }
    )


def ready(metrics_port: int) -> None:
    """Asks for its health: it consumes from Kafka and reaches Redis.

    Raises:
        NotReadyError: It is not healthy, or not there yet.
    """
    try:
        with urllib.request.urlopen(f"{url(metrics_port)}/healthz", timeout=2.0):  # noqa: S310 - a fixed http URL
            pass
    except urllib.error.HTTPError as error:
        with error:
            raise NotReadyError(f"{error.code}: {error.read(200).decode(errors='replace').strip()}") from error
    except OSError as error:
        raise NotReadyError(str(error)) from error
