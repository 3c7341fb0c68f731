"""Rereads the configuration file while the server runs.

Some sections may change without a restart (`RELOADABLE`): those that decide what is answered and hold no resource. A
reload applies completely or not at all, from the next decision on. The process that receives the request checks the
file and then makes a change of the control state for this server alone. The other processes see that change and reread
the file as well.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

import structlog
from pydantic import ValidationError

from feature_cache.metrics import Counter
from pretrade.admin.v1 import admin_pb2
from server.control.state import ControlState, Wanted
from server.control.subjects import Subject
from server.errors import ChangeRefusedError, InvalidChangeError

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_log = structlog.get_logger(__name__)

CONFIG_RELOAD_FAILURES: Final = Counter(
    "pretrade_config_reload_failures", "Reloads of the configuration that were refused; the last one stays in force."
)
METRICS: Final = (CONFIG_RELOAD_FAILURES,)

RELOADABLE: Final = ("cached_score", "guards", "rules")
"""Sections that may change without a restart."""


class Reloadable(Protocol):
    """Settings as far as a reload goes: they have a hash, and can be compared."""

    def config_hash(self) -> str:
        """The hash by which packets name them."""
        ...

    def model_dump_json(self, *, exclude: set[str]) -> str:
        """All of them but some sections, secrets masked."""
        ...


SettingsT = TypeVar("SettingsT", bound=Reloadable)


class Configuration(Generic[SettingsT]):
    """The settings in force, and how they are reloaded.

    Args:
        settings: Of all processes of this server.
        load: Rereads them; raises as `server.settings.load`.
        journal_path: What tells servers of a machine apart.
    """

    def __init__(self, settings: SettingsT, load: Callable[[], SettingsT], journal_path: Path) -> None:
        self.settings = settings
        self._load = load
        digest = hashlib.sha256(str(journal_path.absolute()).encode()).hexdigest()[:8]
        self.subject: Final = f"configuration/{socket.gethostname()}-{digest}"
        """What a reload of this server is called."""
        self._apply: list[Callable[[SettingsT], None]] = []
        self._checked: SettingsT | None = None
        """What a reload of this process is about to put in force."""
        self._reading: set[asyncio.Task[None]] = set()
        self.failures = 0
        """Reloads that were refused or failed since start."""

    def on_reload(self, apply: Callable[[SettingsT], None]) -> None:
        """Registers a function that is called with new settings."""
        self._apply.append(apply)

    def subjects(self) -> dict[str, Subject]:
        """The subject of the control state. Its value is the hash of the settings to apply."""

        def check(value: str) -> str:
            return "" if len(value) <= 16 else "must be the hash of a configuration"

        return {self.subject: Subject(self.settings.config_hash(), check, lambda value, _seconds: self._ask_for(value))}

    async def reload(
        self, control: ControlState, request: admin_pb2.ReloadConfigurationRequest, author: str
    ) -> admin_pb2.ReloadConfigurationResponse:
        """Reads the file and puts it in force in all processes.

        Raises:
            ChangeRefusedError: The file cannot be read, is wrong, or asks for a restart; nothing changed.
            InvalidChangeError: Another configuration was expected.
        """
        before = self.settings
        if request.expected_config_hash not in ("", before.config_hash()):
            raise InvalidChangeError(
                f"expected_config_hash: in force is {before.config_hash()}, not {request.expected_config_hash}"
            )
        new = await self._read()
        detail = differences(before, new)
        wanted = Wanted(
            self.subject, new.config_hash(), author, request.reason, dry_run=request.dry_run, detail=tuple(detail)
        )
        self._checked = new
        try:
            change = await control.change(wanted)
        finally:
            self._checked = None
        return admin_pb2.ReloadConfigurationResponse(
            previous_config_hash=before.config_hash(), config_hash=new.config_hash(), change=change
        )

    def metrics(self) -> Iterator[Metric]:
        """One scrape."""
        yield CONFIG_RELOAD_FAILURES.family(self.failures)

    async def _read(self) -> SettingsT:
        try:
            new = await asyncio.to_thread(self._load)
            if fixed := sorted({line.partition(":")[0] for line in differences(self.settings, new, RELOADABLE)}):
                raise ChangeRefusedError(f"needs a restart: {', '.join(fixed)}")
        except (ValueError, ChangeRefusedError) as error:
            self.failures += 1
            reason = _line(error)
            _log.error("configuration not reloaded, the last one stays in force", problem=reason)
            raise ChangeRefusedError(reason) from None
        return new

    def _ask_for(self, config_hash: str) -> None:
        """Somebody wants the configuration of this hash in force here."""
        if config_hash == self.settings.config_hash() or not self._apply:
            return  # as it is, or what was asked for before the start: what was read then is newer
        if self._checked is not None and self._checked.config_hash() == config_hash:
            self._put_in_force(self._checked)
            return
        task = asyncio.create_task(self._follow(config_hash))
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)

    async def _follow(self, config_hash: str) -> None:
        try:
            new = await self._read()
        except ChangeRefusedError:
            return
        if new.config_hash() != config_hash:
            self.failures += 1
            _log.error("the configuration file is no longer the one to apply", wanted=config_hash)
            return
        self._put_in_force(new)

    def _put_in_force(self, settings: SettingsT) -> None:
        for line in differences(self.settings, settings):
            _log.warning("configuration", change=line)
        self.settings = settings
        for apply in self._apply:
            apply(settings)


def differences(before: Reloadable, after: Reloadable, without: tuple[str, ...] = ()) -> list[str]:
    """What differs, a line each, secrets masked."""
    old, new = (json.loads(settings.model_dump_json(exclude=set(without))) for settings in (before, after))
    return list(_differences("", old, new))


def _differences(path: str, old: Any, new: Any) -> list[str]:
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted({*old, *new}):
            lines += _differences(f"{path}.{name}".lstrip("."), old.get(name), new.get(name))
        return lines
    return [f"{path}: {json.dumps(old)} → {json.dumps(new)}"]


def _line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
    return " ".join(str(error).split())
