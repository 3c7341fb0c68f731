"""TorchServe's own tokens: TorchServe writes them to a file when it starts, and expects one with every call."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import grpc.aio
import structlog

_log = structlog.get_logger(__name__)

Metadata = tuple[tuple[str, str], ...]

_WARN_SECONDS: Final = 7 * 86_400.0
_MAX_BYTES: Final = 65_536


class ReplicaToken:
    """The tokens of one TorchServe, from its `key_file.json`.

    A restarted TorchServe has new tokens. Its first calls are refused, and the breaker treats the replica as down; the
    file is read again before every probe. If the file does not exist yet, the server starts all the same.

    Args:
        replica: Its name, for the log.
        path: The file.
        wall_clock: Seconds since the Unix epoch.
    """

    def __init__(self, replica: str, path: Path, wall_clock: Callable[[], float]) -> None:
        self._replica = replica
        self._path = path
        self._wall_clock = wall_clock
        self.inference: Metadata = ()
        """What a call for scores carries."""
        self.management: Metadata = ()
        """What a call that changes models carries."""
        self._expires_at = float("inf")
        self._unreadable = ""
        self.read()

    @property
    def problem(self) -> str:
        """Why calls are, or soon will be, refused; empty when nothing is wrong."""
        if self._unreadable:
            return self._unreadable
        days = (self._expires_at - self._wall_clock()) / 86_400
        if days * 86_400 > _WARN_SECONDS:
            return ""
        return f"TorchServe's tokens {'have expired' if days <= 0 else f'expire in {days:.1f} days'}: restart it"

    async def refresh(self) -> None:
        """Reads the file again, off the event loop."""
        await asyncio.to_thread(self.read)

    def read(self) -> None:
        """Reads the file; what cannot be read leaves the last tokens in force. Blocks."""
        try:
            with self._path.open("rb") as file:
                document = json.loads(file.read(_MAX_BYTES))
            inference, management = (_bearer(document[kind]["key"]) for kind in ("inference", "management"))
            self._expires_at = min(_instant(document[kind]["expiration time"]) for kind in ("inference", "management"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"no tokens of TorchServe: {type(error).__name__}"  # the message may quote the file
            if problem != self._unreadable:
                _log.warning("tokens not read, the last ones are used on", replica=self._replica, path=str(self._path))
            self._unreadable = problem
            return
        if self.inference and inference != self.inference:
            _log.info("new tokens", replica=self._replica)
        self.inference, self.management, self._unreadable = inference, management, ""


class ManagementToken(grpc.aio.UnaryUnaryClientInterceptor):
    """Adds the management token to every call of a channel."""

    def __init__(self, token: ReplicaToken) -> None:
        self._token = token

    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        """The same call, with the token as it is now."""
        details = client_call_details._replace(metadata=grpc.aio.Metadata(*self._token.management))  # type: ignore[attr-defined]  # a named tuple
        return await continuation(details, request)


def _bearer(key: object) -> Metadata:
    if not isinstance(key, str) or not key:
        raise ValueError
    return (("authorization", f"Bearer {key}"),)


def _instant(text: str) -> float:
    """Java's `Instant`, in Unix seconds."""
    return dt.datetime.fromisoformat(text).timestamp()
