"""Opens the control state and applies the settings, for the composition root."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import TYPE_CHECKING

import structlog

from server.control.file import ControlFile, control_path
from server.control.flags import provider_from
from server.control.shared import SharedControl
from server.control.start import halt_at_start
from server.control.state import ControlState
from server.control.subjects import Subject, breaker_subjects, chain_subjects, drain_subjects
from server.errors import JournalError
from server.settings import Settings

if TYPE_CHECKING:
    from fallback.chain import Chain, StageName
    from fallback.guards import Guards
    from fallback.rules import RulesBaseline
    from server.composition.process import Process
    from server.configuration import Configuration
    from server.decision.packets import PacketWriter
    from server.inference.pool import Role
    from server.inference.routed import Scores
    from server.journal.journal import Journal

_log = structlog.get_logger(__name__)

_RECORD_AGAIN_SECONDS = 1.0
"""Between two attempts to put the settings into the journal."""


def open_control(process: Process, journal: Journal) -> ControlState:
    """Opens the control state with its stored values. It does not steer any part of the server yet.

    Args:
        process: What it is built with.
        journal: Where changes are recorded.

    Raises:
        OSError: The server must start halted, and this cannot be written.
        FlagProviderError: There is no such provider of flags.
    """
    settings, stack, clock, new_id = process.shared, process.stack, process.clock, process.new_id
    file = ControlFile(control_path(settings.journal.path), process.machine)
    if process.slot is None:
        halt_at_start(settings.control, file, new_id, process.machine.wall_clock_ns)
    shared = provider = None
    if settings.control.store == "redis":
        shared = SharedControl(settings.redis_url.get_secret_value(), settings.control.shared, clock)
        stack.push_async_callback(shared.aclose)
    if settings.control.flag_provider is not None:
        provider = provider_from(
            settings.control.flag_provider, settings.control.flag_provider_options.get_secret_value()
        )
        stack.callback(provider.shutdown)
    return ControlState(
        settings.control,
        file,
        {},
        journal,
        process.instance_id,
        new_id,
        process.machine.wall_clock_ns,
        clock,
        shared,
        provider,
    )


def subjects_of(
    roles: Iterable[Role], chain: Chain, default_stages: tuple[StageName, ...], others: Mapping[str, Subject]
) -> dict[str, Subject]:
    """What the control state steers besides trading state and flags.

    Args:
        roles: Whose breakers and drains it steers.
        chain: Whose stages it steers.
        default_stages: The stages while no others are set.
        others: What else it steers.
    """
    roles = tuple(roles)
    return {
        **breaker_subjects(roles),
        **drain_subjects(roles),
        **chain_subjects(chain, default_stages),
        **others,
    }


def apply_configuration(
    configuration: Configuration[Settings],
    cached_scores: Scores,
    rules: RulesBaseline,
    guards: Guards,
    packets: PacketWriter,
    journal: Journal,
    stack: AsyncExitStack,
) -> None:
    """Records the settings in force, and puts those sections in force at a reload that need no restart."""

    def apply(settings: Settings) -> None:
        cached_scores.configure(settings.cached_score)
        rules.configure(settings.rules)
        guards.configure(settings.guards)
        packets.config_hash = settings.config_hash()
        _record_settings(settings, stack, packets, journal)

    _record_settings(configuration.settings, stack, packets, journal)
    configuration.on_reload(apply)


def _record_settings(settings: Settings, stack: AsyncExitStack, packets: PacketWriter, journal: Journal) -> None:
    """Puts the settings into the journal, which then holds what packets name; again and again where that fails."""
    entry = packets.settings(settings.model_dump_json(), version("pretrade"), journal.machine.wall_clock_ns())

    async def record() -> None:
        while True:
            try:
                await journal.append(entry, even_if_full=True)
            except JournalError as error:
                _log.warning("settings not in the audit yet", error=str(error))
                await asyncio.sleep(_RECORD_AGAIN_SECONDS)
            else:
                return

    recording = asyncio.create_task(record(), name="record-settings")
    stack.callback(recording.cancel)
