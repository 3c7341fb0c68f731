"""Where the parts of a stack are reached, and the file that tells other commands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

import psutil
from pydantic import BaseModel, ConfigDict
from sqlalchemy import make_url

STACK_FILE: Final = "stack.json"
"""Name of the file in the stack's directory, there from when the stack is ready until it stops."""


class Endpoints(BaseModel):
    """Where the parts are reached; None where a part neither runs nor was given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    redis_url: str | None
    kafka_bootstrap_servers: str | None
    database_url: str | None
    """SQLAlchemy URL, with its password."""
    primary: str | None
    """gRPC `host:port`, as the next four."""
    secondary: str | None
    challenger: str | None
    decision: str | None
    admin: str | None
    metrics_url: str | None
    """Base URL of the decision server's metrics."""
    worker_url: str | None
    """Base URL of the feature worker's metrics and health."""
    journal: str | None
    """Path of the audit journal."""
    model_store: str | None
    """Folder of the models' archives, every version that was trained there."""
    management: Mapping[str, str] = {}
    """gRPC address of the management service of each TorchServe that the stack runs, by part."""
    token_files: Mapping[str, str] = {}
    """`key_file.json` of each TorchServe that asks for tokens, by part."""
    instruments: tuple[str, ...]

    @property
    def database_address(self) -> str | None:
        """`host:port` of the database, for people; None without one, or for a file."""
        url = make_url(self.database_url) if self.database_url else None
        return f"{url.host}:{url.port}" if url is not None and url.host else None


class StackFile(BaseModel):
    """The content of `stack.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pid: int
    """The process that runs the stack."""
    endpoints: Endpoints
    processes: Mapping[str, int]
    """Process id of each part that it started."""

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """Reads the file of a stack that runs in `directory`; None when none does."""
        try:
            stack = cls.model_validate_json((directory / STACK_FILE).read_bytes())
        except FileNotFoundError:
            return None
        return stack if psutil.pid_exists(stack.pid) else None

    def write(self, directory: Path) -> None:
        """Writes the file whole, for our eyes only: it holds the database's password."""
        unfinished = directory / f"{STACK_FILE}.new"
        unfinished.unlink(missing_ok=True)
        unfinished.touch(mode=0o600)
        unfinished.write_text(self.model_dump_json(indent=2) + "\n")
        unfinished.rename(directory / STACK_FILE)
