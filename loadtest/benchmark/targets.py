"""What the product wants to reach, held against a run of the benchmark: each target is met or missed.

A target is a figure of one server under one load, or what a part of it takes of the CPU of a decision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.box import SIMPLE
from rich.table import Table

from loadtest.generators.load import LARGE_BATCH, ORDERS, Load

ENVOY: Final = "Envoy"
"""The decision server behind Envoy as it is by default: a replica of TorchServe is asked first."""
EMBEDDED: Final = "Envoy embedded"
"""The same with the model in its own process asked first."""
EMBEDDED_OS: Final = "Envoy embedded os"
"""The same with an audit that the operating system writes to disk when it likes."""
GRPC_AIO: Final = "grpc.aio"
"""The decision server on the portable edge."""
ALL_PARTS: Final = "all"
"""Everything but the load generator."""
EVENT_LOOP: Final = "event loop"
SHIPPING: Final = "shipping"
_CPU: Final = "CPU"
_ERROR_SHARE: Final = "error_share"
_FEW: Final = 0.01
"""With more errors a latency of those that got decisions says nothing."""


@dataclass(frozen=True, slots=True)
class Target:
    """A figure, and what it is to be."""

    name: str
    server: str
    load: str
    """Its name; `CPU` for what parts take of a decision under 64 callers."""
    figure: str
    """A field of `Figures`, `error_share`, or a part."""
    least: float = -math.inf
    most: float = math.inf

    @property
    def wanted(self) -> str:
        """For people."""
        return f"≥ {_text(self.least, self.figure)}" if self.most == math.inf else f"≤ {_text(self.most, self.figure)}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target and what a run says of it."""

    target: Target
    measured: float | None
    """None where the run does not have it."""
    remark: str = ""
    """Why the figure does not count."""

    @property
    def met(self) -> bool | None:
        """None when nobody can tell."""
        if self.measured is None:
            return None
        return not self.remark and self.target.least <= self.measured <= self.target.most

    @property
    def shown(self) -> str:
        """What was measured, for people."""
        if self.measured is None:
            return "–"
        return f"{_text(self.measured, self.target.figure)}{self.remark and f', {self.remark}'}"


_LONE, _MANY, _CROWD = (Load("unary", callers=number).name for number in (1, 64, 256))
_STREAM: Final = Load("stream", callers=4).name
_BATCHES: Final = {size: Load("batch", callers=4, orders=size).name for size in (ORDERS["batch"], LARGE_BATCH)}
_FAST: Final = {_STREAM: 15_000.0, _BATCHES[64]: 30_000.0, _BATCHES[256]: 60_000.0}

TARGETS: Final = (
    Target("64 callers: of the echo", ENVOY, _MANY, "to_echo", least=0.51),  # three times of what it was
    Target("64 callers: decisions/s", ENVOY, _MANY, "decisions_per_second", least=8_000),
    Target("64 callers: of the echo", EMBEDDED, _MANY, "to_echo", least=0.65),
    Target("64 callers: decisions/s", EMBEDDED, _MANY, "decisions_per_second", least=10_000),
    Target("64 callers: p99", EMBEDDED, _MANY, "p99_ms", most=15),
    *(
        target
        for server in (ENVOY, EMBEDDED)
        for target in (
            Target("256 callers: of the echo", server, _CROWD, "to_echo", least=0.6),
            Target("256 callers: refused", server, _CROWD, _ERROR_SHARE, most=0.01),
        )
    ),
    Target("1 caller: p50", ENVOY, _LONE, "p50_ms", most=2.5),
    Target("1 caller: p50", EMBEDDED, _LONE, "p50_ms", most=1.3),
    Target("1 caller: p50", EMBEDDED_OS, _LONE, "p50_ms", most=0.6),
    Target("open loop, 1,000/s: p99", ENVOY, Load("unary", rate=1_000).name, "p99_ms", most=10),
    Target("open loop, 2,000/s: p99", ENVOY, Load("unary", rate=2_000).name, "p99_ms", most=15),
    Target("open loop, 5,000/s: p99", EMBEDDED, Load("unary", rate=5_000).name, "p99_ms", most=12),
    *(
        target
        for load, per_second in _FAST.items()
        for target in (
            Target(f"{load}: decisions/s", ENVOY, load, "decisions_per_second", least=per_second),
            Target(f"{load}: times FastAPI", ENVOY, load, "to_fastapi", least=1),
        )
    ),
    Target("CPU, all but the generator", ENVOY, _CPU, ALL_PARTS, most=180),
    Target("CPU, event loop", ENVOY, _CPU, EVENT_LOOP, most=30),
    Target("CPU, shipping", ENVOY, _CPU, SHIPPING, most=10),
    Target("64 callers: of its echo", GRPC_AIO, _MANY, "to_echo", least=0.55),
)


def verdicts(run: Mapping[str, Any], targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """What a run, as its document has it, says of every target."""
    return [_verdict(target, run) for target in targets]


def _verdict(target: Target, run: Mapping[str, Any]) -> Verdict:
    if target.load == _CPU:
        return Verdict(target, run.get("cpu", {}).get(target.server, {}).get(target.figure))
    found = [one for one in run["results"] if (one["server"], one["load"]) == (target.server, target.load)]
    if not found:
        return Verdict(target, None)
    (one,) = found
    share = one["errors"] / max(1, one["errors"] + one["decisions"])
    if target.figure == _ERROR_SHARE:
        return Verdict(target, share)
    return Verdict(target, one.get(target.figure), f"{share:.1%} got no decision" if share > _FEW else "")


def verdict_table(found: Sequence[Verdict]) -> Table:
    """For people, within 80 columns."""
    met = sum(each.met is True for each in found)
    shown = Table(title=f"{met} of {len(found)} targets are met", caption="ms; CPU in µs a decision", box=SIMPLE)
    for heading in ("", "wanted", "measured", ""):
        shown.add_column(heading, justify="left" if not heading else "right", no_wrap=heading != "measured")
    server = ""
    for each in sorted(found, key=lambda one: one.target.server):
        if each.target.server != server:
            server = each.target.server
            shown.add_row(f"[bold]{server}")
        shown.add_row(f"  {each.target.name}", each.target.wanted, each.shown, _MARKS[each.met])
    return shown


def verdict_lines(run: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the tables in `docs/figures.md`: what is met, what is missed, and what the run does not have."""
    found = verdicts(run)
    for is_met, word in _WORDS.items():
        group = [each for each in found if each.met is is_met]
        if not group:
            continue
        yield f"**{word}: {len(group)} of {len(found)}**\n\n"
        yield "| server | target | wanted | measured |\n"
        yield "|---|---|---|---|\n"
        for each in group:
            yield f"| {each.target.server} | {each.target.name} | {each.target.wanted} | {each.shown} |\n"
        yield "\n"


_WORDS: Final = {True: "Met", False: "Missed", None: "Not measured"}
_MARKS: Final = {True: "[green]met[/]", False: "[red]missed[/]", None: "not measured"}


def _text(value: float, figure: str) -> str:
    if figure == _ERROR_SHARE:
        return f"{value:.1%}"
    if figure.startswith("to_"):
        return f"{value:.2f}"
    if figure.endswith("_ms"):
        return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
