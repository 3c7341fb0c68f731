"""What on-call can switch: flags, the trading state and forced breakers, the same in every process of a server.

Read on the decision path as plain attributes. Every change has an author and a reason, is logged, and goes into the
audit journal of the process that made it. It is in force there at once; the others read the file that it is written to.

The file survives a restart: a server that was halted comes back halted. One that cannot be read at start halts trading;
one that becomes unreadable later changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import structlog
from pydantic import BaseModel, ConfigDict, Field

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from server.audit.errors import JournalError
from server.control.file import Control, ControlFile, ForcedBreaker, TradingStateName, UnreadableControlError
from server.inference.breaker import Mode

if TYPE_CHECKING:
    from server.audit.journal import Journal
    from server.inference.breaker import Breaker

_log = structlog.get_logger(__name__)

FLAGS = {
    "shadow": "Mirror decided rows to the challenger.",
    "cached_score": "Let the last good score answer when no replica can.",
}
"""Every flag and what it does."""

_WATCH_SECONDS: Final = 0.05
"""Between two looks at the file: what another process changed is in force here after this at the latest."""
_REWRITE_SECONDS: Final = 1.0
"""Between two attempts to write what could not be written."""


class ControlSettings(BaseModel):
    """Control state at start."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    shadow: bool = Field(default=True)
    """Mirror decided rows to the challenger."""
    cached_score: bool = Field(default=True)
    """Let the last good score answer when no replica can."""
    halted: bool = Field(default=False)
    """Start with trading state HALTED, whatever it was before."""

    def control(self) -> Control:
        """The state before the first change."""
        return Control(
            trading_state="HALTED" if self.halted else "ACTIVE", flags={name: getattr(self, name) for name in FLAGS}
        )


class UnknownFlagError(KeyError):
    """There is no flag of this name."""


class ControlChangedError(Exception):
    """The control state is not the one that the change was meant for."""


