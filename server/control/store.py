"""Where the control state is kept, and how a change gets everywhere.

::

    Redis (`shared`)   of all servers; a change is made there when it can be reached
    the file           of all processes of this server: what Redis last said, and the changes it does not hold yet
    this object        of this process: the same, and what the disk could not take

Without Redis a change stays *pending*, in force on this server alone, until it can be brought there. Without a Redis to
share with, the file has the last word.

A server that has a Redis to share with, and at its start neither that nor a file, does not know whether trading was
halted: it is halted until it hears.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final

import structlog

from server.control.errors import ChangeRefusedError, ControlChangedError
from server.control.file import ControlFile, UnreadableControlError
from server.control.model import TRADING_STATE, Change, Control, IsOver, Kept, Setting, is_stricter
from server.control.shared import SharedControl, UnreachableError

_log = structlog.get_logger(__name__)

_WATCH_SECONDS: Final = 0.05
"""Between two looks at the file: without Redis, what another process changed is in force here after this."""
_AGAIN_SECONDS: Final = 1.0
"""Between two attempts to write what could not be written."""
_UNKNOWN: Final = Control(
    settings={
        TRADING_STATE: Setting(permanent="HALTED", author="server", reason="what all servers were told is not known")
    }
)
"""What a server obeys that has heard nothing yet."""


class ControlStore:
    """The control state as one process knows it.

    Args:
        file: Shared with the other processes of this server.
        shared: Where all servers share it; None: in the file alone.
        usual_trading_state: While nobody set another.
        is_over: Whether a temporary value is over.
        on_news: Called when what is in force may be another.
    """

    def __init__(
        self,
        file: ControlFile,
        shared: SharedControl | None,
        usual_trading_state: str,
        is_over: IsOver,
        on_news: Callable[[], None],
    ) -> None:
        self._file = file
        self.shared = shared
        self._usual_trading_state = usual_trading_state
        self._is_over = is_over
        self._on_news = on_news
        self.control = Control()
        """The last state that is known to be everybody's."""
        self._pending: list[Change] = []
        """Changes in force on this server that Redis, or the file where that is all, does not hold yet."""
        self._under_way: list[Change] = []
        """Changes of this process that are being brought there."""
        self._unknown = False
        """True until it is known what all servers were told."""
        self._writing = asyncio.Lock()
        self._unwritten = self._failing = False
        """Whether the file does not hold what is in force, and whether that is because it cannot be written."""
        self._next_attempt = -math.inf
        self.stale = shared is not None
        """True when other servers may have made changes that are not known here."""
        self.write_failures = 0
        """Times that the file could not be written since start."""
        self.reloads = 0
        """Times that changes were taken over from other processes and servers since start."""

    @property
    def pending(self) -> int:
        """Changes in force on this server alone."""
        return len(self._pending) if self.shared is not None else 0

    def in_force(self) -> Control:
        """What this process obeys.

        Changes that not all servers know count, except for a trading state less strict than theirs.
        """
        changes = (*self._pending, *self._under_way)
        return self._with_pending(self._of_all, changes) if self.shared is not None else _after(self.control, changes)

    def restore(self) -> None:
        """Takes over what was in force before the restart; HALTED when that cannot be read, or is still to be heard."""
        try:
            kept = self._file.read()
        except UnreadableControlError as error:
            halted = Setting(permanent="HALTED", author="server", reason="the control state could not be read at start")
            self.control = Control(settings={TRADING_STATE: halted})
            _log.error("control state unreadable, trading halted", error=str(error))
            return
        self._unknown = self.shared is not None and (kept is None or not kept.says_what_all_know)
        if kept is not None:
            self.control, self._pending = kept.control, list(kept.pending)
            _log.info("control state restored", version=self.control.version, pending=len(self._pending))

    async def synchronise(self) -> None:
        """Takes over what all servers share, if that can be reached at once."""
        if self.shared is None:
            return
        try:
            found = await self.shared.read()
            async with self._writing:
                await self._meet(self.shared, found)
        except UnreachableError as error:
            known = "trading halted until it is known" if self._unknown else "going by the last one known"
            _log.warning(f"control state not shared yet, {known}", problem=str(error))

    async def watch_file(self) -> None:
        """Takes over what other processes change, and writes what could not be written, until cancelled."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            self.stale = self.shared is not None and self.shared.stale
            async with self._writing:
                await self._read_file()
                if self._unwritten and asyncio.get_running_loop().time() >= self._next_attempt:
                    await self._write()

    async def watch_shared(self, shared: SharedControl) -> None:
        """Takes over what other servers change, and gives them what they do not know, until cancelled."""
        while True:
            try:
                found = await shared.wait()
                async with self._writing:
                    await self._meet(shared, found)
            except UnreachableError:
                await asyncio.sleep(shared.settings.reconnect_seconds)

    def put_in_force(self, change: Change) -> None:
        """Has this process obey a change before it is anywhere else; `bring` must follow."""
        self._under_way.append(change)
        self._on_news()

    async def bring(
        self, change: Change, expected_version: int | None, needs_all: bool = False
    ) -> tuple[Control, Control, bool]:
        """Brings a change as far as it gets: the states before and after, and whether it holds on this server alone.

        Args:
            change: What to bring.
            expected_version: It is refused unless this is the version in force; None for any.
            needs_all: It is refused where it would hold on this server alone.

        Raises:
            ControlChangedError: Another version was expected; nothing changed.
            ChangeRefusedError: It needs Redis, which cannot be reached; nothing changed.
        """
        try:
            async with self._writing:
                if expected_version is not None:
                    await self._refresh()
                    if self.in_force().version != expected_version:
                        raise ControlChangedError(self.in_force().version, expected_version)
                if self.shared is not None:
                    made = await self._bring_to_all(self.shared, change, expected_version, needs_all)
                else:
                    made = await self._bring_to_file(change, expected_version)
        finally:
            if change in self._under_way:
                self._under_way.remove(change)
            self._on_news()
        return made

    async def end(self, change: Change) -> tuple[Control, Control] | None:
        """Removes a temporary value that is over; the states before and after, if nobody else has removed it.

        Raises:
            UnreachableError, OSError: It could not be removed; it is over all the same.
        """
        made: tuple[Control, Control] | None = None

        def make(base: Control) -> Control:
            nonlocal made
            after = base.with_change(change)
            made = None if after is base else (base, after)
            return after

        async with self._writing:
            if self.shared is not None:
                self._take(Kept(control=await self.shared.replace(self.control, make)))
                await self._write()
            else:
                known = self.control
                self._take(
                    await asyncio.to_thread(self._file.change, lambda found: Kept(control=make(_newest(found, known))))
                )
        return made

    async def _bring_to_all(
        self, shared: SharedControl, change: Change, expected_version: int | None, needs_all: bool
    ) -> tuple[Control, Control, bool]:
        pending, before = tuple(self._pending), self.control

        def make(base: Control) -> Control:
            nonlocal before
            before = self._with_pending(base, pending)
            if expected_version not in (None, before.version):
                raise ControlChangedError(before.version, expected_version or 0)
            return before.with_change(change)

        try:
            after = await shared.replace(self.control, make)
        except UnreachableError as error:
            if needs_all:
                raise ChangeRefusedError(
                    f"without Redis ({error}) nobody knows what the other servers have made of {change.subject}"
                ) from error
            if change.subject == TRADING_STATE and is_stricter(
                self._trading_state_of_all(), change.value or self._usual_trading_state
            ):
                raise ChangeRefusedError(
                    f"without Redis ({error}) the trading state can only be made stricter than "
                    f"{self._trading_state_of_all()}, which all servers were last told"
                ) from error
            before, after = (
                self._with_pending(self._of_all, pending),
                self._with_pending(self._of_all, (*pending, change)),
            )
            self._take(Kept(pending=(change,)))
            local = True
        else:
            self._unknown = False
            self._take(Kept(control=after))
            local = False
        await self._write()
        return before, after, local

    async def _bring_to_file(self, change: Change, expected_version: int | None) -> tuple[Control, Control, bool]:
        known, pending, before = self.control, tuple(self._pending), self.control

        def make(found: Kept | None) -> Kept:
            nonlocal before
            before = _after(_newest(found, known), pending)
            if expected_version not in (None, before.version):
                raise ControlChangedError(before.version, expected_version or 0)
            return Kept(control=before.with_change(change))

        if await self._change_file(make):
            return before, self.control, False
        self._pending.append(change)
        before = _after(known, pending)
        return before, before.with_change(change), False

    async def _refresh(self) -> None:
        """Looks at file and Redis."""
        await self._read_file()
        if self.shared is not None:
            try:
                await self._meet(self.shared, await self.shared.read())
            except UnreachableError:
                return

    async def _meet(self, shared: SharedControl, found: Control | None) -> None:
        """Takes over what Redis holds, or gives it what it does not. Raises `UnreachableError`."""
        before, was_unknown = self.control, self._unknown
        self._unknown = False
        if found is not None and found.is_newer_than(self.control):
            self.reloads += 1
            self._take(Kept(control=found))
            _log.info("control state taken over", version=found.version)
        pending = tuple(self._pending)
        lost = self.control.version > 0 and (found is None or self.control.is_newer_than(found))
        if pending or lost:
            after = await shared.replace(self.control, lambda base: self._with_pending(base, pending))
            if pending:
                _log.info("changes of this server brought to all", changes=len(pending), version=after.version)
            else:
                _log.warning("Redis had lost the control state and has it again", version=after.version)
            self._take(Kept(control=after))
        self.stale = shared.stale
        if was_unknown:
            self._on_news()
        if was_unknown or self.control is not before:
            await self._write()

    async def _read_file(self) -> None:
        """Takes over what another process of this server wrote."""
        try:
            found = await asyncio.to_thread(self._file.read_if_changed)
        except UnreadableControlError as error:
            _log.error("control state unreadable, the last one stays in force", error=str(error))
            return
        if found is None:
            return
        before = self.control, len(self._pending)
        self._unknown = self._unknown and not found.says_what_all_know
        self._take(found)
        if before != (self.control, len(self._pending)):
            self.reloads += 1
            _log.info("control state taken over", version=self.in_force().version)

    async def _write(self) -> None:
        """Writes what is in force here and not in the file."""
        known, pending = self.control, tuple(self._pending)

        def merge(found: Kept | None) -> Kept:
            ours = Kept(control=known, pending=pending)
            return ours if found is None else found.merged(ours)

        def make(found: Kept | None) -> Kept:
            return Kept(control=_after(_newest(found, known), pending))

        await self._change_file(make if self.shared is None else merge)

    async def _change_file(self, make: Callable[[Kept | None], Kept]) -> bool:
        """Whether it could be written. What `make` raises is passed on."""
        try:
            written = await asyncio.to_thread(self._file.change, make)
        except OSError as error:
            self.write_failures += 1
            if not self._failing:
                _log.error(
                    "control state not written: in force, but not on disk; tried again",
                    path=str(self._file.path),
                    error=str(error),
                )
            self._unwritten = self._failing = True
            self._next_attempt = asyncio.get_running_loop().time() + _AGAIN_SECONDS
            return False
        if self._failing:
            _log.info("control state written again", version=written.control.version)
        self._unwritten = self._failing = False
        self._take(written)
        return True

    def _take(self, kept: Kept) -> None:
        """Adds what somebody else knows to what is known here."""
        merged = Kept(control=self.control, pending=tuple(self._pending)).merged(kept)
        self.control, self._pending = merged.control, list(merged.pending)
        self._on_news()

    def _with_pending(self, control: Control, changes: tuple[Change, ...]) -> Control:
        return control.with_pending(changes, self._is_over, self._usual_trading_state)

    @property
    def _of_all(self) -> Control:
        """What all servers were told, as far as it is known here."""
        return _UNKNOWN if self._unknown else self.control

    def _trading_state_of_all(self) -> str:
        return self._of_all.value(TRADING_STATE, self._is_over) or self._usual_trading_state


def _after(control: Control, changes: tuple[Change, ...]) -> Control:
    for change in changes:
        control = control.with_change(change)
    return control


def _newest(found: Kept | None, known: Control) -> Control:
    return found.control if found is not None and found.control.is_newer_than(known) else known
