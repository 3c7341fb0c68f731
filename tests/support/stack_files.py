"""What a running stack leaves in its directory for other commands, without the stack."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pretrade.client.file_lock import take_lock
from pretrade.client.stack_file import Endpoints, StackFile

ENDPOINTS: Final = Endpoints(
    redis_url="redis://:word@127.0.0.1:1/0",
    kafka_bootstrap_servers="127.0.0.1:2",
    database_url="postgresql+psycopg://pretrade:secret@127.0.0.1:3/pretrade",
    primary="127.0.0.1:4",
    secondary="127.0.0.1:5",
    challenger=None,
    decision="127.0.0.1:6",
    admin="127.0.0.1:7",
    metrics_url="http://127.0.0.1:8",
    worker_url="http://127.0.0.1:9",
    journal="/j",
    model_store="/somewhere/models",
    instruments=("BTCUSDT.SIM",),
)


@contextmanager
def stack_file(directory: Path, **changes: Any) -> Iterator[StackFile]:
    """The file of a stack with other endpoints, and the lock that says that it runs."""
    stack = StackFile(pid=os.getpid(), endpoints=replace(ENDPOINTS, **changes), processes={"valkey": 1})
    stack.write(directory)
    lock = take_lock(directory / "lock")
    assert lock is not None
    try:
        yield stack
    finally:
        os.close(lock)
