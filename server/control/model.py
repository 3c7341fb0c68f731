"""The control state as data: what was set, for how long, and what a change makes of it. Knows no clock and no store.

A subject (`trading_state`, `flag/shadow`, `breaker/primary`, …) has at most one permanent value and at most one
temporary one, which hides it until it is over. What nobody set is as the server's settings say.

Every change has an id, and a state knows those that led to it, so a change that is applied twice, by two processes or
after a reply that was lost, happens once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

TRADING_STATE: Final = "trading_state"
STRICTNESS: Final = ("ACTIVE", "REDUCING", "HALTED")
"""Trading states, each stricter than the one before."""
_REMEMBERED: Final = 64
"""Changes that a state knows at least. Two stores never differ by more that both are to get."""


class Change(BaseModel):
    """Something that somebody wants set.

    One without an end replaces everything that is set of its subject, one with an end hides it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Unique; ids of later changes are greater."""
    subject: str
    value: str | None = None
    """None: as the settings say."""
    seconds: float | None = Field(default=None, gt=0)
    """For how long; None: until changed."""
    expires_at: float | None = None
    """When that is over, in seconds since the Unix epoch."""
    ends: str | None = None
    """Id of the change whose temporary value this one removes, if it is still there; nothing else happens then."""
    author: str
    reason: str


class Temporary(BaseModel):
    """A value with an end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Of the change that set it."""
    value: str
    seconds: float = Field(gt=0)
    expires_at: float
    """Seconds since the Unix epoch."""
    author: str
    reason: str

    def remaining_seconds(self, wall_seconds: float) -> float:
        """Seconds left, at most as many as were asked for whatever the wall clock did since."""
        return min(self.seconds, self.expires_at - wall_seconds)


class Setting(BaseModel):
    """What is set of a subject."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    permanent: str | None = None
    """None: as the settings say."""
    author: str = ""
    """Who set the permanent value."""
    reason: str = ""
    temporary: Temporary | None = None


IsOver = Callable[[Temporary], bool]


class Control(BaseModel):
    """A control state."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = Field(default=0, ge=0)
    """Grows with every change."""
    change_id: str = ""
    """Of the last change; tells apart states of one version that were made without knowing of each other."""
    settings: Mapping[str, Setting] = {}
    """By subject."""
    applied: tuple[str, ...] = ()
    """Ids of the last changes, the newest last."""

    def is_newer_than(self, other: Control) -> bool:
        """Whether this is the one to keep of two."""
        return (self.version, self.change_id) > (other.version, other.change_id)

    def temporary(self, subject: str, is_over: IsOver) -> Temporary | None:
        """The temporary value in force of a subject."""
        setting = self.settings.get(subject)
        if setting is None or setting.temporary is None or is_over(setting.temporary):
            return None
        return setting.temporary

    def value(self, subject: str, is_over: IsOver) -> str | None:
        """The value in force; None: as the settings say."""
        temporary = self.temporary(subject, is_over)
        if temporary is not None:
            return temporary.value
        setting = self.settings.get(subject)
        return None if setting is None else setting.permanent

    def with_change(self, change: Change) -> Control:
        """The state after a change; the same state when it knows the change already, or there is nothing to end."""
        if change.id in self.applied or not self._would_end(change):
            return self
        return self._with_setting(change)._noting([change])

    def with_pending(self, changes: Iterable[Change], is_over: IsOver, usual_trading_state: str) -> Control:
        """The state after changes that were made on one server alone, while it had no contact.

        The trading state becomes the one that was set last there, where that is stricter than this state's.
        """
        state, trading = self, None
        new = list({change.id: change for change in changes if change.id not in self.applied}.values())
        for change in new:
            if change.subject == TRADING_STATE:
                trading = change
            else:
                state = state._with_setting(change)
        if trading is not None:
            wanted, found = trading.value or usual_trading_state, self.value(TRADING_STATE, is_over)
            if is_stricter(wanted, found or usual_trading_state):
                state = state._with_setting(trading)
        return state._noting(new) if new else self

    def _would_end(self, change: Change) -> bool:
        if change.ends is None:
            return True
        setting = self.settings.get(change.subject)
        return setting is not None and setting.temporary is not None and setting.temporary.id == change.ends

    def _with_setting(self, change: Change) -> Control:
        before = self.settings.get(change.subject, Setting())
        if change.ends is not None:
            after = before.model_copy(update={"temporary": None})
        elif change.seconds is None:
            after = Setting(permanent=change.value, author=change.author, reason=change.reason)
        else:
            assert change.value is not None
            assert change.expires_at is not None
            temporary = Temporary(
                id=change.id,
                value=change.value,
                seconds=change.seconds,
                expires_at=change.expires_at,
                author=change.author,
                reason=change.reason,
            )
            after = before.model_copy(update={"temporary": temporary})
        settings = {subject: kept for subject, kept in self.settings.items() if subject != change.subject}
        if after.permanent is not None or after.temporary is not None:
            settings[change.subject] = after
        return self.model_copy(update={"settings": settings})

    def _noting(self, changes: list[Change]) -> Control:
        ids = (*self.applied, *(change.id for change in changes))
        known = ids[-max(_REMEMBERED, len(changes)) :]
        return self.model_copy(
            update={"version": self.version + len(changes), "change_id": changes[-1].id, "applied": known}
        )


class Kept(BaseModel):
    """What a server keeps on its disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    control: Control = Control()
    """The last state that is known to be everybody's."""
    pending: tuple[Change, ...] = ()
    """Changes in force on this server that only it knows, the oldest first."""

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, content: Any) -> Any:
        if isinstance(content, dict) and "trading_state" in content:
            return {"control": _First.model_validate(content).control()}
        return content

    @property
    def says_what_all_know(self) -> bool:
        """False when it only has changes of a server that had never heard what all servers were told."""
        return self.control != Control() or not self.pending

    def merged(self, other: Kept) -> Kept:
        """What both know."""
        control = other.control if other.control.is_newer_than(self.control) else self.control
        known = set(control.applied)
        pending = {change.id: change for change in (*self.pending, *other.pending) if change.id not in known}
        return Kept(control=control, pending=tuple(pending[one] for one in sorted(pending)))


class _FirstBreaker(BaseModel):
    mode: Literal["forced_open", "forced_closed", "metrics_only"]
    seconds: float | None = None
    expires_at: float | None = None


class _First(BaseModel):
    """What was kept before there were subjects."""

    version: int = 0
    trading_state: Literal["ACTIVE", "REDUCING", "HALTED"]
    flags: Mapping[str, bool]
    breakers: Mapping[str, _FirstBreaker] = {}

    def control(self) -> Control:
        settings = {TRADING_STATE: _kept(self.trading_state)}
        settings |= {f"flag/{name}": _kept("on" if is_on else "off") for name, is_on in self.flags.items()}
        for replica, forced in self.breakers.items():
            setting = _kept(forced.mode)
            if forced.seconds is not None and forced.expires_at is not None:
                temporary = Temporary(
                    id=f"kept/{replica}",
                    value=forced.mode,
                    seconds=forced.seconds,
                    expires_at=forced.expires_at,
                    author=setting.author,
                    reason=setting.reason,
                )
                setting = Setting(temporary=temporary)
            settings[f"breaker/{replica}"] = setting
        return Control(version=self.version, settings=settings)


def _kept(value: str) -> Setting:
    return Setting(permanent=value, author="server", reason="kept from an earlier version")


def is_stricter(state: str, other: str) -> bool:
    """Whether a trading state is stricter than another."""
    return STRICTNESS.index(state) > STRICTNESS.index(other)
