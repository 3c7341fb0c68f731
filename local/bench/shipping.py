"""What shipping costs: CPU of the shipping process, and of PostgreSQL for it. `python -m local.bench.shipping`.

The shipping process is the server's own, with a journal that this program writes. In a *backlog* the journal was full
before; at a rate entries arrive one by one, as from a server. `PRETRADE_COMPILED=0` measures the pure twin.
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import psutil
import typer
from rich.console import Console

from feature_cache.compiled import in_use
from local.bench.journal_entries import entry_of_rows, of_time
from local.bench.lookups import database
from local.stack.command import OK, run_with_stack
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from server.audit.shipping.shipping import Progress, ShippingSettings, Task
from server.journal.journal_file import JournalFile

_INSTRUMENTS: Final = 20
_APPENDED: Final = 500
"""Entries that are written to a journal at once."""
_WARM_SHARE: Final = 0.2
"""Of what is shipped: before it is through, nothing is measured."""
_LAST_ENTRY_ROWS: Final = 8
"""Decisions of an entry at a rate: those of a commit of some ms."""


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU of a decision, in microseconds."""

    how: str
    decisions: int
    per_second: float
    shipper: float
    postgres: float


class _Shipper:
    """The shipping process of a journal."""

    def __init__(self, journal: Path, url: str) -> None:
        task = Task(journal=journal, slot=f"bench:{journal.name}", database_url=url, settings=ShippingSettings())
        self._child = subprocess.Popen(
            [sys.executable, "-m", "server.audit"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._child.stdin is not None
        self._child.stdin.write(task.model_dump_json().encode() + b"\n")
        self._child.stdin.flush()
        self.process = psutil.Process(self._child.pid)

    def wait(self, position: int) -> None:
        """Waits until the journal is shipped through a position."""
        assert self._child.stdout is not None
        for line in self._child.stdout:
            progress = Progress.model_validate_json(line)
            if progress.error:
                raise RuntimeError(progress.error)
            if progress.position >= position:
                return
        raise RuntimeError("the shipping process has ended")

    def close(self) -> None:
        """Ends it."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


@contextmanager
def _shipper(journal: Path, url: str) -> Iterator[_Shipper]:
    with closing(_Shipper(journal, url)) as shipper:
        yield shipper


def _cpu_seconds(*trees: list[psutil.Process]) -> list[float]:
    found = []
    for tree in trees:
        times = [one.cpu_times() for one in tree if one.is_running()]
        found.append(sum(one.user + one.system for one in times))
    return found


def _cost(how: str, decisions: int, began: float, before: list[float], after: list[float]) -> Cost:
    shipper, postgres = (1e6 * (late - early) / decisions for late, early in zip(after, before, strict=True))
    return Cost(how, decisions, decisions / (time.monotonic() - began), shipper, postgres)


def backlog(journal: Path, url: str, stack: Stack, decisions: int, rows: int) -> Cost:
    """Ships a journal that holds so many decisions, in entries of so many rows."""
    day = dt.datetime.now(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    entry, entries = entry_of_rows(rows, _INSTRUMENTS), decisions // rows
    with closing(JournalFile(journal, sync_commits=False)) as file:
        for first in range(0, entries, _APPENDED):
            numbers = range(first, min(first + _APPENDED, entries))
            file.append([of_time(entry, one, decisions, day) for one in numbers])
            file.checkpoint()
    warm = round(_WARM_SHARE * entries)
    with _shipper(journal, url) as shipper:
        shipper.wait(warm)
        began, before = time.monotonic(), _cpu_seconds([shipper.process], stack["postgres"].tree())
        shipper.wait(entries)
        after = _cpu_seconds([shipper.process], stack["postgres"].tree())
    return _cost(f"backlog, entries of {rows}", (entries - warm) * rows, began, before, after)


def at_rate(journal: Path, url: str, stack: Stack, rate: int, rows: int, seconds: float) -> Cost:
    """Ships entries of so many rows as they come, so many decisions a second."""
    day = dt.datetime.now(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    entry, entries = entry_of_rows(rows, _INSTRUMENTS), round(seconds * rate / rows)
    with closing(JournalFile(journal, sync_commits=False)) as file:
        file.append([of_time(entry, 0, entries * rows, day)])
        with _shipper(journal, url) as shipper:
            shipper.wait(1)
            began, before = time.monotonic(), _cpu_seconds([shipper.process], stack["postgres"].tree())
            for number in range(1, entries):
                file.append([of_time(entry, number, entries * rows, day)])
                time.sleep(max(0.0, began + number * rows / rate - time.monotonic()))
            shipper.wait(entries)
            after = _cpu_seconds([shipper.process], stack["postgres"].tree())
    return _cost(f"{rate:,}/s, entries of {rows}", (entries - 1) * rows, began, before, after)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are shown.")] = 3,
    decisions: Annotated[int, typer.Option(min=1_000, help="In a backlog.")] = 100_000,
    rate: Annotated[int, typer.Option(min=100, help="Decisions a second.")] = 2_500,
    seconds: Annotated[float, typer.Option(min=1, help="At the rate.")] = 4.0,
    folder: Annotated[Path, typer.Option(help="Of the stack.")] = Path(".pretrade/shipping"),
) -> None:
    """Measure the CPU of shipping a decision, in microseconds."""

    def use(stack: Stack, settings: LocalSettings, console: Console) -> int:
        del console
        admin, journal = stack.endpoints.database_url, settings.dir / "shipping.sqlite"
        assert admin is not None

        def measured(measure: Any, *given: Any) -> Cost:
            with database(admin) as url:
                try:
                    cost: Cost = measure(journal, url, stack, *given)
                finally:
                    for left in settings.dir.glob(f"{journal.name}*"):
                        left.unlink()
            return cost

        each = (
            (backlog, decisions, 32),
            (backlog, decisions, 8),
            (at_rate, rate, 32, seconds),
            (at_rate, rate, _LAST_ENTRY_ROWS, seconds),
        )
        for measure, *given in each:
            found = [asdict(measured(measure, *given)) for _ in range(rounds)]
            medians = {name: found[0][name] for name in ("how", "decisions")}
            for name in ("per_second", "shipper", "postgres"):
                medians[name] = round(statistics.median(one[name] for one in found), 1)
            print(json.dumps(medians | {"compiled": "server.audit.store.decision_rows_c" in in_use()}), flush=True)
        return OK

    code = run_with_stack({"dir": folder}, use, parts={"postgres"})
    shutil.rmtree(folder, ignore_errors=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