class ControlState:
    """The control state as one process obeys it.

    Args:
        settings: Values before the first change, and what a flag's default is.
        file: Where it is kept and shared.
        breakers: Those that can be forced, by replica.
        journal: Makes changes durable.
        instance_id: This server process.
        new_id: Makes a unique, time-ordered id.
        wall_clock_ns: Nanoseconds since the Unix epoch.
    """

    def __init__(
        self,
        settings: ControlSettings,
        file: ControlFile,
        breakers: Mapping[str, Breaker],
        journal: Journal,
        instance_id: str,
        new_id: Callable[[], str],
        wall_clock_ns: Callable[[], int],
    ) -> None:
        self.shadow = settings.shadow
        self.cached_score = settings.cached_score
        self.trading_state: admin_pb2.TradingState.ValueType = admin_pb2.TRADING_STATE_HALTED
        self._defaults = settings
        self._file = file
        self._breakers = breakers
        self._journal = journal
        self._instance_id = instance_id
        self._new_id = new_id
        self._wall_clock_ns = wall_clock_ns
        self._control = settings.control()
        self._unwritten: list[Callable[[Control], Control]] = []
        """Changes in force here that the file does not hold yet."""
        self._changes: set[asyncio.Task[None]] = set()
        self._writing = asyncio.Lock()
        self._written = True
        self.write_failures = 0
        """Times that the file could not be written since start."""
        self.reloads = 0
        """Changes taken over from other processes since start."""
        self._restore()

    @property
    def version(self) -> int:
        """Version of the state in force."""
        return self._control.version

    @property
    def flags_on(self) -> list[str]:
        """Names of the flags that are on."""
        return [name for name in FLAGS if getattr(self, name)]

    def flag(self, name: str) -> admin_pb2.Flag:
        """One flag.

        Raises:
            UnknownFlagError: There is no such flag.
        """
        if name not in FLAGS:
            raise UnknownFlagError(name)
        return admin_pb2.Flag(
            name=name,
            enabled=getattr(self, name),
            default_enabled=getattr(self._defaults, name),
            description=FLAGS[name],
        )

    async def set_flag(
        self, name: str, enabled: bool, author: str, reason: str, expected_version: int | None = None
    ) -> admin_pb2.Flag:
        """Sets a flag at once and returns it when the change is written and recorded.

        Raises:
            UnknownFlagError: There is no such flag.
            ControlChangedError: The state's version is not the expected one.
        """
        previous = self.flag(name).enabled

        def change(control: Control) -> Control:
            return control.model_copy(update={"flags": {**control.flags, name: enabled}})

        values = _on_off(previous), _on_off(enabled)
        await self._change(change, f"flag/{name}", values, author, reason, expected_version)
        return self.flag(name)

    async def set_trading_state(
        self,
        state: admin_pb2.TradingState.ValueType,
        author: str,
        reason: str,
        expected_version: int | None = None,
    ) -> admin_pb2.TradingState.ValueType:
        """Sets the trading state at once and returns the one before, when the change is written and recorded.

        Raises:
            ControlChangedError: The state's version is not the expected one.
        """
        previous, name = self.trading_state, trading_state_name(state)

        def change(control: Control) -> Control:
            return control.model_copy(update={"trading_state": name})

        values = trading_state_name(previous), name
        await self._change(change, "trading_state", values, author, reason, expected_version)
        return previous

    async def force_breaker(
        self,
        replica: str,
        mode: Mode,
        expires_in_seconds: float | None,
        author: str,
        reason: str,
        expected_version: int | None = None,
    ) -> None:
        """Sets who drives a replica's breaker at once, in every process; returns when it is written and recorded.

        Raises:
            KeyError: There is no such replica.
            ControlChangedError: The state's version is not the expected one.
        """
        previous = self._breakers[replica].mode
        forced = None
        if mode is not Mode.AUTOMATIC:
            expires_at = None if expires_in_seconds is None else self._wall_seconds() + expires_in_seconds
            forced = ForcedBreaker.model_validate(
                {"mode": mode.value, "seconds": expires_in_seconds, "expires_at": expires_at}
            )

        def change(control: Control) -> Control:
            others = {name: kept for name, kept in control.breakers.items() if name != replica}
            return control.model_copy(update={"breakers": others | ({replica: forced} if forced else {})})

        value = mode.value if expires_in_seconds is None else f"{mode.value} for {expires_in_seconds:g} s"
        await self._change(change, f"breaker/{replica}", (previous.value, value), author, reason, expected_version)

    async def watch(self) -> None:
        """Takes over what other processes change, and writes what could not be written, until cancelled."""
        loop = asyncio.get_running_loop()
        next_rewrite = 0.0
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            async with self._writing:
                try:
                    changed = await asyncio.to_thread(self._file.read_if_changed)
                except UnreadableControlError as error:
                    _log.error("control state unreadable, the last one stays in force", error=str(error))
                    continue
                if changed is not None:
                    self.reloads += 1
                    self._apply(self._with_unwritten(changed))
                    _log.info("control state taken over", version=self.version, **self._summary())
                if self._unwritten and loop.time() >= next_rewrite:
                    next_rewrite = loop.time() + _REWRITE_SECONDS
                    await self._write()

    async def _change(
        self,
        change: Callable[[Control], Control],
        subject: str,
        values: tuple[str, str],
        author: str,
        reason: str,
        expected_version: int | None,
    ) -> None:
        """Makes a change: in force, written, recorded.

        It is in force in this process before anything is written: with a disk that hangs or is full on-call must still
        be able to halt trading. Cancelling gives up the waiting, not the change.
        """
        if expected_version not in (None, self.version):
            raise ControlChangedError(f"the control state's version is {self.version}, not {expected_version}")
        if expected_version is None:
            self._put_in_force(change)
        record = packet_pb2.ControlChange(
            change_id=self._new_id(),
            subject=subject,
            previous=values[0],
            value=values[1],
            author=author,
            reason=reason,
            changed_at_ns=self._wall_clock_ns(),
            instance_id=self._instance_id,
        )
        task = asyncio.create_task(self._finish(change, record, expected_version))
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)

    async def _finish(
        self, change: Callable[[Control], Control], record: packet_pb2.ControlChange, expected_version: int | None
    ) -> None:
        """Writes and records a change; puts it in force first when that had to wait for the version in the file."""
        async with self._writing:
            if expected_version is not None:
                await self._expect(expected_version)
                self._put_in_force(change)
            await self._write()
        await self._record(record)

    async def _expect(self, version: int) -> None:
        """Raises `ControlChangedError` when another process has made a change that is not in force here yet."""
        try:
            changed = await asyncio.to_thread(self._file.read_if_changed)
        except UnreadableControlError:
            changed = None
        if changed is not None:
            self._apply(self._with_unwritten(changed))
        if self.version != version:
            raise ControlChangedError(f"the control state's version is {self.version}, not {version}")

    def _put_in_force(self, change: Callable[[Control], Control]) -> None:
        self._unwritten.append(change)
        self._apply(change(self._control))

    async def _write(self) -> None:
        """Writes the changes that are in force here and not in the file."""
        pending, known = list(self._unwritten), self._control
        if not pending:
            return  # somebody who had the lock before has written it

        def all_of_them(control: Control | None) -> Control:
            new = control or known
            for change in pending:
                new = change(new)
            return new.model_copy(update={"version": max(new.version, known.version) + 1})

        try:
            written = await asyncio.to_thread(self._file.change, all_of_them)
        except OSError as error:
            self.write_failures += 1
            if self._written:
                _log.error(
                    "control state not written: in force in this process only, tried again",
                    path=str(self._file.path),
                    error=str(error),
                )
            self._written = False
            return
        if not self._written:
            self._written = True
            _log.info("control state written again", version=written.version)
        del self._unwritten[: len(pending)]
        self._apply(self._with_unwritten(written))

    def _with_unwritten(self, control: Control) -> Control:
        for change in self._unwritten:
            control = change(control)
        return control

    def _restore(self) -> None:
        """Takes over what was in force before the restart; HALTED when that cannot be read."""
        try:
            kept = self._file.read()
        except UnreadableControlError as error:
            self._control = self._control.model_copy(update={"trading_state": "HALTED"})
            self._apply(self._control)
            _log.error("control state unreadable, trading halted", error=str(error))
            return
        self._apply(kept or self._control)
        if kept is not None:
            _log.info("control state restored", version=self.version, **self._summary())

    def _apply(self, control: Control) -> None:
        """Puts a state in force."""
        before, self._control = self._control, control
        self.trading_state = admin_pb2.TradingState.Value(f"TRADING_STATE_{control.trading_state}")
        for name in FLAGS:
            setattr(self, name, control.flags.get(name, getattr(self._defaults, name)))
        for name, breaker in self._breakers.items():
            forced = control.breakers.get(name)
            if control is before or forced != before.breakers.get(name):
                self._force(breaker, forced)

    def _force(self, breaker: Breaker, forced: ForcedBreaker | None) -> None:
        remaining = None if forced is None else forced.remaining_seconds(self._wall_seconds())
        if forced is None or (remaining is not None and remaining <= 0):
            breaker.force(Mode.AUTOMATIC)
        else:
            breaker.force(Mode(forced.mode), remaining)

    def _wall_seconds(self) -> float:
        return self._wall_clock_ns() / 1e9

    def _summary(self) -> dict[str, object]:
        return {
            "trading_state": self._control.trading_state,
            "flags_on": self.flags_on,
            "breakers": {name: forced.mode for name, forced in self._control.breakers.items()},
        }

    async def _record(self, change: packet_pb2.ControlChange) -> None:
        """Logs a change and makes it durable.

        A journal that cannot be written does not undo the change. The log line and an error beside it are then all
        there is.
        """
        _log.warning(
            "change",
            subject=change.subject,
            previous=change.previous,
            value=change.value,
            author=change.author,
            reason=change.reason,
        )
        try:
            entry = packet_pb2.JournalEntry(control_change=change).SerializeToString()
            await self._journal.append(entry, even_if_full=True)
        except JournalError as error:
            _log.error("change not recorded", change_id=change.change_id, subject=change.subject, error=str(error))


def halt_at_start(settings: ControlSettings, file: ControlFile) -> None:
    """Makes a server halted that is to start so; called once for all its processes, before the first.

    Raises:
        OSError: It cannot be written.
    """
    if not settings.halted:
        return

    def halted(control: Control | None) -> Control:
        control = control or settings.control()
        return control.model_copy(update={"trading_state": "HALTED", "version": control.version + 1})

    file.change(halted)


def trading_state_name(state: admin_pb2.TradingState.ValueType) -> TradingStateName:
    """`ACTIVE`, `REDUCING` or `HALTED`."""
    name = admin_pb2.TradingState.Name(state).removeprefix("TRADING_STATE_")
    assert name in ("ACTIVE", "REDUCING", "HALTED")
    return name  # type: ignore[return-value]  # asserted


def _on_off(enabled: bool) -> str:
    return "on" if enabled else "off"
