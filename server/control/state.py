"""The control state as a process obeys it: in force at once here, soon everywhere, kept over restarts.

Read on the decision path as plain attributes. Every change has an author and a reason, is logged, and goes into the
audit journal of the process that made it.

A change is in force here before it is written anywhere: on-call must be able to halt trading whatever is broken.
Without Redis the trading state can only be made stricter than the one that was last known of all servers. A server
whose file cannot be read at start, or that has none and does not reach Redis, is halted until it knows better.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import structlog
from openfeature.provider import FeatureProvider
from pydantic import BaseModel, ConfigDict, Field, Secret, field_validator

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from server.audit.errors import JournalError
from server.control.errors import (
    ChangeRefusedError,
    ControlChangedError,
    InvalidChangeError,
    UnknownSubjectError,
)
from server.control.file import ControlFile
from server.control.flags import FLAGS, ControlProvider, Flags
from server.control.model import STRICTNESS, TRADING_STATE, Change, Kept, Setting, Temporary
from server.control.records import describe, record
from server.control.shared import SharedControl, SharedSettings, UnreachableError
from server.control.store import ControlStore
from server.control.subjects import OFF, ON, Subject, flag_subject, one_of

if TYPE_CHECKING:
    from server.audit.journal import Journal

_log = structlog.get_logger(__name__)

_LOOK_SECONDS: Final = 0.05
"""Between two looks whether a temporary value is over."""
_AGAIN_SECONDS: Final = 1.0
"""Between two attempts to remove one that is."""
_DOUBT_SECONDS: Final = 60.0
"""What was over when it was first seen is left in the state for so long: our wall clock may be ahead, and the servers
whose clocks are right then remove it when it is time."""


class SecretOptions(Secret[dict[str, Any]]):
    """Options by name, which are shown nowhere."""


class ControlSettings(BaseModel):
    """Control state."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    shadow: bool = Field(default=True)
    """Mirror decided rows to the challenger."""
    cached_score: bool = Field(default=True)
    """Let the last good score answer when no replica can."""
    halted: bool = Field(default=False)
    """Start with trading state HALTED, whatever it was before: of all servers that share the control state."""
    store: Literal["redis", "file"] = "redis"
    """Where the state is: in the Redis of `redis_url`, shared by all servers there, with a copy beside the journal; or
    in that file alone, shared by the processes of this server."""
    shared: SharedSettings = SharedSettings()
    flag_provider: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    """`module:callable` of another OpenFeature provider for the flags, for example
    `openfeature.contrib.provider.flagd:FlagdProvider`; they then cannot be set here. Unset: the control state."""
    flag_provider_options: SecretOptions = SecretOptions({})
    """What that callable is given, a JSON object. It is a secret as a whole, since most providers want a key."""

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
    """A change as somebody asks for it."""

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


