"""Who is logged in. Tokens stay in this process: a browser has the id of its session and nothing else."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.console.calls import SECONDS, ServerCalls

_IDLE_SECONDS: Final = 1_800.0
"""After which a session ends that nobody looks at. An open page asks every few seconds, so it never ends under one."""
_LONGEST_SECONDS: Final = 12 * 3_600.0
"""After which everybody logs in again: a shift."""
_MOST: Final = 200
"""Sessions at a time; one more ends the one that was looked at longest ago."""
_ROLES_SECONDS: Final = 5.0
"""For how long a page trusts the server's last word on what the person may do. Every call to the server is checked
anyway."""
_SECRET_BYTES: Final = 32
_ROLES: Final = ("admin", "operator", "viewer", "trader")
"""The highest first."""
_METHOD_OF: Final = {
    "AdminService": "/pretrade.admin.v1.AdminService/",
    "AuditService": "/pretrade.audit.v1.AuditService/",
}


@dataclass(slots=True)
class Session:
    """One person, logged in."""

    calls: ServerCalls
    """With this person's credentials."""
    caller: pb.GetCallerResponse
    """Who the server says it is, and what it may do."""
    stated_name: str
    """Who the person says to be, where the server cannot know."""
    clock: Callable[[], float]
    """Monotonic seconds."""
    renew: Callable[[], Awaitable[None]] | None = None
    """Renews the person's token if that is due; None where it does not change."""
    id: str = field(default_factory=lambda: secrets.token_urlsafe(_SECRET_BYTES), repr=False)
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(_SECRET_BYTES), repr=False)
    """What every form of this session carries, and no other site knows."""
    notice: list[str] = field(default_factory=list)
    """What the next page says first: the outcome of a change."""
    began: float = field(init=False)
    used: float = field(init=False)
    _asked: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.used = self._asked = self.clock()

    @property
    def author(self) -> str:
        """Who the audit will name."""
        return self.stated_name if self.caller.states_author else self.caller.name

    @property
    def role(self) -> str:
        """The highest role, for people."""
        return next((role for role in _ROLES if role in self.caller.roles), "no role")

    def may(self, method: str, service: str = "AdminService") -> bool:
        """Whether the person's role allows a method, as the server said last."""
        return f"{_METHOD_OF[service]}{method}" in self.caller.methods

    def take_notice(self) -> list[str]:
        """What the next page says first; it is said once."""
        notice, self.notice = self.notice, []
        return notice

    async def look_again(self, *, at_once: bool = False) -> None:
        """Asks the server what the person may do now, if that is not known freshly, or at once.

        Raises:
            CallFailedError: The server does not say.
        """
        if self.renew is not None:
            await self.renew()
        if not at_once and self.clock() - self._asked < _ROLES_SECONDS:
            return
        self.caller = await self.calls.answer(self.calls.admin.GetCaller(pb.GetCallerRequest(), timeout=SECONDS))
        self._asked = self.clock()

    def is_own(self, token: str) -> bool:
        """Whether a form was made for this session."""
        return hmac.compare_digest(token.encode(), self.csrf.encode())


class Sessions:
    """Those that are open.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._by_id: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    async def add(self, session: Session) -> None:
        """Opens one."""
        await self._end_old()
        if len(self._by_id) >= _MOST:
            await self.end(min(self._by_id.values(), key=lambda one: one.used))
        self._by_id[session.id] = session

    async def find(self, session_id: str) -> Session | None:
        """The one with this id, which is being used; None when there is none any more."""
        await self._end_old()
        found = self._by_id.get(session_id)
        if found is not None:
            found.used = self._clock()
        return found

    async def end(self, session: Session) -> None:
        """Ends one; its token is forgotten."""
        if self._by_id.pop(session.id, None) is not None:
            await session.calls.close()

    async def end_all(self) -> None:
        """Ends them all."""
        for session in list(self._by_id.values()):
            await self.end(session)

    async def _end_old(self) -> None:
        now = self._clock()
        for session in list(self._by_id.values()):
            if now - session.used > _IDLE_SECONDS or now - session.began > _LONGEST_SECONDS:
                await self.end(session)
