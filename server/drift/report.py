"""A report on drift as one HTML file that a browser opens by itself, plots included."""

from __future__ import annotations

import datetime as dt
import io
import math
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from pretrade.client.figures import figure
from server.audit.reading.labels import Quality
from server.drift.summary import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CURVES: Final = 6
_STYLE: Final = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}.drifted{font-weight:bold;color:#b00}svg{max-width:100%;height:auto}"
)


def write_report(path: Path, summary: Summary, quality: Mapping[str, Quality]) -> None:
    """Writes the page.

    Args:
        path: Of the HTML file.
        summary: What it shows.
        quality: Of labelled decisions by source, for the reliability curve; may be empty.

    Raises:
        ModuleNotFoundError: Without the extra `plots`.
        OSError: It cannot be written.
    """
    body = "\n".join(_body(summary, quality))
    head = f'<!doctype html><meta charset="utf-8"><title>pretrade: drift</title><style>{_STYLE}</style>'
    path.write_text(f"{head}\n{body}\n")


def _body(summary: Summary, quality: Mapping[str, Quality]) -> Iterator[str]:
    yield f"<h1>Drift of model {escape(summary.model_version or '?')}</h1>"
    yield (
        f"<p>{summary.decisions:,} decisions from {_time(summary.since_ns)} to {_time(summary.until_ns)} UTC; "
        f"{summary.rows:,} different inputs of this model.</p>"
    )
    for version, count in summary.others.items():
        yield f"<p>Left out: {count:,} decisions by model {escape(version)}.</p>"
    if summary.problem:
        yield f"<p>No comparison: {escape(summary.problem)}.</p>"
    if summary.drifts:
        names = ", ".join(one.name for one in summary.drifted)
        yield f"<p class=drifted>Drifted: {names}.</p>" if names else "<p>Nothing has drifted.</p>"
        yield (
            "<p>PSI against the model's training reference. The limit is what a sample of as many independent values "
            "without drift exceeds in one report of a hundred; without a limit there were too few values to say, or "
            "the feature is not judged.</p>"
        )
        yield "<table><tr><th>feature<th>PSI<th>limit<th>independent values<th>undefined<th>in the reference</tr>"
        for one in summary.drifts:
            limit = "" if one.limit is None else f"{one.limit:.3f}"
            mark = " class=drifted" if one.drifted else ""
            yield (
                f"<tr{mark}><td>{escape(one.name)}<td>{one.psi:.3f}<td>{limit}<td>{one.independent:,}"
                f"<td>{one.undefined:.1%}<td>{one.undefined_before:.1%}</tr>"
            )
        yield "</table>"
        for one in summary.drifts:
            if one.not_judged:
                yield f"<p>{escape(one.name)} is not judged: it {escape(one.not_judged)}.</p>"
    if summary.regimes:
        yield "<h2>By volatility</h2>"
        yield (
            "<p>Thirds of what the model learnt from, by the volatility that was forecast for the next 5 s. Precision"
            " is that of the trades whose outcome is known.</p>"
        )
        yield "<table><tr><th>volatility<th>inputs<th>share<th>coverage<th>labelled trades<th>precision</tr>"
        for regime in summary.regimes:
            precision = math.nan if regime.precision is None else regime.precision
            yield (
                f"<tr><td>{escape(regime.name)}<td>{regime.inputs:,}<td>{regime.share:.1%}<td>{regime.coverage:.3f}"
                f"<td>{regime.labelled:,}<td>{figure(precision, '.3f')}</tr>"
            )
        yield "</table>"
    if summary.windows:
        yield f"<h2>PSI over time</h2>{_svg(_over_time(summary))}"
    if any(one.bins for one in quality.values()):
        yield f"<h2>Reliability</h2>{_svg(_reliability(quality))}"
        for source, found in quality.items():
            yield (
                f"<p>{escape(source)}: {found.decisions:,} labelled; of what callers heard as TRADE, precision "
                f"{figure(found.precision, '.3f')} at coverage {figure(found.coverage, '.3f')}; Brier "
                f"{figure(found.brier, '.4f')}, calibration error {figure(found.calibration_error, '.4f')}.</p>"
            )
    if summary.missing:
        yield f"<h2>Missing values</h2>{_svg(_missing(summary))}"


def _time(ns: int) -> str:
    return dt.datetime.fromtimestamp(ns / 1e9, dt.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _svg(figure: Figure) -> str:
    """The drawing as it is embedded in a page."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, and slow to import

    return Figure(figsize=(width, height), layout="constrained")


def _over_time(summary: Summary) -> Figure:
    figure = _figure(10, 4)
    axes = figure.subplots()
    times = np.array([one.since_ns for one in summary.windows]).astype("datetime64[ns]")
    judged = (one for one in summary.drifts if not one.not_judged)  # the ages would leave no room for all others
    worst = sorted(judged, key=lambda one: one.psi / (one.limit or 1.0), reverse=True)[:_MOST_CURVES]
    for one in worst:
        axes.plot(times, [window.psi[one.name] for window in summary.windows], marker=".", label=one.name)
    axes.set(ylabel="PSI", title="what differs most, of what is judged")
    figure.legend(loc="outside right upper", fontsize="small")  # within the axes it would cover lines
    return figure


def _reliability(quality: Mapping[str, Quality]) -> Figure:
    figure = _figure(7, 5)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="calibrated")
    for source, one in quality.items():
        if one.bins:
            points = [each.mean_score for each in one.bins], [each.eligible for each in one.bins]
            axes.plot(*points, marker="o", label=source)
    axes.set(xlabel="mean score", ylabel="share that was eligible", xlim=(0, 1), ylim=(0, 1))
    figure.legend(loc="outside right upper", fontsize="small")  # within the axes it would cover lines
    return figure


def _missing(summary: Summary) -> Figure:
    instruments = list(summary.missing)
    names = list(dict.fromkeys(name for shares in summary.missing.values() for name in shares))
    # Where the model scored nothing of an instrument, nothing is known of what it alone takes.
    shares = np.array([[summary.missing[one].get(name, np.nan) for name in names] for one in instruments])
    figure = _figure(max(10, 0.22 * len(names)), 2 + 0.3 * len(instruments))
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Reds", aspect="auto")
    axes.set_yticks(range(len(instruments)), instruments)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
    figure.colorbar(image, ax=axes, label="share undefined")
    return figure
