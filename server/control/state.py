"""The control state as one process applies it: here at once, on all servers soon, and kept over restarts.

The decision path reads it as plain attributes. Every change has an author and a reason, is logged, and goes into the
audit journal of the process that made it. If that process dies before it has done so, another process records it.

A change applies here before it is written anywhere: on-call must be able to halt trading whatever is broken. The only
exception is a change that relaxes the trading state. It applies once it is written where the other servers find it.

A server that has never seen a control state is halted. So is a new installation, until somebody sets the trading state
or `initial_trading_state` says otherwise.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import structlog
from google.protobuf.json_format import ParseError
from openfeature.provider import FeatureProvider
from pydantic import BaseModel, ConfigDict, Field, Secret, field_validator

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from server.control.file import ControlFile
from server.control.flags import FLAGS, ControlProvider, Flags
from server.control.model import (
    STRICTNESS,
    TRADING_STATE,
    UNDECIDED,
    Change,
    Control,
    Restriction,
    Setting,
    Timed,
    is_stricter,
)
from server.control.recorded import record, recorded
from server.control.records import describe, from_json, to_json
from server.control.shared import SharedControl, SharedSettings, UnreachableError
from server.control.store import ControlStore, Describe
from server.control.subjects import OFF, ON, Subject, flag_subject, one_of
from server.errors import (
    ChangeRefusedError,
    ControlChangedError,
    InvalidChangeError,
    JournalError,
    UnknownSubjectError,
)

if TYPE_CHECKING:
    from server.journal.journal import Journal

_log = structlog.get_logger(__name__)

_LOOK_SECONDS: Final = 0.05
"""Between two looks whether a temporary value is over."""
_AGAIN_SECONDS: Final = 1.0
"""Between two attempts to remove one that is, and to record what could not be recorded."""
_LOOK_FOR_RECORDS_SECONDS: Final = 0.25
"""Between two looks whether a change is still to be recorded."""
_RECORD_SECONDS: Final = 5.0
"""A change that is not recorded this long after it was first seen is recorded by any process that knows it. The process
that made it needs milliseconds, and half a second to announce it."""
_DOUBT_SECONDS: Final = 60.0
"""What was over when it was first seen is left in the state for so long: our wall clock may be ahead, and the servers
whose clocks are right then remove it when it is time. A restriction is left for as long as it was set for."""


class SecretOptions(Secret[dict[str, Any]]):
    """Options by name, which are shown nowhere."""


class ControlSettings(BaseModel):
    """Initial values of the control state, and where it is stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shadow: bool = Field(default=True)
    """Default of the flag `shadow`: mirror decided rows to the challenger."""
    cached_score: bool = Field(default=True)
    """Default of the flag `cached_score`: let the last good score answer when no model can."""
    embedded: bool = Field(default=True)
    """Default of the flag `embedded`: let the champion in the server's own process answer, where the chain asks it."""
    out_of_domain: bool = Field(default=True)
    """Default of the flag `out_of_domain`: ABSTAIN where the features are not such as the model has seen."""
    uncertain: bool = Field(default=False)
    """Default of the flag `uncertain`: ABSTAIN where a score lies in the model's conformal band. The model's card says
    what that costs: often most of the trades."""
    halted: bool = Field(default=False)
    """Start with trading state HALTED, whatever it was before; this halts all servers that share the control state. Set
    it to start after an incident."""
    initial_trading_state: Literal["HALTED", "REDUCING", "ACTIVE"] = "HALTED"
    """Trading state of a new installation. When neither Redis nor this server's disk holds a control state, the server
    sets this one and records it in the audit. Change it only for demonstrations and tests: with anything but HALTED,
    trading continues even after Redis and every server's disk were lost at once, and with them every halt."""
    store: Literal["redis", "file"] = "redis"
    """Where the control state is stored. `redis`: in the Redis of `redis_url`, shared by all servers, with a copy in a
    file beside the journal. `file`: in that file alone, shared by the processes of this server. Use `file` for a single
    server without Redis failover."""
    shared: SharedSettings = SharedSettings()
    flag_provider: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    """`module:callable` of another OpenFeature provider for the flags, for example
    `openfeature.contrib.provider.flagd:FlagdProvider`. `pretrade flag` cannot set them then. Unset: the flags are part
    of the control state."""
    flag_provider_options: SecretOptions = SecretOptions({})
    """Arguments of that callable, a JSON object. It is treated as a secret as a whole, because most providers require a
    key."""

    @field_validator("flag_provider_options", mode="before")
    @classmethod
    def _read(cls, options: object) -> object:
        """A variable's text, which is not read as JSON where it stands for a secret."""
        if not isinstance(options, str):
            return options
        try:
            return json.loads(options)
        except ValueError:
            raise ValueError("must be a JSON object") from None  # whose message would quote it


