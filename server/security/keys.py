"""The issuer's public keys, from a file or a URL."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any, Final, Protocol

import jwt
import structlog

from server.security.settings import TokenSettings
from server.security.watched import Watched

_log = structlog.get_logger(__name__)

_FETCH_SECONDS: Final = 2.0
_MAX_BYTES: Final = 262_144
_MAX_KEYS: Final = 100
_MIN_RSA_BITS: Final = 2_048

KeySet = Mapping[str, jwt.PyJWK]
"""Public keys by `kid`."""


def parse(text: bytes) -> KeySet:
    """The keys of a JWKS that can sign a token of ours; others, symmetric ones above all, are passed over.

    Raises:
        ValueError: It is none, or holds no such key.
    """
    document = json.loads(text)
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list) or len(entries) > _MAX_KEYS:
        raise ValueError(f"not a JWKS of at most {_MAX_KEYS} keys")
    keys: dict[str, jwt.PyJWK] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(kid := entry.get("kid"), str) or not kid:
            continue
        if (entry.get("kty"), entry.get("crv")) not in (("RSA", None), ("EC", "P-256")) or "d" in entry:
            continue
        if entry.get("use", "sig") != "sig":
            continue
        try:
            key = jwt.PyJWK(entry, "RS256" if entry["kty"] == "RSA" else "ES256")
        except jwt.PyJWTError as error:
            raise ValueError(f"key {kid[:64]!r}: {error}") from error
        if entry.get("alg", key.algorithm_name) != key.algorithm_name:
            continue
        if entry["kty"] == "RSA" and key.key.key_size < _MIN_RSA_BITS:
            raise ValueError(f"key {kid[:64]!r}: fewer than {_MIN_RSA_BITS} bits")
        if kid in keys:
            raise ValueError(f"key {kid[:64]!r}: twice")
        keys[kid] = key
    if not keys:
        raise ValueError("holds no public RSA or P-256 key with a kid")
    return keys


class Keys(Protocol):
    """Where a verifier gets its keys."""

    @property
    def current(self) -> KeySet | None:
        """The keys that count; None when they are not known."""

    @property
    def problem(self) -> str:
        """What is wrong; empty when nothing is."""

    @property
    def failures(self) -> int:
        """Attempts to get new keys that failed, since start."""

    def on_change(self, listener: Callable[[], None]) -> None:
        """Has a function called whenever other keys count."""

    async def refresh(self) -> bool:
        """Looks for new keys at once, unless that was done a moment ago; True when it was done and got an answer."""

    async def run(self) -> None:
        """Keeps the keys new, until cancelled."""


class FileKeys:
    """The keys in a file.

    Raises:
        OSError, ValueError: There are none in it.
    """

    def __init__(self, path: Path, refresh_seconds: float) -> None:
        self._file = Watched("token keys", (path,), parse)
        self._refresh_seconds = refresh_seconds
        self._when_changed: list[Callable[[], None]] = []

    @property
    def current(self) -> KeySet:
        """The last good ones."""
        return self._file.value

    @property
    def problem(self) -> str:
        """Why the file as it is now is not in force."""
        return self._file.problem

    @property
    def failures(self) -> int:
        """Times that the file was invalid."""
        return self._file.failures

    def on_change(self, listener: Callable[[], None]) -> None:
        """Has a function called whenever other keys count."""
        self._when_changed.append(listener)

    def _tell(self) -> None:
        for listener in self._when_changed:
            listener()

    async def refresh(self) -> bool:
        """Nothing more: the file is looked at all the time."""
        return False

    async def run(self) -> None:
        """Watches the file."""
        await self._file.watch(self._refresh_seconds, self._tell)


class UrlKeys:
    """The keys behind a URL. Those of the last answer count until they are too old.

    Args:
        url: `https://…`, or `http://…` on loopback.
        settings: How often it is asked.
        clock: Monotonic seconds.
    """

    def __init__(self, url: str, settings: TokenSettings, clock: Callable[[], float]) -> None:
        self._url = url
        self._settings = settings
        self._clock = clock
        self._keys: KeySet | None = None
        self._fetched_at = self._asked_at = -float("inf")
        self._answers = 0
        """Attempts that have ended, well or not."""
        self._asking = asyncio.Lock()
        self.problem = "not fetched yet"
        self.failures = 0
        self._when_changed: list[Callable[[], None]] = []

    @property
    def current(self) -> KeySet | None:
        """The last ones fetched, while not too old."""
        too_old = self._clock() - self._fetched_at > self._settings.max_key_age_seconds
        return None if too_old else self._keys

    def on_change(self, listener: Callable[[], None]) -> None:
        """Has a function called whenever other keys count."""
        self._when_changed.append(listener)

    async def refresh(self) -> bool:
        """Fetches the keys, unless that was done within `refetch_seconds`."""
        answers = self._answers
        async with self._asking:
            if self._answers > answers:
                return not self.problem  # another call did while we waited
            if self._clock() - self._asked_at < self._settings.refetch_seconds:
                return False
            return await self._fetch()

    async def run(self) -> None:
        """Fetches again and again; after a failure as soon as a refresh may."""
        settings = self._settings
        while True:
            async with self._asking:
                sound = await self._fetch()
            pause = settings.refresh_seconds if sound else min(settings.refetch_seconds, settings.refresh_seconds)
            await asyncio.sleep(pause)

    async def _fetch(self) -> bool:
        self._asked_at = self._clock()
        try:
            keys = await asyncio.to_thread(_get, self._url)
        except (OSError, ValueError, HTTPException) as error:
            self.failures += 1
            self._answers += 1
            problem = f"{type(error).__name__}: {error}"[:300]
            if problem != self.problem:
                _log.error("no token keys, the last ones count on", url=self._url, problem=problem)
            self.problem = problem
            return False
        self._fetched_at = self._clock()
        self._answers += 1
        if self.problem:
            _log.info("token keys fetched", url=self._url, keys=sorted(keys))
        self.problem = ""
        if self._keys is None or _names(keys) != _names(self._keys):
            self._keys = keys
            for listener in self._when_changed:
                listener()
        return True


def _names(keys: KeySet) -> dict[str, Any]:
    """What tells two sets of keys apart."""
    return {kid: key.key.public_numbers() for kid, key in keys.items()}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An issuer's keys are where the settings say, and nowhere else."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        return None


_OPENER: Final = urllib.request.build_opener(_NoRedirect)


def _get(url: str) -> KeySet:
    response: HTTPResponse
    with _OPENER.open(url, timeout=_FETCH_SECONDS) as response:
        body = response.read(_MAX_BYTES + 1)
    if len(body) > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES} bytes")
    return parse(body)


def open_keys(settings: TokenSettings, file_refresh_seconds: float, clock: Callable[[], float]) -> Keys | None:
    """The keys that the settings name; None without.

    Raises:
        OSError, ValueError: The file holds none.
    """
    if settings.jwks is None:
        return None
    if "://" in settings.jwks:
        return UrlKeys(settings.jwks, settings, clock)
    return FileKeys(Path(settings.jwks), file_refresh_seconds)
