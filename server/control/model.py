"""The control state as data: what was set, and what a change or another copy makes of it. Knows no clock and no store.

Two copies of the state are merged whenever they meet, in any order and as often as they like: merging is commutative,
associative and idempotent, so all copies end up the same. What that means depends on the subject.

* The *trading state* is the strictest of the restrictions that stand. A change that tightens it adds a restriction. A
  change that relaxes it names the restrictions that it lifts. Merged copies have every restriction that either has,
  without those that either has lifted. A halt that one copy has lost therefore comes back from any other copy, and
  nothing but a change that names it ends it. No version and no clock has a say in this.
* Every *other subject* (`flag/shadow`, `breaker/primary`, …) has at most one permanent value and at most one temporary
  one, which hides it until it is over. Of two copies of a subject the one that was changed at the higher version wins.

A restriction that is lifted is forgotten, except for its id, so that an older copy does not bring it back. Only so many
of these ids are remembered. Beyond that, an old copy that still has the restriction brings it back: trading is halted
once too often, never once too seldom.

Every change has an id, and a state knows the last ones that led to it, so a change that is applied twice, by two
processes or after a reply that was lost, happens once. It also holds what the audit is to say of a change until some
process has made that durable: the change and the duty to record it are one write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

TRADING_STATE: Final = "trading_state"
STRICTNESS: Final = ("ACTIVE", "REDUCING", "HALTED")
"""Trading states, each stricter than the one before."""
Level = Literal["REDUCING", "HALTED"]
_MOST_RESTRICTIONS: Final = 32
"""Restrictions that may stand before a new one takes the place of those that it makes superfluous."""
_REMEMBERED_LIFTS: Final = 256
"""Restrictions that were lifted and are remembered. At 60 bytes each they keep an entry in Redis below 20 kB."""
_REMEMBERED_CHANGES: Final = 128
"""Recorded changes that a state knows. A process that slept through more of them may make its own once more."""
_UNRECORDED_CHANGES: Final = 256
"""Changes that are not recorded yet. Every process that runs records them within seconds."""

_T = TypeVar("_T")


class Change(BaseModel):
    """A change that is asked for.

    A change without an end replaces every value of its subject; one with an end hides it until then. For the trading
    state, a value stricter than ACTIVE adds a restriction, and `lifts` names those that end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Unique."""
    subject: str
    value: str | None = None
    """None: as the settings say; for the trading state: no restriction is added."""
    seconds: float | None = Field(default=None, gt=0)
    """For how long; None: until changed."""
    expires_at: float | None = None
    """When that is over, in seconds since the Unix epoch."""
    ends: str | None = None
    """Id of the temporary value or restriction that this change removes. If it is gone already, nothing happens."""
    lifts: tuple[str, ...] = ()
    """Ids of the restrictions of the trading state that this change ends."""
    again: Level | None = None
    """For a change that lifts restrictions for a time: the trading state is restricted to this again afterwards."""
    author: str
    reason: str
    sequence: int = 0
    """Orders the changes that one server made while it could not share them. Counts up, whatever the clocks do."""
    record: str | None = None
    """What the audit is to say of it, as JSON; None once it does. Used while the change is on one server alone."""


class Timed(BaseModel):
    """Something that may have an end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Of the change that set it."""
    seconds: float | None = Field(default=None, gt=0)
    """None: no end."""
    expires_at: float | None = None
    """Seconds since the Unix epoch."""
    author: str
    reason: str

    def remaining_seconds(self, wall_seconds: float) -> float:
        """Seconds left, at most as many as were asked for, whatever the wall clock did since."""
        assert self.seconds is not None
        assert self.expires_at is not None
        return min(self.seconds, self.expires_at - wall_seconds)


class Temporary(Timed):
    """A value with an end."""

    seconds: float = Field(gt=0)
    expires_at: float
    value: str


IsOver = Callable[[Timed], bool]
"""Whether something that has an end has ended."""


class Setting(BaseModel):
    """What is set of a subject."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 0
    """Version of the control state at which it was last changed."""
    change_id: str = ""
    """Of that change."""
    permanent: str | None = None
    """None: as the settings say."""
    author: str = ""
    """Who set the permanent value."""
    reason: str = ""
    temporary: Temporary | None = None


class Restriction(Timed):
    """A limit of the trading state, in force until it is lifted or has ended."""

    level: Level
    begins: bool = False
    """True: its instant is the one at which it comes into force, not the one at which it ends."""

    def in_force(self, is_over: IsOver) -> bool:
        """Whether it counts now."""
        return self.seconds is None or is_over(self) == self.begins


UNDECIDED: Final = Restriction(
    id="undecided",
    level="HALTED",
    author="server",
    reason="nobody has set the trading state yet, or what was set is not known here",
)
"""It stands in every state until it is lifted. A server that never saw a state is therefore halted."""


