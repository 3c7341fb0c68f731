"""Where the control state is stored, and how a change reaches all servers.

::

    Redis (`shared`)   of all servers; a change is made here when Redis can be reached
    the file           of all processes of this server: what Redis last said, and the changes it does not hold yet
    this object        of this process: the same, and what could not be written to disk

A state that arrives from any of them is merged (see `model`) and applied at once. What another copy lacks is written to
it: states that a Redis lost, changes that a server made while it could not reach Redis, notes that a change is
recorded.

A change that cannot reach Redis stays *pending*: it applies on this server alone until Redis takes it. Two kinds of
changes are refused instead when Redis cannot be reached: those that lift a restriction which all servers have, and
those that depend on what all servers did. If such a write is not answered, it is repeated until an answer confirms it;
it has an id, so it is made once. If the time runs out first, its result is unknown.

Without a shared Redis the file is the only store.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import structlog

from server.control.file import ControlFile, UnreadableControlError
from server.control.model import TRADING_STATE, Change, Control, Kept
from server.control.shared import SharedControl, UnreachableError
from server.errors import ChangeInDoubtError, ChangeRefusedError, ControlChangedError

_log = structlog.get_logger(__name__)

_WATCH_SECONDS: Final = 0.05
"""Between two looks at the file: without Redis, what another process changed is in force here after this."""
_AGAIN_SECONDS: Final = 1.0
"""Between two attempts to write what could not be written."""
_FIND_OUT_SECONDS: Final = 2.0
"""How long it is tried to find out whether a change was made. Less than the `pretrade` command waits for its answer."""
_ASK_AGAIN_SECONDS: Final = 0.1
"""Between two attempts to find out."""

Describe = Callable[[Control, Control], str]
"""What the audit is to say of a change, as JSON, from the states before and after it. May be called in a thread."""


@dataclass(frozen=True, slots=True)
class Brought:
    """What became of a change."""

    record: str
    """What the audit is to say of it, as JSON."""
    local: bool
    """True when this server alone is known to have it."""
    unsaved: bool
    """True when this process alone is known to have it: neither Redis nor the disk took it."""


class ControlStore:
    """The control state as one process knows it. Used from one event loop.

    Args:
        file: Shared with the other processes of this server.
        shared: Where all servers share it; None: in the file alone.
        on_news: Called when what is in force may be another.
    """

    def __init__(self, file: ControlFile, shared: SharedControl | None, on_news: Callable[[], None]) -> None:
        self._file = file
        self.shared = shared
        self._on_news = on_news
        self.control = Control()
        """What all servers are known to have, and notes of what was recorded."""
        self._pending: tuple[Change, ...] = ()
        """Changes in force on this server that Redis, or the file where that is all, does not hold yet."""
        self._under_way: list[Change] = []
        """Changes of this process that are being written to Redis, and are in force here already."""
        self._unwritten = self._failing = False
        """Whether the file lacks something, and whether that is because it cannot be written."""
        self._next_attempt = -math.inf
        self._unreadable = False
        """True when there was a file at the start that could not be read."""
        self.is_new = False
        """True when there was no state anywhere: neither had this server ever known one, nor did all share one."""
        self.stale = shared is not None
        """True when other servers may have made changes that are not known here."""
        self.write_failures = 0
        """Times that the file could not be written since start."""
        self.reloads = 0
        """Times that changes were taken over from other processes and servers since start."""
        self.doubts = 0
        """Changes of which it was not found out in time whether they were made, since start."""

    @property
    def pending(self) -> int:
        """Changes in force on this server alone."""
        return len(self._pending) if self.shared is not None else 0

    def in_force(self) -> Control:
        """What this process applies: what all servers have, and what only this one has so far."""
        return self.control.with_changes((*self._pending, *self._under_way))

    def unrecorded(self) -> Mapping[str, str]:
        """Changes that no process is known to have recorded: what the audit is to say, by id of the change."""
        made = {one: change.record for one, change in self.control.changes.items()}
        made |= {change.id: change.record for change in self._pending}
        return {one: record for one, record in made.items() if record is not None}

    def restore(self) -> None:
        """Takes over what was in force before the restart. What cannot be read leaves trading halted."""
        try:
            kept = self._file.read()
        except UnreadableControlError as error:
            self._unreadable = True
            _log.error("control state unreadable, trading halted until it is known", error=str(error))
            return
        if kept is not None:
            self.control, self._pending = kept.control, kept.pending
            _log.info("control state restored", version=self.control.version, pending=len(self._pending))

    async def synchronise(self) -> None:
        """Takes over what all share and gives them what they do not know, if they can be reached at once."""
        try:
            if self.shared is not None:
                await self._meet(self.shared, await self.shared.read())
            else:
                self._hear(await asyncio.to_thread(self._file.read))
        except UnreachableError as error:
            _log.warning("control state not shared yet, going by the last one known", problem=str(error))
        except UnreadableControlError:
            return  # logged by `restore`

    async def refresh(self) -> None:
        """Looks at the file and at Redis; what cannot be read stays as it is known."""
        await self._read_file()
        if self.shared is not None:
            try:
                await self._meet(self.shared, await self.shared.read())
            except UnreachableError:
                return

    async def watch_file(self) -> None:
        """Takes over what other processes change, and writes what is not in the file yet, until cancelled."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            self.stale = self.shared is not None and self.shared.stale
            await self._read_file()
            if self._unwritten and asyncio.get_running_loop().time() >= self._next_attempt:
                await self._write()

    async def watch_shared(self, shared: SharedControl) -> None:
        """Takes over what other servers change, and gives them what they do not know, until cancelled."""
        while True:
            try:
                await self._meet(shared, await shared.wait())
            except UnreachableError:
                await asyncio.sleep(shared.settings.reconnect_seconds)

    def put_in_force(self, change: Change) -> None:
        """Applies a change in this process before it is written anywhere; `replicate` must follow."""
        self._under_way.append(change)
        self._on_news()

    async def replicate(
        self, change: Change, describe: Describe, expected_version: int | None = None, needs_all: bool = False
    ) -> Brought:
        """Writes a change to Redis and the file, as far as they can be reached.

        Args:
            change: The change to write.
            describe: Makes its description for the audit.
            expected_version: It is refused unless this is the version in force; None for any.
            needs_all: It is refused where it would hold on this server alone.

        Raises:
            ControlChangedError: Another version was expected; nothing changed.
            ChangeRefusedError: It must be written to Redis, and Redis cannot be reached; nothing changed.
            ChangeInDoubtError: It must be written to Redis, and it is not known whether it was.
        """
        said = ""

        def describe_once_more(before: Control, after: Control) -> str:
            nonlocal said
            said = describe(before, after)
            return said

        try:
            if expected_version is not None:
                await self.refresh()
            must_reach_all = needs_all or self.control.trading.relaxes(change)
            replicate = self._replicate_to_all if must_reach_all else self._replicate_or_keep
            await replicate(change, describe_once_more, expected_version)
        finally:
            if change in self._under_way:
                self._under_way.remove(change)
            self._on_news()
        made = self.control.changes.get(change.id)
        record = said if made is None or made.record is None else made.record
        return Brought(record, made is None and self.shared is not None, made is None and self._failing)

    async def make(self, change: Change, describe: Describe) -> None:
        """Makes a change that any process may make; nothing happens when another one has made it.

        Raises:
            UnreachableError: It is not known to be made.
        """
        self._take(Kept(control=await self._replace(self._made(change, describe, None))))
        await self._write()

    def note_recorded(self, change_id: str) -> None:
        """Remembers that a change is in the audit; the other processes and servers learn it in a moment."""
        self.control = self.control.with_record(change_id, None)
        self._pending = tuple(
            one.model_copy(update={"record": None}) if one.id == change_id else one for one in self._pending
        )
        self._unwritten = True

    async def _replicate_to_all(
        self, change: Change, describe: Describe, expected_version: int | None, in_doubt: bool = False
    ) -> None:
        """Brings a change that must be where all servers find it; `in_doubt` says that it may be there already."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + _FIND_OUT_SECONDS
        while True:
            try:
                await self._replicate(change, describe, expected_version)
                return
            except ControlChangedError as error:
                if not in_doubt:
                    raise
                why, give_up_at = str(error), -math.inf  # that version does not come again
            except UnreachableError as error:
                in_doubt = in_doubt or error.in_doubt
                if not in_doubt:
                    raise ChangeRefusedError(self._refusal(change, error)) from error
                why = str(error)
            if change.id in self.control.changes:
                return  # it was made, and was heard of in another way
            if loop.time() >= give_up_at:
                self.doubts += 1
                _log.error("not known whether a change was made", change_id=change.id, subject=change.subject, why=why)
                raise ChangeInDoubtError(change.id, why)
            await asyncio.sleep(_ASK_AGAIN_SECONDS)

    async def _replicate_or_keep(self, change: Change, describe: Describe, expected_version: int | None) -> None:
        """Writes a change to Redis, or holds it as pending until Redis can be reached."""
        try:
            await self._replicate(change, describe, expected_version)
            return
        except UnreachableError as error:
            before = self.control.with_changes(self._pending)
            if expected_version not in (None, before.version) and not error.in_doubt:  # else it may have been made
                raise ControlChangedError(before.version, expected_version or 0) from error
            record = describe(before, before.with_change(change))
            sequence = 1 + max((one.sequence for one in self._pending), default=0)
            kept = Kept(pending=(change.model_copy(update={"sequence": sequence, "record": record}),))
            if before.trading.relaxes(change) and not await self._write(kept):
                if error.in_doubt or self._file.unsynced:  # no caller may get the answer that trading stays restricted
                    await self._replicate_to_all(change, describe, expected_version, in_doubt=True)
                    return
                raise ChangeRefusedError(f"neither Redis ({error}) nor this server's disk takes it") from error
        self._take(kept)
        await self._write()

    async def _replicate(self, change: Change, describe: Describe, expected_version: int | None) -> None:
        """Makes a change where all share the state. Raises `ControlChangedError`, `UnreachableError`."""
        self._take(Kept(control=await self._replace(self._made(change, describe, expected_version))))
        await self._write()

    def _made(self, change: Change, describe: Describe, expected_version: int | None) -> Callable[[Control], Control]:
        """Makes a change of what is found, joined with what is known here."""

        def make(found: Control) -> Control:
            before = self._joined(found)
            if change.id in before.changes:
                return before
            if expected_version not in (None, before.version):
                raise ControlChangedError(before.version, expected_version or 0)
            after = before.with_change(change)
            return after if after is before else after.with_record(change.id, describe(before, after))

        return make

    def _joined(self, found: Control) -> Control:
        """What is found, with everything that is known here."""
        return _join(found, self._kept())

    def _refusal(self, change: Change, error: UnreachableError) -> str:
        where = f"Redis ({error})" if self.shared is not None else f"a disk that takes it ({error})"
        if change.subject != TRADING_STATE:
            return f"without {where} nobody knows what the other servers have made of {change.subject}"
        return f"without {where} a restriction that all servers have cannot be lifted"

    async def _replace(self, make: Callable[[Control], Control]) -> Control:
        """Puts what `make` makes of the state of all in its place: in Redis, or else in the file.

        Raises:
            UnreachableError: It could not be written, or it is not known whether it was.
        """
        if self.shared is not None:
            return await self.shared.replace(make)
        try:
            written = await self._change_file(lambda found: Kept(control=make(found.control)))
        except OSError as error:
            raise UnreachableError(str(error), in_doubt=self._file.unsynced) from error
        return written.control

    async def _meet(self, shared: SharedControl, found: Control | None) -> None:
        """Takes over what Redis holds, and gives it what it lacks. Raises `UnreachableError`."""
        self._hear(None if found is None else Kept(control=found))
        self.stale = shared.stale
        lacking = found or Control()
        joined = self._joined(lacking)
        if joined == lacking:
            return
        pending = len(self._pending)
        after = await shared.replace(self._joined)
        if pending:
            _log.info("pending changes of this server written to redis", changes=pending, version=after.version)
        elif (joined.trading, joined.settings) != (lacking.trading, lacking.settings):
            _log.warning("Redis had lost some of the control state and has it again", version=after.version)
        self._take(Kept(control=after))

    def _hear(self, kept: Kept | None) -> None:
        """Takes over what the place holds in which all share the state; None: it holds nothing."""
        is_empty = kept is None or kept.control == Control()
        if is_empty and self.control == Control() and not self._unreadable:
            self.is_new = True
        if kept is not None and self._take(kept):
            self.reloads += 1
            _log.info("control state taken over", version=self.control.version)

    async def _read_file(self) -> None:
        """Takes over what another process of this server wrote."""
        try:
            found = await asyncio.to_thread(self._file.read_if_changed)
        except UnreadableControlError as error:
            _log.error("control state unreadable, the last one stays in force", error=str(error))
            return
        if found is None:
            return
        if self._take(found):
            self.reloads += 1
            _log.info("control state taken over", version=self.in_force().version)
        self._unwritten = self._is_lacking_in(found)

    async def _write(self, more: Kept | None = None) -> bool:
        """Writes what is known here and not in the file, and something more; whether the disk took it."""
        known = self._kept() if more is None else self._kept().merged(more)

        def make(found: Kept) -> Kept:
            return found.merged(known) if self.shared is not None else Kept(control=_join(found.control, known))

        try:
            await self._change_file(make)
        except OSError:
            return False  # logged where it was noticed
        return True

    async def _change_file(self, make: Callable[[Kept], Kept]) -> Kept:
        """What the file then holds. What `make` raises is passed on. Raises `OSError`."""
        try:
            written = await asyncio.to_thread(self._file.change, lambda found: make(found or Kept()))
        except OSError as error:
            self.write_failures += 1
            if not self._failing:
                _log.error(
                    "control state not written to disk, tried again; a restart would forget it",
                    path=str(self._file.path),
                    error=str(error),
                )
            self._unwritten = self._failing = True
            self._next_attempt = asyncio.get_running_loop().time() + _AGAIN_SECONDS
            raise
        if self._failing:
            _log.info("control state written again", version=written.control.version)
        self._failing = False
        self._take(written)
        self._unwritten = self._is_lacking_in(written)
        return written

    def _is_lacking_in(self, found: Kept) -> bool:
        """Whether the file, which holds this, lacks something that is known here."""
        return found.merged(self._kept()) != found

    def _kept(self) -> Kept:
        return Kept(control=self.control, pending=self._pending)

    def _take(self, kept: Kept) -> bool:
        """Merges another copy into this one; returns whether that changes any value."""
        known = self._kept()
        merged = known.merged(kept)
        if merged == known:
            return False
        self.control, self._pending, self._unwritten = merged.control, merged.pending, True
        if _steering(merged) == _steering(known):
            return False  # a note of what was recorded
        self._on_news()
        return True


def _steering(kept: Kept) -> object:
    """What of it steers something."""
    return kept.control.trading, kept.control.settings, [change.id for change in kept.pending]


def _join(found: Control, known: Kept) -> Control:
    """What is found, with everything else that is known."""
    kept = known.merged(Kept(control=found))
    return kept.control.with_changes(kept.pending).following(found)
