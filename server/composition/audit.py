"""Opens the audit service and what reads the journals, for the composition root."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from server.audit.reading.explaining import Explaining
from server.audit.reading.reading import Reading, ReadingProcess, Task
from server.audit.watch import AuditWatch
from server.drift.watch import DriftWatch
from server.journal.lock import FileLock
from server.rpc.audit import AuditServicer

if TYPE_CHECKING:
    from server.composition.models import Model
    from server.composition.process import Process
    from server.inference.model_map import ModelMap
    from server.journal.journal import Journal


@dataclass(frozen=True, slots=True)
class AuditParts:
    """What the rest of the server knows of it."""

    servicer: AuditServicer
    lookups: Reading
    """Who is asked what people ask."""
    bars: Reading
    """Who is asked for bars."""
    explaining: Explaining
    """Explanations beside replies."""
    reading: Sequence[ReadingProcess]
    """The processes that read all journals and the database."""
    questions: Sequence[Reading]
    """What they are asked, by kind."""
    drift: DriftWatch
    watch: AuditWatch


def _champions(models: Sequence[Model], model_map: ModelMap) -> tuple[str, ...]:
    """The versions that decide orders of today's map."""
    found = (one.champion_version() for one in models if one.name in model_map.reached)
    return tuple(dict.fromkeys(filter(None, found)))


async def open_audit(process: Process, journal: Journal, models: Sequence[Model], model_map: ModelMap) -> AuditParts:
    """The audit service, explanations beside replies, the processes that read all journals, and who watches them.

    Args:
        process: What they are built with.
        journal: Where outcomes and decisions are written.
        models: Whose champions are explained and compared, the default one first.
        model_map: Those that it gives orders to are ready to be explained.
    """
    settings, stack = process.shared, process.stack
    path = settings.journal.path.absolute()
    task = Task(
        journal=path,
        database_url=settings.database_url.get_secret_value(),
        model_store=settings.replay.model_store,
        models=len(models),
        bars_database_url=(settings.market.bars_database_url or settings.database_url).get_secret_value(),
    )

    def champions() -> dict[str, str]:
        return {one.name: one.champion_version() for one in models}

    # Those who read, and those who run models besides: a model that hangs holds up no look-up.
    reads = await stack.enter_async_context(ReadingProcess("reads", task))
    running = await stack.enter_async_context(ReadingProcess("models", task))
    lookups, watching, comparing, checking, bars = (
        Reading(name, reads) for name in ("lookups", "watching", "drift", "checks", "bars")
    )
    replays, explanations = (Reading(name, running) for name in ("replays", "explanations"))
    drift = DriftWatch(comparing, settings.drift, champions)
    await process.background(drift.run(), "drift")
    watch = AuditWatch(checking, settings.audit_watch, champions)
    await process.background(watch.run(), "audit watch")
    recording = FileLock(path.with_name(f"{path.name}.outcomes.lock"), process.machine)
    wall_clock_ns = process.machine.wall_clock_ns
    servicer = AuditServicer(lookups, watching, replays, explanations, journal, recording, wall_clock_ns)
    explaining = Explaining(
        explanations,
        settings.explain,
        process.metrics.explanations,
        process.clock,
        tuple if task.model_store is None else partial(_champions, models, model_map),
    )
    await process.background(explaining.keep_warm(), "explanations")
    questions = (lookups, watching, replays, explanations, comparing, checking, bars)
    return AuditParts(servicer, lookups, bars, explaining, (reads, running), questions, drift, watch)