class Trading(BaseModel):
    """The restrictions of the trading state."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    restrictions: Mapping[str, Restriction] = {UNDECIDED.id: UNDECIDED}
    """By id, those that were not lifted."""
    lifted: Mapping[str, int] = {}
    """Restrictions that were lifted, by id, each with the version of the control state at which that was done."""

    def in_force(self, is_over: IsOver) -> list[Restriction]:
        """The restrictions that count now, the strictest first."""
        found = [one for one in self.restrictions.values() if one.in_force(is_over)]
        return sorted(found, key=lambda one: (-STRICTNESS.index(one.level), one.id))

    def state(self, is_over: IsOver) -> str:
        """The trading state: the strictest restriction that counts now."""
        found = self.in_force(is_over)
        return found[0].level if found else "ACTIVE"

    def stricter_than(self, state: str) -> tuple[str, ...]:
        """Ids of the restrictions that are stricter than a trading state, also of those that are still to begin."""
        return tuple(one.id for one in self.restrictions.values() if is_stricter(one.level, state))

    def superseded_by(self, state: str) -> tuple[str, ...]:
        """Ids of those that a lasting restriction to this state makes superfluous, where very many stand."""
        if len(self.restrictions) < _MOST_RESTRICTIONS:
            return ()
        others = self.restrictions.values()
        return tuple(one.id for one in others if not is_stricter(one.level, state) and not one.begins)

    def strictest(self, ids: Iterable[str]) -> Level | None:
        """The strictest level of these restrictions; None without any."""
        levels = {self.restrictions[one].level for one in ids if one in self.restrictions}
        return next((level for level in ("HALTED", "REDUCING") if level in levels), None)

    def relaxes(self, change: Change) -> bool:
        """Whether a change lifts something here that is stricter, or lasts longer, than what it puts in its place."""
        lifted = [self.restrictions[one] for one in change.lifts if one in self.restrictions]
        return any(
            change.seconds is not None or is_stricter(one.level, change.value or "ACTIVE") or one.begins
            for one in lifted
        )

    def with_change(self, change: Change, version: int) -> Trading:
        """The restrictions after a change, which makes this version."""
        ended = (*change.lifts, *(() if change.ends is None else (change.ends,)))
        lifted = dict(self.lifted) | dict.fromkeys(ended, version)
        added = [one for one in _restrictions_of(change) if one.id not in self.lifted]
        return _trading((*self.restrictions.values(), *added), lifted)

    def merged(self, other: Trading) -> Trading:
        """Every restriction of both, without those that either has lifted."""
        lifted = dict(self.lifted)
        for one, version in other.lifted.items():
            lifted[one] = max(version, lifted.get(one, version))
        return _trading((*self.restrictions.values(), *other.restrictions.values()), lifted)


class Made(BaseModel):
    """A change that led to a state."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    """Of the state that it made."""
    record: str | None = None
    """What the audit is to say of it, as JSON; None once it does."""


class Control(BaseModel):
    """A control state."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = Field(default=0, ge=0)
    """Grows with every change."""
    trading: Trading = Trading()
    settings: Mapping[str, Setting] = {}
    """By subject, without the trading state. One that was reset stays, so that an older copy does not set it again."""
    changes: Mapping[str, Made] = {}
    """The last changes, by id."""

    def temporary(self, subject: str, is_over: IsOver) -> Temporary | None:
        """The temporary value in force of a subject that is not the trading state."""
        setting = self.settings.get(subject)
        if setting is None or setting.temporary is None or is_over(setting.temporary):
            return None
        return setting.temporary

    def value(self, subject: str, is_over: IsOver) -> str | None:
        """The value in force; None: as the settings say."""
        if subject == TRADING_STATE:
            return self.trading.state(is_over)
        temporary = self.temporary(subject, is_over)
        if temporary is not None:
            return temporary.value
        setting = self.settings.get(subject)
        return None if setting is None else setting.permanent

    def timed(self) -> list[tuple[str, Timed]]:
        """Everything that has an end, with its subject."""
        restrictions = [one for one in self.trading.restrictions.values() if one.seconds is not None]
        return [(TRADING_STATE, one) for one in restrictions] + [
            (subject, one.temporary) for subject, one in self.settings.items() if one.temporary is not None
        ]

    def with_change(self, change: Change) -> Control:
        """The state after a change; this very state when it knows the change, or there is nothing to end."""
        if change.id in self.changes or not self._has(change.subject, change.ends):
            return self
        version, trading, settings = self.version + 1, self.trading, self.settings
        if change.subject == TRADING_STATE:
            trading = trading.with_change(change, version)
        else:
            before = settings.get(change.subject, Setting())
            settings = _sorted({**settings, change.subject: _setting(before, change, version)})
        changes = _remembered({**self.changes, change.id: Made(version=version, record=change.record)})
        return Control(version=version, trading=trading, settings=settings, changes=changes)

    def with_changes(self, changes: Iterable[Change]) -> Control:
        """The state after changes, one after the other."""
        state = self
        for change in changes:
            state = state.with_change(change)
        return state

    def with_record(self, change_id: str, record: str | None) -> Control:
        """The state in which a change is still to be recorded like this; None: in which it has been."""
        made = self.changes.get(change_id)
        if made is None or made.record == record:
            return self
        changes = _remembered({**self.changes, change_id: Made(version=made.version, record=record)})
        return self.model_copy(update={"changes": changes})

    def merged(self, other: Control) -> Control:
        """What this state and another one say together."""
        if self == other:
            return self
        settings = dict(self.settings)
        for subject, setting in other.settings.items():
            settings[subject] = max(setting, settings.get(subject, setting), key=_stamp)
        changes = dict(self.changes)
        for one, made in other.changes.items():
            changes[one] = _merged(made, changes.get(one, made))
        return Control(
            version=max(self.version, other.version),
            trading=self.trading.merged(other.trading),
            settings=_sorted(settings),
            changes=_remembered(changes),
        )

    def following(self, found: Control) -> Control:
        """This state as the one that replaces `found`: one version is never two states."""
        steers_otherwise = (self.trading, self.settings) != (found.trading, found.settings)
        if self.version == found.version and steers_otherwise:
            return self.model_copy(update={"version": self.version + 1})
        return self

    def _has(self, subject: str, ended: str | None) -> bool:
        """Whether what a change ends is there; True for a change that ends nothing."""
        if ended is None:
            return True
        if subject == TRADING_STATE:
            return ended in self.trading.restrictions
        setting = self.settings.get(subject)
        return setting is not None and setting.temporary is not None and setting.temporary.id == ended


