"""Writes the tables of `sizing.md`, `figures.md` and `measurements.md` in `docs/` from the run that was saved last.

`python -m loadtest.benchmark.sizing` (`make sizing`) writes them into the pages, between their markers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, groupby, product
from operator import itemgetter
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
_DETAILS: Final = (
    "load",
    "server",
    "decisions/s",
    "p50 ms",
    "p99 ms",
    "without a decision",
    "CPU µs",
    "of the echo",
    "of TorchServe",
    "times FastAPI",
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


def details(run: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the tables of all loads on all servers, and of where the CPU of a decision goes."""
    yield f"| {' | '.join(_DETAILS)} |\n"
    yield f"|{'---|' * len(_DETAILS)}\n"
    for load, group in groupby(run["results"], key=itemgetter("load")):
        shown = load
        for one in group:
            share = one["errors"] / max(1, one["errors"] + one["decisions"])
            cells = [shown, one["server"], f"{one['decisions_per_second']:,.0f}"]
            cells += [_number(one[name], 1) for name in ("p50_ms", "p99_ms")]
            cells += [f"{share:.1%}" if share else "", _number(one["cpu_us"], 0)]
            cells += [_number(one[name], 2) for name in ("to_echo", "to_torchserve", "to_fastapi")]
            yield f"| {' | '.join(cells)} |\n"
            shown = ""
    servers = list(run["cpu"])
    yield f"\n| where the CPU of a decision goes, µs | {' | '.join(servers)} |\n|{'---|' * (len(servers) + 1)}\n"
    for part in dict.fromkeys(chain.from_iterable(run["cpu"].values())):
        yield f"| {part} | {' | '.join(_number(run['cpu'][server].get(part), 1) for server in servers)} |\n"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


PAGES: Final[Mapping[Path, Callable[[Mapping[str, Any]], Iterator[str]]]] = {
    _DOCS / "sizing.md": table,
    _DOCS / "figures.md": verdict_lines,
    _DOCS / "measurements.md": details,
}
"""Each page with what makes the lines of its tables."""


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
