"""The two pictures of a model card, as SVG: the same figures give the same bytes."""

from __future__ import annotations

import io
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torchserve.evaluation import Figures, precision_by_coverage, reliability
from torchserve.walk_forward import ALWAYS, WalkForward


def reliability_plot(walk: WalkForward, kind: str) -> str:
    """Share of eligible samples against the mean score, by bin; the dots' areas are the bins' samples."""
    score = walk.decided[kind].score
    assert score is not None
    bins = reliability(score, walk.samples.eligible)
    figure, axes = _axes("mean score", "share of eligible samples")
    axes.plot([0, 1], [0, 1], linestyle="--", linewidth=1, color="grey", label="perfectly calibrated")
    x, y = [one.mean_score for one in bins], [one.eligible for one in bins]
    largest = max(one.samples for one in bins)
    axes.plot(x, y, color="C0", linewidth=1, label=kind)
    axes.scatter(x, y, s=[100 * one.samples / largest for one in bins], color="C0")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return _svg(figure)


def coverage_plot(walk: WalkForward) -> str:
    """Precision of each score's best-ranked samples against their share; deciders without a score are dots."""
    figure, axes = _axes("coverage: share of samples traded", "precision: share of them eligible")
    for name, decided in walk.decided.items():
        figures = walk.figures[name]
        if name == ALWAYS:
            assert walk.base_rate.value is not None
            axes.axhline(walk.base_rate.value, linestyle="--", linewidth=1, color="grey", label="base rate")
        elif decided.score is not None:
            curve = precision_by_coverage(decided.score, walk.samples.eligible)
            (line,) = axes.plot([x for x, _ in curve], [y for _, y in curve], linewidth=1, label=name)
            _dot(axes, figures, "o", color=line.get_color())
        else:
            _dot(axes, figures, "s", color="black", label=name)
    axes.set(xlim=(0, 1.02))
    return _svg(figure)


def _dot(axes: Axes, figures: Figures, marker: str, **style: Any) -> None:
    """Where a decider decides, if it trades at all."""
    coverage, precision = figures.coverage.value, figures.precision.value
    if coverage is not None and precision is not None:
        axes.plot([coverage], [precision], marker, **style)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(visible=True, linewidth=0.3)
    return figure, axes


def _svg(figure: Figure) -> str:
    figure.legend(loc="outside right upper", fontsize="small")  # beside the axes: within, it would cover lines
    written = io.StringIO()
    with rc_context({"svg.hashsalt": "pretrade", "svg.fonttype": "none"}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    # Lines without trailing spaces, which version control would complain about.
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"
