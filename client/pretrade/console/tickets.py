"""Links that log somebody in once, with the credentials of the console's own process.

Whoever has the key can make one: the process itself, when it starts, and commands of the same user who can read the
file with the key. A link holds nothing but a ticket, so one that was used or is old is worth nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Final

from pretrade.console.sealing import sealed, unsealed

SECONDS: Final = 600.0
"""How long a link can be used."""
_PURPOSE: Final = "console link"
_NONCE_BYTES: Final = 16


def link(url: str, key: bytes, now: float) -> str:
    """A link to the console.

    Args:
        url: Of the console, with a slash at its end.
        key: The console's key.
        now: Seconds since the Unix epoch.
    """
    return f"{url}login?ticket={ticket(key, now)}"


def ticket(key: bytes, now: float) -> str:
    """A ticket that is good from now on."""
    return sealed(key, _PURPOSE, f"{int(now + SECONDS)}.{secrets.token_urlsafe(_NONCE_BYTES)}")


class Tickets:
    """Tells good tickets from others.

    Args:
        key: What they are sealed with.
        wall_clock: Seconds since the Unix epoch.
    """

    def __init__(self, key: bytes, wall_clock: Callable[[], float]) -> None:
        self._key = key
        self._wall_clock = wall_clock
        self._used: dict[str, float] = {}
        """Until when each could have been used again."""

    def new(self) -> str:
        """A ticket of our own."""
        return ticket(self._key, self._wall_clock())

    def fits(self, shown: str) -> bool:
        """Whether it is one of ours, and can still be used."""
        content = unsealed(self._key, _PURPOSE, shown)
        return content is not None and shown not in self._used and self._wall_clock() < _expires(content)

    def use(self, shown: str) -> bool:
        """Whether it still fits; it does not again."""
        if not self.fits(shown):
            return False
        now = self._wall_clock()
        self._used = {one: until for one, until in self._used.items() if until > now}
        self._used[shown] = _expires(shown)
        return True


def _expires(content: str) -> float:
    return float(content.partition(".")[0])