class ControlState:
    """The control state as one process obeys it.

    Args:
        settings: Values while nobody set others.
        file: Where it is kept and shared with the other processes of this server.
        subjects: What can be steered besides trading state and flags.
        journal: Makes changes durable in the audit.
        instance_id: This server process.
        new_id: Makes a unique, time-ordered id.
        wall_clock_ns: Nanoseconds since the Unix epoch.
        clock: Monotonic seconds.
        shared: Where all servers share it; None: in the file alone.
        flag_provider: Says what the flags are; None: this state.
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
        self.flags_on = tuple(name for name in FLAGS if defaults[name])
        """Names of the flags that are on."""
        self._set_flags = dict(defaults)
        self.flags = Flags(defaults, flag_provider or ControlProvider(self._set_flags.get), self._obey_flags)
        usual = "HALTED" if settings.halted else "ACTIVE"
        self._subjects = {
            TRADING_STATE: Subject(usual, one_of(*STRICTNESS), self._obey_trading_state),
            **{flag_subject(name): self._flag(name, is_on) for name, is_on in defaults.items()},
            **subjects,
        }
        self._journal = journal
        self._instance_id = instance_id
        self._new_id = new_id
        self._wall_clock_ns = wall_clock_ns
        self._clock = clock
        self._obeyed: dict[str, tuple[str, str]] = {}
        """Value and id of the temporary value in force, by subject."""
        self._ends: dict[str, float] = {}
        """Monotonic instants at which temporary values are over, by id."""
        self._next_end = math.inf
        self._doubted_until: dict[str, float] = {}
        """Monotonic instants until which temporary values are left in the state, by id."""
        self._finishing: set[asyncio.Task[admin_pb2.Change]] = set()
        self.store = ControlStore(file, shared, usual, self._is_over, self._obey)
        self.store.restore()
        self._obey()

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
        return self._obeyed[subject][0]

    def usual(self, subject: str) -> str:
        """The value while nobody set another. Raises `KeyError` for what cannot be steered."""
        return self._subjects[subject].usual

    def settings(self) -> Mapping[str, Setting]:
        """What somebody set, by subject."""
        return self.store.in_force().settings

    def reverts_in_seconds(self, subject: str) -> float | None:
        """Seconds until a temporary value is over; None without one."""
        end = self._ends.get(self._obeyed[subject][1])
        return None if end is None else max(0.0, end - self._clock())

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

    async def watch(self) -> None:
        """Takes over what others change, and ends what is over, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.store.watch_file())
            if self.store.shared is not None:
                tasks.create_task(self.store.watch_shared(self.store.shared))
            if not self.flags.is_ours:
                tasks.create_task(self.flags.run())
            tasks.create_task(self._watch_ends())

    async def change(self, wanted: Wanted) -> admin_pb2.Change:
        """Makes a change, and returns it when it is shared as far as possible, written and recorded.

        It is in force in this process at once, except for a trading state that is less strict than the one that all
        servers know, and where a version is expected or all servers are needed: these wait for Redis. Cancelling gives
        up the waiting, not the change.

        Raises:
            UnknownSubjectError: There is no such thing.
            InvalidChangeError: It breaks a rule.
            ControlChangedError: The version in force is not the expected one.
            ChangeRefusedError: It cannot be made in the state that things are in.
        """
        self._check(wanted)
        change = self._change(wanted)
        if wanted.dry_run:
            before = self.store.in_force()
            if wanted.expected_version not in (None, before.version):
                raise ControlChangedError(before.version, wanted.expected_version or 0)
            message = describe(self._subjects, before, before.with_change(change), change, self._is_over)
            message.version, message.dry_run, message.change_id = before.version, True, ""
            message.diff.extend(wanted.detail)
            return message
        if wanted.expected_version is None and not wanted.needs_all:
            self.store.put_in_force(change)
        task = asyncio.create_task(self._finish(change, wanted))
        self._finishing.add(task)
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
        if wanted.subject.startswith("flag/") and not self.flags.is_ours:
            raise ChangeRefusedError(f"flags are set in {self.flags.provider_name}, not here")

    def _change(self, wanted: Wanted) -> Change:
        seconds = wanted.expires_in_seconds
        return Change(
            id=self._new_id(),
            subject=wanted.subject,
            value=wanted.value,
            seconds=seconds,
            expires_at=None if seconds is None else self._wall_clock_ns() / 1e9 + seconds,
            author=wanted.author,
            reason=wanted.reason,
        )

    async def _finish(self, change: Change, wanted: Wanted) -> admin_pb2.Change:
        """Shares, writes and records a change."""
        before, after, local = await self.store.bring(change, wanted.expected_version, wanted.needs_all)
        message = describe(self._subjects, before, after, change, self._is_over)
        message.local = local
        message.diff.extend(wanted.detail)
        await self.record(message)
        return message

    def _finished(self, task: asyncio.Task[admin_pb2.Change]) -> None:
        self._finishing.discard(task)
        if not task.cancelled():
            task.exception()  # seen, also where its caller has gone

    async def _watch_ends(self) -> None:
        """Ends what is over: at once here, and then in the state, where one process of all does it and records it."""
        loop, next_attempt = asyncio.get_running_loop(), -math.inf
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if self._clock() >= self._next_end:
                self._obey()
            over = [
                (subject, setting.temporary)
                for subject, setting in self.store.control.settings.items()
                if setting.temporary is not None and subject in self._subjects and self._may_end(setting.temporary)
            ]
            if over and loop.time() >= next_attempt:
                next_attempt = loop.time() + _AGAIN_SECONDS
                for subject, temporary in over:
                    await self._end(subject, temporary)

    async def _end(self, subject: str, temporary: Temporary) -> None:
        end = Change(
            id=f"{temporary.id}.end",
            subject=subject,
            ends=temporary.id,
            author="expiry",
            reason=f"set for {temporary.seconds:g} s by {temporary.author}: {temporary.reason}"[:256],
        )
        try:
            made = await self.store.end(end)
        except (UnreachableError, OSError):
            return  # logged where it was noticed
        if made is not None:
            await self.record(describe(self._subjects, *made, end, self._is_over))

    def _obey(self) -> None:
        """Puts what is known in force."""
        control = self.store.in_force()
        temporaries = [setting.temporary for setting in control.settings.values() if setting.temporary is not None]
        for name, subject in self._subjects.items():
            temporary = control.temporary(name, self._is_over)
            value = control.value(name, self._is_over)
            if value is None or subject.check(value):
                value = subject.usual  # of a version that knows more than this one
            obeyed = value, "" if temporary is None else temporary.id
            if self._obeyed.get(name) != obeyed:
                self._obeyed[name] = obeyed
                subject.obey(value, None if temporary is None else self._ends[temporary.id] - self._clock())
        self._ends = {one.id: self._ends[one.id] for one in temporaries if one.id in self._ends}
        self._doubted_until = {one: until for one, until in self._doubted_until.items() if one in self._ends}
        self._next_end = min((end for end in self._ends.values() if end > self._clock()), default=math.inf)
        self.version = control.version

    def _is_over(self, temporary: Temporary) -> bool:
        """By the monotonic clock from when it is first seen, whatever the wall clock does then."""
        end = self._ends.get(temporary.id)
        if end is None:
            remaining = temporary.remaining_seconds(self._wall_clock_ns() / 1e9)
            end = self._ends[temporary.id] = self._clock() + remaining
            if remaining <= 0:
                self._doubted_until[temporary.id] = self._clock() + _DOUBT_SECONDS
        return self._clock() >= end

    def _may_end(self, temporary: Temporary) -> bool:
        return self._is_over(temporary) and self._clock() >= self._doubted_until.get(temporary.id, -math.inf)

    def _obey_trading_state(self, value: str, _seconds: float | None) -> None:
        self.trading_state_name = value
        self.trading_state = admin_pb2.TradingState.Value(f"TRADING_STATE_{value}")

    def _flag(self, name: str, default: bool) -> Subject:
        def obey(value: str, _seconds: float | None) -> None:
            self._set_flags[name] = value == ON
            if self.flags.is_ours:
                self.flags.evaluate()

        return Subject(ON if default else OFF, one_of(ON, OFF), obey)

    def _obey_flags(self, values: Mapping[str, bool]) -> None:
        self.shadow, self.cached_score = values["shadow"], values["cached_score"]
        self.flags_on = tuple(name for name in FLAGS if values[name])

    async def record(self, change: admin_pb2.Change) -> None:
        """Logs a change and makes it durable; also one of something that is not in this state.

        A journal that cannot be written does not undo the change. The log line and an error beside it are then all
        there is.
        """
        change.instance_id = self._instance_id
        change.changed_at.FromNanoseconds(self._wall_clock_ns())
        _log.warning(
            "change",
            subject=change.subject,
            previous=change.previous,
            value=change.value,
            author=change.author,
            reason=change.reason,
            version=change.version,
        )
        try:
            entry = packet_pb2.JournalEntry(control_change=record(change)).SerializeToString()
            await self._journal.append(entry, even_if_full=True)
        except JournalError as error:
            _log.error("change not recorded", change_id=change.change_id, subject=change.subject, error=str(error))


def halt_at_start(settings: ControlSettings, file: ControlFile, new_id: Callable[[], str]) -> None:
    """Makes a server halted that is to start so; called once for all its processes, before the first.

    Raises:
        OSError: It cannot be written.
    """
    if not settings.halted:
        return
    halt = Change(
        id=new_id(), subject=TRADING_STATE, value="HALTED", author="server", reason="its settings say to start halted"
    )

    def halted(found: Kept | None) -> Kept:
        found = found or Kept()
        if settings.store == "redis":
            return found.merged(Kept(pending=(halt,)))
        return Kept(control=found.control.with_change(halt))

    file.change(halted)