class Kept(BaseModel):
    """What a server keeps on its disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    control: Control = Control()
    """The last state that is known to be everybody's."""
    pending: tuple[Change, ...] = ()
    """Changes in force on this server that only it is known to have, in the order in which they were made."""

    def merged(self, other: Kept) -> Kept:
        """What both know."""
        control = self.control.merged(other.control)
        pending: dict[str, Change] = {}
        for change in (*self.pending, *other.pending):
            known = pending.get(change.id, change)
            pending[change.id] = change if change.record is None else known
        for change in pending.values():
            if change.record is None:  # of a change that was made by a write without an answer, too
                control = control.with_record(change.id, None)
        left = [change for change in pending.values() if change.id not in control.changes]
        return Kept(control=control, pending=tuple(sorted(left, key=lambda one: (one.sequence, one.id))))


def is_stricter(state: str, other: str) -> bool:
    """Whether a trading state is stricter than another."""
    return STRICTNESS.index(state) > STRICTNESS.index(other)


def _restrictions_of(change: Change) -> list[Restriction]:
    """What a change of the trading state adds."""
    said = {"author": change.author, "reason": change.reason}
    when = {"seconds": change.seconds, "expires_at": change.expires_at}
    added = []
    if change.value in ("REDUCING", "HALTED"):
        added.append(Restriction.model_validate({"id": change.id, "level": change.value} | said | when))
    if change.again is not None:
        later = {"id": f"{change.id}.again", "level": change.again, "begins": True}
        added.append(Restriction.model_validate(later | said | when))
    return added


def _trading(restrictions: Iterable[Restriction], lifted: Mapping[str, int]) -> Trading:
    standing = {one.id: one for one in restrictions if one.id not in lifted}
    newest = sorted(lifted, key=lambda one: (one == UNDECIDED.id, lifted[one], one))[-_REMEMBERED_LIFTS:]
    return Trading(restrictions=_sorted(standing), lifted={one: lifted[one] for one in sorted(newest)})


def _setting(before: Setting, change: Change, version: int) -> Setting:
    stamp = {"version": version, "change_id": change.id}
    if change.ends is not None:
        return before.model_copy(update=stamp | {"temporary": None})
    if change.seconds is None:
        said = {"permanent": change.value, "author": change.author, "reason": change.reason}
        return Setting.model_validate(stamp | said)
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
    return before.model_copy(update=stamp | {"temporary": temporary})


def _stamp(setting: Setting) -> tuple[int, str, str]:
    """Orders two copies of a setting. Made of one change on two states, they may still differ in what it hides."""
    return setting.version, setting.change_id, setting.model_dump_json()


def _merged(made: Made, other: Made) -> Made:
    record = None if made.record is None or other.record is None else max(made.record, other.record)
    return Made(version=max(made.version, other.version), record=record)


def _remembered(changes: Mapping[str, Made]) -> dict[str, Made]:
    newest = sorted(changes, key=lambda one: (changes[one].version, one), reverse=True)
    recorded = [one for one in newest if changes[one].record is None][:_REMEMBERED_CHANGES]
    unrecorded = [one for one in newest if changes[one].record is not None][:_UNRECORDED_CHANGES]
    return {one: changes[one] for one in sorted((*recorded, *unrecorded))}


def _sorted(items: Mapping[str, _T]) -> dict[str, _T]:
    return dict(sorted(items.items()))
