"""Writes the tables of `docs/sizing.md` and `docs/figures.md` from the run of the benchmark that was saved last.

`python -m loadtest.benchmark.sizing` (`make sizing`) writes them into the pages, between their markers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Final

from loadtest.benchmark.bench import RESULTS
from loadtest.benchmark.targets import verdict_lines
from loadtest.generators.load import METHODS, PRETRADE

_DOCS: Final = Path(__file__).parents[2] / "docs"
_BEGIN, _END = "<!-- begin: make sizing -->\n", "<!-- end: make sizing -->\n"
_HEADINGS: Final = (
    "edge",
    "calls",
    "most decisions/s",
    "every order answered at",
    "p50 ms",
    "p99 ms",
    "CPU of a decision, µs",
    "cores of the server",
    "its memory, MiB",
)


def last_kept(folder: Path = RESULTS) -> Path:
    """The run that was saved last."""
    return max(folder.glob("bench-*.json"), key=lambda path: str(json.loads(path.read_text())["finished_at"]))


def table(run: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the table: a row for each edge and kind of call, from loads in which every order got a decision."""
    yield f"| {' | '.join(_HEADINGS)} |\n"
    yield f"|{'---|' * len(_HEADINGS)}\n"
    sound = [one for one in run["results"] if one["kind"] == PRETRADE and not one["errors"]]
    for edge, method in product(dict.fromkeys(one["server"] for one in sound), METHODS):
        of_method = [one for one in sound if one["server"] == edge and one["load"].startswith(f"{method}, ")]
        closed = [one for one in of_method if one["offered_per_second"] is None]
        opened = [one for one in of_method if one["offered_per_second"] is not None]
        most = max((float(one["decisions_per_second"]) for one in closed), default=None)
        answered = max(opened, key=lambda one: float(one["offered_per_second"]), default=None)
        cells = [edge, f"`{METHODS[method]}`", "–" if most is None else f"{most:,.0f}"]
        if answered is None:
            cells += ["–"] * (len(_HEADINGS) - len(cells))
        else:
            rate, cpu_us = float(answered["offered_per_second"]), float(answered["cpu_us"])
            cells += [f"{rate:,.0f}/s", f"{answered['p50_ms']:.1f}", f"{answered['p99_ms']:.1f}"]
            cells += [f"{cpu_us:,.0f}", f"{rate * cpu_us / 1e6:.2f}", f"{answered['memory_mebibytes']:,.0f}"]
        yield f"| {' | '.join(cells)} |\n"


PAGES: Final[Mapping[Path, Callable[[Mapping[str, Any]], Iterator[str]]]] = {
    _DOCS / "sizing.md": table,
    _DOCS / "figures.md": verdict_lines,
}
"""Each page with what makes the lines of its table."""


def written(page: Path, path: Path) -> str:
    """A page with its table replaced by that of one saved run."""
    run = json.loads(path.read_text())
    before, _, rest = page.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    source = (
        f"Measured at {run['commit']} with {run['machine']['cores']} cores for everything, the load generator included"
        f"\n([{path.name}](../loadtest/results/{path.name})).\n"
    )
    return f"{before}{_BEGIN}{''.join(PAGES[page](run))}\n{source}{_END}{after}"


if __name__ == "__main__":
    for each in PAGES:
        each.write_text(written(each, last_kept()))