@dataclass(frozen=True, slots=True)
class Wanted:
    """A change as its caller asks for it."""

    subject: str
    value: str | None
    """None: as the settings say."""
    author: str
    reason: str
    expires_in_seconds: float | None = None
    expected_version: int | None = None
    """The change is refused unless this is the version in force."""
    _: KW_ONLY
    dry_run: bool = False
    detail: tuple[str, ...] = ()
    """What the value stands for, a line each."""
    needs_all: bool = False
    """The change is refused while it would hold on this server alone: it goes by what all of them have done."""
    lifts: tuple[str, ...] = ()
    """For the trading state: ids of the restrictions to lift; none: all that are stricter than the value."""


class ControlState:
    """The control state as one process applies it.

    Args:
        settings: Values while no others are set.
        file: Where it is stored and shared with the other processes of this server.
        subjects: What can be steered besides trading state and flags.
        journal: Makes changes durable in the audit.
        instance_id: This server process.
        new_id: Makes a unique, time-ordered id.
        wall_clock_ns: Nanoseconds since the Unix epoch.
        clock: Monotonic seconds.
        shared: Where all servers share it; None: it is in the file alone.
        flag_provider: Decides the flags; None: this state decides them.
    """

    def __init__(
        self,
        settings: ControlSettings,
        file: ControlFile,
        subjects: Mapping[str, Subject],
        journal: Journal,
        instance_id: str,
        new_id: Callable[[], str],
        wall_clock_ns: Callable[[], int],
        clock: Callable[[], float],
        shared: SharedControl | None = None,
        flag_provider: FeatureProvider | None = None,
    ) -> None:
        self.version = 0
        """Version of the state in force."""
        self.trading_state: admin_pb2.TradingState.ValueType = admin_pb2.TRADING_STATE_HALTED
        self.trading_state_name = "HALTED"
        defaults = {name: bool(getattr(settings, name)) for name in FLAGS}
        self.shadow, self.cached_score = defaults["shadow"], defaults["cached_score"]
        self.embedded = defaults["embedded"]
        self.out_of_domain, self.uncertain = defaults["out_of_domain"], defaults["uncertain"]
        self.flags_on = tuple(name for name in FLAGS if defaults[name])
        """Names of the flags that are on."""
        self._set_flags = dict(defaults)
        self.flags = Flags(
            defaults,
            flag_provider or ControlProvider(self._set_flags.get),
            self._apply_flags,
            settings.flag_provider_options.get_secret_value(),
        )
        self._initial_trading_state = settings.initial_trading_state
        self._subjects = {
            TRADING_STATE: Subject("HALTED", one_of(*STRICTNESS), self._apply_trading_state),
            **{flag_subject(name): self._flag(name, is_on) for name, is_on in defaults.items()},
            **subjects,
        }
        self._journal = journal
        self._instance_id = instance_id
        self._new_id = new_id
        self._wall_clock_ns = wall_clock_ns
        self._clock = clock
        self._applied: dict[str, tuple[str, str]] = {}
        """Value and id of the temporary value in force, by subject."""
        self._ends: Mapping[str, float] = {}
        """Monotonic instants at which what has an end is over, by id."""
        self._next_end = math.inf
        self._doubted_until: Mapping[str, float] = {}
        """Monotonic instants until which what seems to be over is left in the state, by id."""
        self._is_watching = False
        """True from the start on: a change that is seen then was just set, or was set where no server could see it."""
        self._finishing: dict[asyncio.Task[admin_pb2.Change], str] = {}
        """Changes that are being made, by their ids; their own tasks record them."""
        self._unrecorded: Mapping[str, float] = {}
        """Monotonic instants at which unrecorded changes were first seen, by id."""
        self._refused_records: set[str] = set()
        """Ids of changes that the journal has refused, and that were logged."""
        self.record_failures = 0
        """Attempts to record a change that failed since start."""
        self.store = ControlStore(file, shared, self._apply)
        self.store.restore()
        self._apply()

    def steer(self, subjects: Mapping[str, Subject]) -> None:
        """Steers something more from now on, beginning with what the state says of it."""
        self._subjects |= subjects
        self._apply()

    @property
    def stale(self) -> bool:
        """True when other servers may have made changes that are not known here."""
        return self.store.stale

    @property
    def problem(self) -> str:
        """What is wrong; empty when nothing is."""
        shared = self.store.shared
        return (shared.problem if shared is not None else "") or self.flags.problem

    def value(self, subject: str) -> str:
        """The value in force. Raises `KeyError` for what cannot be steered."""
        return self._applied[subject][0]

    def default(self, subject: str) -> str:
        """The default value of a subject. Raises `KeyError` for what cannot be steered."""
        return self._subjects[subject].default

    def settings(self) -> Mapping[str, Setting]:
        """The values that are set, by subject, without the trading state."""
        settings = self.store.in_force().settings
        return {
            subject: setting
            for subject, setting in settings.items()
            if setting.permanent is not None or setting.temporary is not None
        }

    def restrictions(self) -> list[Restriction]:
        """What the trading state comes from, the strictest first; then what is still to come into force."""
        trading = self.store.in_force().trading
        coming = [one for one in trading.restrictions.values() if one.begins and not one.in_force(self._is_over)]
        return trading.in_force(self._is_over) + coming

    def remaining_seconds(self, timed: Timed) -> float | None:
        """Seconds until something that has an end is over; None without one."""
        end = self._ends.get(timed.id)
        return None if end is None else max(0.0, end - self._clock())

    def reverts_in_seconds(self, subject: str) -> float | None:
        """Seconds until the value in force changes by itself; None when it does not."""
        end = self._ends.get(self._applied[subject][1]) if subject != TRADING_STATE else self._trading_state_ends()
        return None if end is None else max(0.0, end - self._clock())

    def _trading_state_ends(self) -> float | None:
        """The monotonic instant at which the trading state becomes another one by itself."""
        trading = self.store.in_force().trading

        def state_at(instant: float) -> str:
            return trading.state(lambda timed: self._ends.get(timed.id, math.inf) <= instant)

        now = self._clock()
        instants = sorted(end for one in trading.restrictions if (end := self._ends.get(one, -math.inf)) > now)
        return next((end for end in instants if state_at(end) != self.trading_state_name), None)

    def status(self) -> admin_pb2.ControlStatus:
        """Where the state comes from."""
        shared = self.store.shared
        status = admin_pb2.ControlStatus(
            shared=shared is not None, stale=self.stale, pending=self.store.pending, problem=self.problem
        )
        age = None if shared is None else shared.age_seconds
        if age is not None:
            status.age.FromNanoseconds(int(age * 1e9))
        return status

    async def synchronise(self) -> None:
        """Takes over what all servers share, if that can be reached at once; called before serving."""
        await self.store.synchronise()
        await self._begin()

    async def watch(self) -> None:
        """Takes over what others change, and ends what is over, until cancelled."""
        self._is_watching = True
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.store.watch_file())
            if self.store.shared is not None:
                tasks.create_task(self.store.watch_shared(self.store.shared))
            if not self.flags.is_ours:
                tasks.create_task(self.flags.run())
            tasks.create_task(self._watch_ends())
            tasks.create_task(self._watch_records())

    async def change(self, wanted: Wanted) -> admin_pb2.Change:
        """Makes a change, and returns it when it is shared as far as possible, written and recorded.

        It is in force in this process at once, except for one that relaxes the trading state, and where a version is
        expected or all servers are needed: these wait for Redis. Cancelling gives up the waiting, not the change.

        Raises:
            UnknownSubjectError: There is no such thing.
            InvalidChangeError: It breaks a rule.
            ControlChangedError: The version in force is not the expected one.
            ChangeRefusedError: It cannot be made in the state that things are in.
            ChangeInDoubtError: It was sent to Redis, and it is not known whether it was made.
        """
        self._check(wanted)
        change = await self._change(wanted)
        describe_ = self._describe(change, wanted.detail)
        before = self.store.in_force()
        if wanted.dry_run:
            if wanted.expected_version not in (None, before.version):
                raise ControlChangedError(before.version, wanted.expected_version or 0)
            message = _message(describe_(before, before.with_change(change)))
            message.version, message.dry_run, message.change_id = before.version, True, ""
            return message
        if wanted.expected_version is None and not wanted.needs_all and not before.trading.relaxes(change):
            self.store.put_in_force(change)
        task = asyncio.create_task(self._finish(change, describe_, wanted))
        self._finishing[task] = change.id
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _check(self, wanted: Wanted) -> None:
        subject = self._subjects.get(wanted.subject)
        if subject is None:
            raise UnknownSubjectError(f"{wanted.subject}: there are {', '.join(self._subjects)}")
        if wanted.value is not None and (problem := subject.check(wanted.value)):
            raise InvalidChangeError(f"{wanted.subject}: {problem}")
        if wanted.value is None and wanted.expires_in_seconds is not None:
            raise InvalidChangeError(f"{wanted.subject}: what the settings say cannot be set for a time")
        if wanted.value is None and wanted.subject == TRADING_STATE:
            raise InvalidChangeError(f"{wanted.subject}: must be one of {', '.join(STRICTNESS)}")
        if wanted.subject.startswith("flag/") and not self.flags.is_ours:
            raise ChangeRefusedError(f"flags are set in {self.flags.provider_name}, not here")

    async def _change(self, wanted: Wanted) -> Change:
        lifts = await self._lifted(wanted) if wanted.subject == TRADING_STATE else ()
        seconds = wanted.expires_in_seconds
        return Change(
            id=self._new_id(),
            subject=wanted.subject,
            value=wanted.value,
            seconds=seconds,
            expires_at=None if seconds is None else self._wall_clock_ns() / 1e9 + seconds,
            lifts=lifts,
            again=None if seconds is None else self.store.in_force().trading.strictest(lifts),
            author=wanted.author,
            reason=wanted.reason,
        )

    async def _lifted(self, wanted: Wanted) -> tuple[str, ...]:
        """Ids of the restrictions that a change of the trading state lifts.

        They are chosen here, before anything is written: a halt that is set meanwhile is not among them.
        """
        trading, value = self.store.in_force().trading, wanted.value or "HALTED"
        if not (wanted.lifts or value == "ACTIVE" or is_stricter(trading.state(self._is_over), value)):
            return trading.superseded_by(value) if wanted.expires_in_seconds is None else ()
        await self.store.refresh()
        trading = self.store.in_force().trading
        if unknown := [one for one in wanted.lifts if one not in trading.restrictions]:
            standing = ", ".join(trading.restrictions) or "none"
            raise UnknownSubjectError(f"lifts: no restriction {', '.join(unknown)} stands; there are: {standing}")
        return wanted.lifts or trading.stricter_than(value)

    def _describe(self, change: Change, detail: tuple[str, ...] = ()) -> Describe:
        """Says what the audit is to say of a change that is made now."""
        at_ns = self._wall_clock_ns()

        def describe_(before: Control, after: Control) -> str:
            message = describe(self._subjects, before, after, change, self._is_over)
            message.diff.extend(detail)
            message.instance_id = self._instance_id
            message.changed_at.FromNanoseconds(at_ns)
            return to_json(record(message))

        return describe_

    async def _finish(self, change: Change, describe_: Describe, wanted: Wanted) -> admin_pb2.Change:
        """Shares, writes and records a change."""
        replicated = await self.store.replicate(change, describe_, wanted.expected_version, wanted.needs_all)
        change_made = from_json(replicated.record)
        _tell("change", change_made)
        await self._record(change_made)
        message = _message(replicated.record)
        message.local, message.unsaved = replicated.local, replicated.unsaved
        return message

    def _finished(self, task: asyncio.Task[admin_pb2.Change]) -> None:
        del self._finishing[task]
        if not task.cancelled():
            task.exception()  # seen, also where its caller has gone

    async def _begin(self) -> None:
        """Sets the trading state of a new installation, where the settings say one."""
        if not self.store.is_new or self._initial_trading_state == "HALTED":
            return
        change = Change(
            id=self._new_id(),
            subject=TRADING_STATE,
            value=self._initial_trading_state,
            ends=UNDECIDED.id,
            author="server",
            reason="control.initial_trading_state of a new installation",
        )
        if await self._make(change):
            self.store.is_new = False

    async def _watch_ends(self) -> None:
        """Ends what is over: at once here, and then in the state, where one process of all does it and records it."""
        loop, next_attempt = asyncio.get_running_loop(), -math.inf
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if self._clock() >= self._next_end:
                self._apply()
            over = [
                (subject, timed)
                for subject, timed in self.store.control.timed()
                if subject in self._subjects and self._may_end(timed)
            ]
            if (over or self.store.is_new) and loop.time() >= next_attempt:
                next_attempt = loop.time() + _AGAIN_SECONDS
                await self._begin()
                for subject, timed in over:
                    await self._end(subject, timed)

    async def _end(self, subject: str, timed: Timed) -> None:
        """Removes what is over, or makes for good what has begun."""
        has_begun = isinstance(timed, Restriction) and timed.begins
        change = Change(
            id=f"{timed.id}.end",
            subject=subject,
            value=timed.level if isinstance(timed, Restriction) and has_begun else None,
            ends=timed.id,
            author="expiry",
            reason=f"set for {timed.seconds:g} s by {timed.author}: {timed.reason}"[:256],
        )
        await self._make(change)

    async def _make(self, change: Change) -> bool:
        """Makes a change that any process may make; False when that is not known to have succeeded."""
        try:
            await self.store.make(change, self._describe(change))
        except UnreachableError:
            return False  # logged where it was noticed
        return True

    async def _watch_records(self) -> None:
        """Records changes that were made and not recorded, also those of processes that died, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_FOR_RECORDS_SECONDS)
            found, now = self.store.unrecorded(), self._clock()
            self._unrecorded = {one: self._unrecorded.get(one, now) for one in found}
            for change_id, text in found.items():
                try:
                    change = from_json(text)
                except ParseError as error:
                    _log.error("what is to be recorded of a change cannot be read", record=text, error=str(error))
                    self.store.note_recorded(change_id)
                    continue
                overdue = now - self._unrecorded[change_id] >= _RECORD_SECONDS
                is_ours = change.instance_id == self._instance_id and change_id not in self._finishing.values()
                if not (is_ours or overdue):
                    continue
                if not await self._record(change):
                    await asyncio.sleep(_AGAIN_SECONDS)
                    break
                _tell("change recorded after its call had ended", change)

    def _apply(self) -> None:
        """Puts what is known in force."""
        control = self.store.in_force()
        self._note_ends(control)
        for name, subject in self._subjects.items():
            temporary = control.temporary(name, self._is_over)
            value = control.value(name, self._is_over)
            if value is None or subject.check(value):
                value = subject.default  # of a version that knows more than this one
            applied = value, "" if temporary is None else temporary.id
            if self._applied.get(name) != applied:
                self._applied[name] = applied
                subject.apply(value, None if temporary is None else self._ends[temporary.id] - self._clock())
        self._next_end = min((end for end in self._ends.values() if end > self._clock()), default=math.inf)
        self.version = control.version

    def _note_ends(self, control: Control) -> None:
        """Decides by the monotonic clock when new values end, so that later jumps of the wall clock do not matter.

        A wall clock that is ahead must not end a halt. A halt therefore lasts its whole time from when this process
        first sees it. The process that set it, or one that saw it earlier, ends it before that.
        """
        now, wall_seconds = self._clock(), self._wall_clock_ns() / 1e9
        ends, doubted_until = {}, {}
        for _, timed in control.timed():
            remaining, doubt = timed.remaining_seconds(wall_seconds), _DOUBT_SECONDS
            if isinstance(timed, Restriction) and not timed.begins and timed.seconds is not None:
                doubt = max(doubt, timed.seconds)
                if self._is_watching:
                    remaining = timed.seconds
            ends[timed.id] = self._ends.get(timed.id, now + remaining)
            if timed.id not in self._ends and remaining <= 0:
                doubted_until[timed.id] = now + doubt
            elif timed.id in self._doubted_until:
                doubted_until[timed.id] = self._doubted_until[timed.id]
        self._ends, self._doubted_until = ends, doubted_until

    def _is_over(self, timed: Timed) -> bool:
        end = self._ends.get(timed.id)
        if end is None:
            return timed.remaining_seconds(self._wall_clock_ns() / 1e9) <= 0
        return self._clock() >= end

    def _may_end(self, timed: Timed) -> bool:
        return self._is_over(timed) and self._clock() >= self._doubted_until.get(timed.id, -math.inf)

    def _apply_trading_state(self, value: str, _seconds: float | None) -> None:
        self.trading_state_name = value
        self.trading_state = admin_pb2.TradingState.Value(f"TRADING_STATE_{value}")

    def _flag(self, name: str, default: bool) -> Subject:
        def apply(value: str, _seconds: float | None) -> None:
            self._set_flags[name] = value == ON
            if self.flags.is_ours:
                self.flags.evaluate()

        return Subject(ON if default else OFF, one_of(ON, OFF), apply)

    def _apply_flags(self, values: Mapping[str, bool]) -> None:
        self.shadow, self.cached_score = values["shadow"], values["cached_score"]
        self.embedded = values["embedded"]
        self.out_of_domain, self.uncertain = values["out_of_domain"], values["uncertain"]
        self.flags_on = tuple(name for name in FLAGS if values[name])

    async def record(self, change: admin_pb2.Change) -> None:
        """Logs something that an operator did and that is no part of this state, and makes it durable.

        A journal that cannot be written does not undo it. The log line and an error beside it are then all there is.
        """
        change.instance_id = self._instance_id
        change.changed_at.FromNanoseconds(self._wall_clock_ns())
        _tell("change", record(change))
        await self._record(record(change))

    async def _record(self, change: packet_pb2.ControlChange) -> bool:
        """Makes a change durable; returns whether that succeeded. If not, `_watch_records` tries again."""
        try:
            entry = packet_pb2.JournalEntry(control_change=change).SerializeToString()
            await self._journal.append(entry, even_if_full=True)
        except JournalError as error:
            self.record_failures += 1
            if change.change_id not in self._refused_records:
                self._refused_records.add(change.change_id)
                _log.error("change not recorded", change_id=change.change_id, subject=change.subject, error=str(error))
            return False
        self._refused_records.clear()
        self.store.note_recorded(change.change_id)
        return True


def _message(text: str) -> admin_pb2.Change:
    """A change as it is reported to its caller."""
    change = from_json(text)
    message = recorded(change)
    message.ClearField("diff")
    message.diff.extend(change.diff)
    return message


def _tell(event: str, change: packet_pb2.ControlChange) -> None:
    _log.warning(
        event,
        subject=change.subject,
        previous=change.previous,
        value=change.value,
        author=change.author,
        reason=change.reason,
        version=change.version,
        instance_id=change.instance_id,
    )
