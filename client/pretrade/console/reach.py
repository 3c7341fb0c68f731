"""How browsers reach the console: by which names, by TLS or not, and through a proxy or not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import urlsplit

_OWN: Final = frozenset({"127.0.0.1", "::1", "localhost"})
_EVERY: Final = frozenset({"0.0.0.0", "::", ""})  # noqa: S104 - no names, and not listened on here
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Reach:
    """How browsers reach the console."""

    names: frozenset[str]
    """Hosts by which they may call it, in lower case and without ports."""
    is_secure: bool
    """Whether they use TLS."""
    origin: str = ""
    """`scheme://host[:port]` by which they call it, where that is a proxy's and not its own; empty otherwise."""

    @classmethod
    def of(cls, *, listens_on: str, names: Iterable[str] = (), public_url: str = "", has_tls: bool = False) -> Self:
        """What the options of the command come to.

        Args:
            listens_on: The address that is listened on.
            names: Further names by which browsers may call it.
            public_url: The URL that browsers know; empty for the console's own.
            has_tls: Whether the console itself speaks TLS.

        Raises:
            ValueError: The URL is none, or has a path.
        """
        origin = origin_of(public_url) if public_url else ""
        found = {*_OWN, listens_on.lower(), *(name.lower() for name in names)} - _EVERY
        if origin:
            found.add(urlsplit(origin).hostname or "")
        return cls(frozenset(found), origin.startswith("https:") if origin else has_tls, origin)


def origin_of(url: str) -> str:
    """The origin of a URL as browsers write it: in lower case, and without the port that its scheme has anyway.

    Raises:
        ValueError: The URL is none, or it is more than an origin.
    """
    parts = urlsplit(url.lower())
    port = parts.port
    if parts.scheme not in _PORTS or not parts.hostname or parts.username or parts.path.strip("/") or parts.query:
        raise ValueError(f"{url!r} is not like https://console.example.com, without a path")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + ("" if port in (None, _PORTS[parts.scheme]) else f":{port}")
