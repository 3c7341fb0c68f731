"""What on-call can switch: flags and the trading state of this server.

Read on the decision path as plain attributes. Every change has an author and a reason, is logged, and goes into the
audit journal. Flags and trading state survive a restart: a server that was halted comes back halted. Forced breakers do
not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from pydantic import BaseModel, ConfigDict, Field

from server.audit.errors import JournalError

if TYPE_CHECKING:
    from server.audit.journal import Journal

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2

_log = structlog.get_logger(__name__)

FLAGS = {
    "shadow": "Mirror decided rows to the challenger.",
    "cached_score": "Let the last good score answer when no replica can.",
}
"""Every flag and what it does."""


class ControlSettings(BaseModel):
    """Control state at start."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    shadow: bool = Field(default=True)
    """Mirror decided rows to the challenger."""
    cached_score: bool = Field(default=True)
    """Let the last good score answer when no replica can."""
    halted: bool = Field(default=False)
    """Start with trading state HALTED instead of ACTIVE."""


class UnknownFlagError(KeyError):
    """There is no flag of this name."""


class ControlState:
    """Flags and trading state of one server process.

    Args:
        settings: Values at the very first start, and what a flag's default is.
        path: File that keeps the values over a restart; written whole with every change.
        journal: Makes changes durable.
        instance_id: This server process.
        new_id: Makes a unique, time-ordered id.
        wall_clock_ns: Nanoseconds since the Unix epoch.
    """

    def __init__(
        self,
        settings: ControlSettings,
        path: Path,
        journal: Journal,
        instance_id: str,
        new_id: Callable[[], str],
        wall_clock_ns: Callable[[], int],
    ) -> None:
        self.shadow = settings.shadow
        self.cached_score = settings.cached_score
        self.trading_state: admin_pb2.TradingState.ValueType = (
            admin_pb2.TRADING_STATE_HALTED if settings.halted else admin_pb2.TRADING_STATE_ACTIVE
        )
        self._defaults = settings
        self._path = path
        self._journal = journal
        self._instance_id = instance_id
        self._new_id = new_id
        self._wall_clock_ns = wall_clock_ns
        self._restore()

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

    async def set_flag(self, name: str, enabled: bool, author: str, reason: str) -> admin_pb2.Flag:
        """Sets a flag at once and returns it when the change is recorded.

        Raises:
            UnknownFlagError: There is no such flag.
        """
        previous = self.flag(name).enabled
        setattr(self, name, enabled)
        self._save()
        await self.record(f"flag/{name}", _on_off(previous), _on_off(enabled), author, reason)
        return self.flag(name)

    async def set_trading_state(
        self, state: admin_pb2.TradingState.ValueType, author: str, reason: str
    ) -> admin_pb2.TradingState.ValueType:
        """Sets the trading state at once and returns the one before, when the change is recorded."""
        previous, self.trading_state = self.trading_state, state
        self._save()
        await self.record("trading_state", trading_state_name(previous), trading_state_name(state), author, reason)
        return previous

    def _restore(self) -> None:
        """Takes over what was in force before the restart; HALTED when that cannot be read."""
        try:
            kept = json.loads(self._path.read_text())
            state = admin_pb2.TradingState.Value(f"TRADING_STATE_{kept['trading_state']}")
            flags = {name: kept["flags"][name] is True for name in FLAGS}
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.trading_state = admin_pb2.TRADING_STATE_HALTED
            _log.error("control state unreadable, trading halted", path=str(self._path), error=repr(error))
            return
        self.trading_state = admin_pb2.TRADING_STATE_HALTED if self._defaults.halted else state
        for name, enabled in flags.items():
            setattr(self, name, enabled)
        _log.info(
            "control state restored", trading_state=trading_state_name(self.trading_state), flags_on=self.flags_on
        )

    def _save(self) -> None:
        """Writes the values in force. A disk that refuses does not undo the change, it only makes it forgetful."""
        kept = {"trading_state": trading_state_name(self.trading_state), "flags": {n: getattr(self, n) for n in FLAGS}}
        unfinished = self._path.with_name(f"{self._path.name}.new")
        try:
            with unfinished.open("w") as file:
                json.dump(kept, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._path)
        except OSError as error:
            _log.error("control state not kept over a restart", path=str(self._path), error=str(error))

    async def record(self, subject: str, previous: str, value: str, author: str, reason: str) -> None:
        """Logs a change and makes it durable.

        A journal that cannot be written does not undo the change: with a full disk on-call must still be able to halt
        trading. The log line and an error beside it are then all there is.
        """
        _log.warning("change", subject=subject, previous=previous, value=value, author=author, reason=reason)
        change = packet_pb2.ControlChange(
            change_id=self._new_id(),
            subject=subject,
            previous=previous,
            value=value,
            author=author,
            reason=reason,
            changed_at_ns=self._wall_clock_ns(),
            instance_id=self._instance_id,
        )
        try:
            entry = packet_pb2.JournalEntry(control_change=change).SerializeToString()
            await self._journal.append(entry, even_if_full=True)
        except JournalError as error:
            _log.error("change not recorded", change_id=change.change_id, subject=subject, error=str(error))


def trading_state_name(state: admin_pb2.TradingState.ValueType) -> str:
    """`ACTIVE`, `REDUCING` or `HALTED`."""
    return admin_pb2.TradingState.Name(state).removeprefix("TRADING_STATE_")


def _on_off(enabled: bool) -> str:
    return "on" if enabled else "off"
