"""The results of the benchmark: one round, the figures of a server under a load, and the table of them."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.table import Table

from loadtest.generators.load import ALTERNATIVE, ECHO, PRETRADE, Load, Server

_PERCENTILES: Final = {"p50": (50, 1), "p99": (99, 100), "p999": (99.9, 1_000)}
"""Each with the fewest calls that can tell it."""
_FEW: Final = 0.01
"""Share of errors from which latencies that h2load saw say little: refusals are among them, and fast."""


@dataclass(frozen=True, slots=True)
class Round:
    """One load on one server, once."""

    seconds: float
    decisions: int
    """Orders that got one; from a bare echo or a model server, its answers."""
    errors: int
    """Orders that got none."""
    latencies_ms: Mapping[str, float]
    """`p50`, `p99`, `p999` of the calls, in an open loop from when they were due; those that so few can tell."""
    cpu_us: float | None = None
    """CPU of the server and all its processes per decision, in microseconds."""
    scored: float | None = None
    """Share of decisions whose source is a replica."""
    generator_cpu_us: float | None = None
    """CPU that the generator took for a decision from the same cores."""
    statuses: Mapping[str, int] = field(default_factory=dict)
    """The errors by what callers heard, where they did."""


def percentiles_ms(latencies: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """`p50`, `p99` and `p999` in milliseconds of latencies in seconds, those that so many calls can tell."""
    return {
        name: 1e3 * float(np.percentile(latencies, percent, method="inverted_cdf"))
        for name, (percent, fewest) in _PERCENTILES.items()
        if len(latencies) >= fewest
    }


@dataclass(frozen=True, slots=True)
class Figures:
    """A server under a load: medians over the rounds. None where it could not be seen."""

    load: str
    server: str
    kind: str
    transport: str
    decisions_per_second: float
    rates: Sequence[float]
    """The same of each round."""
    p50_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    decisions: int
    """In all rounds, as the next."""
    errors: int
    scored: float | None
    cpu_us: float | None
    memory_mebibytes: float | None
    generator_cpu_us: float | None
    statuses: Mapping[str, int]
    offered_per_second: float | None = None
    """In an open loop."""
    to_echo: float | None = None
    """Decisions a second over those of the bare echo behind the same transport."""
    to_torchserve: float | None = None
    """The same over TorchServe's own answers to callers that call it directly."""
    to_fastapi: float | None = None
    """The same over those of FastAPI with the model in its process."""
    to_before: float | None = None
    """The same over those of an older commit, which was called in turn."""
    to_kept: float | None = None
    """The same over those of the run that was kept last, divided by what became of the echo meanwhile."""

    @property
    def error_share(self) -> float:
        """Of all orders."""
        return self.errors / max(1, self.errors + self.decisions)


