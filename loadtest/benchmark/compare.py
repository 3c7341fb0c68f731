"""What changed between two runs of the benchmark.

On a machine that is busier today everything is slower, the bare echoes too. The table therefore shows two ratios for
each figure: its own, and that of the echo behind the same transport under the same load. The first divided by the
second is the change of the product itself.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loadtest.benchmark.bench import RESULTS, print_whole
from loadtest.generators.load import ECHO, PRETRADE


@dataclass(frozen=True, slots=True)
class Change:
    """One server under one load, then and now."""

    load: str
    server: str
    kind: str
    per_second: tuple[float, float]
    """Decisions a second, then and now; the same below."""
    p99_ms: tuple[float | None, float | None]
    cpu_us: tuple[float | None, float | None]
    errors: tuple[int, int]
    machine: float | None
    """What became of the echo's figure, now over then: by load and transport, else the median of the echoes."""

    @property
    def ratio(self) -> float:
        """Of decisions a second, now over then."""
        return self.per_second[1] / self.per_second[0]

    @property
    def adjusted(self) -> float | None:
        """The same over what became of the machine."""
        return self.ratio / self.machine if self.machine else None


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Every load and server that both runs have, in the order of the later one."""
    was = {(each["load"], each["server"]): each for each in then["results"]}
    pairs = [
        (was[each["load"], each["server"]], each)
        for each in now["results"]
        if was.get((each["load"], each["server"]), {}).get("decisions_per_second")
    ]
    echoes = {
        (each["load"], each["transport"]): each["decisions_per_second"] / old["decisions_per_second"]
        for old, each in pairs
        if each["kind"] == ECHO and each["offered_per_second"] is None
    }
    overall = statistics.median(echoes.values()) if echoes else None
    found = []
    for old, each in pairs:
        is_open = each["offered_per_second"] is not None  # there the rate is given, and says nothing of the machine
        machine = None if is_open or each["kind"] == ECHO else echoes.get((each["load"], each["transport"]), overall)
        found.append(
            Change(
                load=each["load"],
                server=each["server"],
                kind=each["kind"],
                per_second=(old["decisions_per_second"], each["decisions_per_second"]),
                p99_ms=(old["p99_ms"], each["p99_ms"]),
                cpu_us=(old["cpu_us"], each["cpu_us"]),
                errors=(old["errors"], each["errors"]),
                machine=machine,
            )
        )
    return found


def last_kept(before: Mapping[str, Any], folder: Path = RESULTS) -> Path | None:
    """The run that was saved last before another one ended; None if there is none."""
    kept = {path: json.loads(path.read_text())["finished_at"] for path in folder.glob("bench-*.json")}
    earlier = {path: at for path, at in kept.items() if at < before["finished_at"]}
    return max(earlier, key=earlier.__getitem__, default=None)


def run_compare(now_path: Path, then_path: Path | None, console: Console) -> int:
    """Prints the table and returns the exit code: 1 when there is nothing to compare."""
    try:
        now = json.loads(now_path.read_text())
        then_path = then_path or last_kept(now)
        if then_path is None:
            raise FileNotFoundError(2, f"no earlier run was saved in {RESULTS}: pretrade bench --keep", str(now_path))
        then = json.loads(then_path.read_text())
    except FileNotFoundError as error:
        console.print(f"{error.filename}: {error.strerror}; `pretrade bench` writes figures", highlight=False)
        return 1
    except (ValueError, KeyError) as error:
        console.print(f"not figures of `pretrade bench`: {escape(repr(error))}", highlight=False)
        return 1
    print_whole(console, table(changes(then, now), _title(then, now)))
    return 0


def table(found: Sequence[Change], title: str) -> Table:
    """For people."""
    shown = Table(
        title=title,
        caption="then, now, ratio; machine: the bare echo's ratio; net: what is left; ms; CPU in µs a decision",
        box=SIMPLE,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    for heading in ("", "dec./s", "now", "ratio", "machine", "net", "p99", "now", "CPU", "now", "errors", "now"):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for load, group in itertools.groupby(found, key=attrgetter("load")):
        shown.add_row(f"[bold]{load}")
        for each in group:
            shown.add_row(
                f"  {each.server}",
                *(f"{value:,.0f}" for value in each.per_second),
                f"{each.ratio:.2f}",
                *("" if value is None else f"{value:.2f}" for value in (each.machine, each.adjusted)),
                *("–" if value is None else f"{value:.1f}" for value in each.p99_ms),
                *("–" if value is None else f"{value:,.0f}" for value in each.cpu_us),
                *(f"{value:,}" if value else "0" for value in each.errors),
                style="bold" if each.kind == PRETRADE else None,
            )
        shown.add_section()
    return shown


def _title(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    one, other = (f"{run['commit']} ({run['finished_at'][:16].replace('T', ' ')} UTC)" for run in (then, now))
    return f"then {one}, now {other}"