def figures(load: Load, server: Server, rounds: Sequence[Round], offered: float | None = None) -> Figures:
    """The medians of some rounds."""
    usage = server.usage() if server.usage is not None else None
    rates = [each.decisions / each.seconds for each in rounds]
    return Figures(
        load=load.name,
        server=server.name,
        kind=server.kind,
        transport=server.transport,
        decisions_per_second=statistics.median(rates),
        rates=rates,
        p50_ms=_median(each.latencies_ms.get("p50") for each in rounds),
        p99_ms=_median(each.latencies_ms.get("p99") for each in rounds),
        p999_ms=_median(each.latencies_ms.get("p999") for each in rounds),
        decisions=sum(each.decisions for each in rounds),
        errors=sum(each.errors for each in rounds),
        scored=_median(each.scored for each in rounds),
        cpu_us=_median(each.cpu_us for each in rounds),
        memory_mebibytes=usage.memory_bytes / 2**20 if usage is not None else None,
        generator_cpu_us=_median(each.generator_cpu_us for each in rounds),
        statuses=dict(sum((Counter(each.statuses) for each in rounds), Counter())),
        offered_per_second=offered,
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def table(results: Sequence[Figures], title: str) -> Table:
    """A table for people, within 80 columns; unknown figures are left out."""
    bases = {"/echo": "to_echo", "/TS": "to_torchserve", "/FA": "to_fastapi", "/old": "to_before", "/kept": "to_kept"}
    shown_bases = {
        heading: attrgetter(name)
        for heading, name in bases.items()
        if any(getattr(each, name) is not None for each in results)
    }
    seen = any(each.cpu_us is not None for each in results)
    notes = ["ms", *(["CPU in µs a decision"] if seen else [])]
    notes += (
        ["decisions/s over those of the echo, TorchServe, FastAPI, the older commit, the kept run"]
        if shown_bases
        else []
    )
    notes += ["n × 64: calls of 64 orders each", "at 50%: of the closed loop's rate, open"]
    shown = Table(title=title, caption="; ".join(notes), box=SIMPLE, padding=0)
    headings = ["", "dec./s", "p50", "p99", "errors", *(["CPU"] if seen else []), *shown_bases]
    for heading in headings:
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for load, group in itertools.groupby(results, key=attrgetter("load")):
        shown.add_row(f"[bold]{load}")
        for each in group:
            cells = [f"  {each.server}", f"{each.decisions_per_second:,.0f}"]
            cells += [_ms(value) for value in (each.p50_ms, each.p99_ms)]
            cells.append(f"[red]{_count(each.errors)}[/]" if each.errors else "0")
            cells += [_number(each.cpu_us)] if seen else []
            cells += [_ratio(base(each)) for base in shown_bases.values()]
            shown.add_row(*cells, style="bold" if each.kind == PRETRADE and shown_bases else None)
        shown.add_section()
    return shown


def remarks(results: Sequence[Figures]) -> list[str]:
    """What a reader of the table is to know before believing it."""
    found = []
    for each in results:
        where = f"{each.load}, {each.server}"
        if each.errors:
            heard = ", ".join(f"{name} {count:,}" for name, count in each.statuses.items())
            of_all = f"{where}: {each.error_share:.2%} of the orders got no decision{heard and f' ({heard})'}"
            mixed = not each.offered_per_second and each.kind == PRETRADE and each.error_share > _FEW
            found.append(of_all + ("; latencies are of refusals, too" if mixed else ""))
        if each.scored is not None and each.scored < 0.99:
            found.append(f"{where}: only {each.scored:.1%} of the decisions are by a replica's score")
        if each.offered_per_second and each.decisions_per_second < 0.95 * each.offered_per_second:
            found.append(f"{where}: {each.offered_per_second:,.0f}/s were to be sent")
    return found


def with_ratios(
    results: Sequence[Figures],
    servers: Sequence[Server],
    torchserve: str,
    fastapi: str,
    before: Mapping[str, str],
) -> list[Figures]:
    """The same with the ratios to the echo behind each server's transport, to the alternatives, and to older servers.

    Each is the median of the ratios of the rounds, in which all were called in turn. FastAPI has no streams: those are
    held against its single calls. Open loops have no ratios: there the rate is given. `before` names each older server
    by that of today.
    """
    rates = {(each.load, each.server): each.rates for each in results if each.offered_per_second is None}
    echoes = {server.transport: server.name for server in servers if server.kind == ECHO}
    single = rates.get((Load("unary", callers=64).name, fastapi))

    def ratio(each: Figures, to: str | None) -> float | None:
        base = rates.get((each.load, to or ""))
        if base is None and to == fastapi and each.load.startswith("stream"):
            base = single
        if base is None or to == each.server or each.offered_per_second is not None:
            return None
        return _ratio_of(each.rates, base)

    return [
        replace(
            each,
            to_echo=ratio(each, echoes.get(each.transport)) if each.kind != ALTERNATIVE else None,
            to_torchserve=ratio(each, torchserve),
            to_fastapi=ratio(each, fastapi),
            to_before=ratio(each, before.get(each.server)),
        )
        for each in results
    ]


def _ratio_of(rates: Sequence[float], base: Sequence[float]) -> float | None:
    if len(rates) == len(base) and all(base):
        return statistics.median(mine / other for mine, other in zip(rates, base, strict=True))
    return statistics.median(rates) / statistics.median(base) if statistics.median(base) else None


def _count(value: int) -> str:
    return f"{value:,}" if value < 10_000 else f"{value / 1e3:,.0f}k"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"
