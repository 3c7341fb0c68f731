"""The model card: what a model was made from, how good it is, how sure that is, and where it must not be trusted.

It is Markdown with two pictures, which `pretrade card` renders as one HTML file. Nothing in it is typed by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from markdown_it import MarkdownIt

from pretrade.client.figures import figure
from torchserve.card_plots import coverage_plot, reliability_plot
from torchserve.dataset import LABEL_HORIZON_NS, STEP_NS, Samples
from torchserve.evaluation import Estimate, class_balance
from torchserve.training import Kind
from torchserve.walk_forward import ALWAYS, RULES, WalkForward

FILE: Final = "card.md"
_RELIABILITY, _COVERAGE = "reliability.svg", "coverage.svg"
_SIMULATED: Final = "simulated"
_SAID: Final = {ALWAYS: "always trading", RULES: "the rules"}
_STYLE: Final = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse;"
    "font-size:smaller}td,th{padding:.2em .6em;border-bottom:1px solid #ccc}code{background:#eee}svg{max-width:100%}"
)


@dataclass(frozen=True, slots=True)
class CardFacts:
    """All that a card tells of."""

    described: Mapping[str, Any]
    """The model's metadata with its version, as in `NAME.json`."""
    samples: Samples
    """All that there were."""
    walk: WalkForward | str
    """With this model's kind among its deciders; a sentence that says why where there is none."""
    importance: Mapping[str, float]
    """Feature → importance, the largest first."""
    importance_measure: str
    """What the importance is."""
    command: str
    """What makes this card again."""

    @property
    def kind(self) -> Kind:
        """What the model is."""
        kind: Kind = self.described["kind"]
        return kind


def write_card(facts: CardFacts, directory: Path) -> Path:
    """Writes the card as Markdown, and its pictures, into a folder of its own; returns the Markdown."""
    plots = {}
    if not isinstance(facts.walk, str):
        plots = {_RELIABILITY: reliability_plot(facts.walk, facts.kind), _COVERAGE: coverage_plot(facts.walk)}
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (*plots.items(), (FILE, render(facts))):
        (directory / name).write_text(content)
    return directory / FILE


def render(facts: CardFacts) -> str:
    """The card as Markdown."""
    walk = facts.walk
    measured = (
        () if isinstance(walk, str) else (_walk_forward(facts, walk), _by_block(facts, walk), _baselines(facts, walk))
    )
    about = (_final_model(facts), _importance(facts), _reference(facts), _limits(facts))
    sections = (_head(facts), _data(facts), *measured, *about)
    return "\n".join(line for section in sections for line in (*section, ""))[:-1]


def _head(facts: CardFacts) -> Iterable[str]:
    model = facts.described
    reached = "reached" if model["target_precision_reached"] else "**not reached**"
    yield f"# Model card: {model['name']} `{model['version']}`"
    yield ""
    yield (
        f"{_what(facts.kind)}. Feature set `{model['feature_set']}`. A score is the probability that the order is"
        f" *eligible*: {model['label']}. TRADE at {model['threshold']:.4f} or more; the wanted precision of"
        f" {model['target_precision']:.2f} was {reached} where the threshold was chosen."
    )
    yield ""
    yield f"**{verdict(facts.walk, facts.kind)}**"
    yield ""
    yield f"Made by `{facts.command}`; the same command makes the same model and the same card."


def verdict(walk: WalkForward | str, kind: str) -> str:
    """In a sentence or two, whether a model beats the baselines on walk-forward data."""
    if isinstance(walk, str):
        return f"Was not held against the baselines: {walk}. It has not earned to decide on real orders."
    lost, unsure = _lost(walk, kind), _unsure(walk, kind)
    if lost:
        return (
            f"Does not beat {_listed(lost)} on walk-forward data: exported by force, if at all. It has not earned"
            " to decide on real orders."
        )
    if unsure:
        return (
            f"Beats all baselines on walk-forward data, but not beyond chance: {_listed(unsure)}. Exported by force, if"
            " at all."
        )
    return "Beats all baselines on walk-forward data, each beyond chance."


def standing(walk: WalkForward | str, kind: str, *, knows_something: bool = True) -> str:
    """The verdict in the few words that `pretrade up`, `status` and `models list` have room for.

    Args:
        walk: The evaluation; a sentence that says why where there is none.
        kind: The kind of model.
        knows_something: Of the model itself, see `TrainedModel.knows_something`.
    """
    if not knows_something:
        return "knows nothing and trades nothing"
    if isinstance(walk, str):
        return "was not held against the rules"
    lost, unsure = _lost(walk, kind), _unsure(walk, kind)
    if len(lost) == len(walk.comparisons[kind]):
        return "beats none of the baselines"
    if lost:
        return f"does not beat {_listed([_SAID.get(one, one) for one in lost])}"
    if unsure:
        return f"beats all baselines, not beyond chance {_listed([_SAID.get(one, one) for one in unsure])}"
    return "beats all baselines beyond chance"


def _lost(walk: WalkForward, kind: str) -> list[str]:
    return [one.baseline for one in walk.comparisons[kind] if not one.beaten]


def _unsure(walk: WalkForward, kind: str) -> list[str]:
    return [one.baseline for one in walk.comparisons[kind] if one.beaten and not one.beyond_chance]


def _data(facts: CardFacts) -> Iterable[str]:
    samples, data = facts.samples, facts.described["data"]
    first, last = int(samples.time_ns.min()), int(samples.time_ns.max())
    yield "## Data"
    yield ""
    yield f"- Source: {data['source']} (SHA-256 `{data['source_sha256'][:16]}…`)"
    yield f"- Decision instants every {STEP_NS / 1e6:g} ms from {_utc(first)} to {_utc(last)}: {_minutes(samples)}"
    yield f"- {data['samples']:,} samples (SHA-256 `{data['sha256'][:16]}…`), both sides"
    yield ""
    yield from _table(
        ("samples", "number", "eligible"),
        ([name, f"{n:,}", f"{share:.3f}"] for name, (n, share) in class_balance(samples).items()),
    )


def _walk_forward(facts: CardFacts, walk: WalkForward) -> Iterable[str]:
    bootstrap = walk.settings.bootstrap
    yield "## Walk-forward"
    yield ""
    yield (
        f"{walk.blocks} blocks of time, each decided by models and baselines made anew from what lay before it, less"
        f" {LABEL_HORIZON_NS / 1e9:g} s (purging) and {facts.described['training']['embargo_seconds']:g} s (embargo)."
        f" {len(walk.samples.rows):,} samples in {walk.independent_blocks} spans of {bootstrap.block_seconds:g} s:"
        f" about how many independent observations there are. Base rate {_figure(walk.base_rate, 3)}. In brackets:"
        f" {bootstrap.confidence:.0%} intervals of a block bootstrap. Markouts of the mid in bps."
    )
    yield ""
    columns = ("precision", "coverage", "recall", "auc", "brier", "ece")
    headings = ("", "precision", "coverage", "recall", "AUC", "Brier", "ECE", "traded", "refused", "difference")
    markouts = ("markout_traded_bps", "markout_refused_bps", "markout_difference_bps")
    yield from _table(
        headings,
        (
            [
                _named(name, facts.kind),
                *(_figure(getattr(figures, column), 3) for column in columns),
                *(_figure(getattr(figures, column), 2) for column in markouts),
            ]
            for name, figures in walk.figures.items()
        ),
    )
    yield ""
    yield f"![Reliability: share of eligible samples by score]({_RELIABILITY})"
    yield ""
    yield f"![Precision by coverage]({_COVERAGE})"


def _by_block(facts: CardFacts, walk: WalkForward) -> Iterable[str]:
    yield "### By block"
    yield ""
    yield from _table(
        ("from", "to", "samples", "base rate", "threshold", "precision", "coverage", "AUC", "Brier", "difference"),
        (
            [
                f"{_utc(block.start_ns):%H:%M:%S}",
                f"{_utc(block.end_ns):%H:%M:%S}",
                f"{block.samples:,}",
                f"{block.base_rate:.3f}",
                "–" if block.threshold is None else f"{block.threshold:.3f}",
                *(_figure(getattr(block.figures, name), 3) for name in ("precision", "coverage", "auc", "brier")),
                _figure(block.figures.markout_difference_bps, 2),
            ]
            for block in walk.by_block[facts.kind]
        ),
    )


def _baselines(facts: CardFacts, walk: WalkForward) -> Iterable[str]:
    yield "### Against the baselines"
    yield ""
    yield "Difference in precision at equal coverage, model less baseline."
    yield ""
    yield from _table(
        ("baseline", "difference", "beaten", "beyond chance"),
        (
            [one.baseline, _figure(one.precision_difference, 3), _yes(one.beaten), _yes(one.beyond_chance)]
            for one in walk.comparisons[facts.kind]
        ),
    )


def _final_model(facts: CardFacts) -> Iterable[str]:
    model = facts.described
    training, calibration = model["training"], model["calibration"]
    settings = training["xgboost" if facts.kind == "xgboost" else "torch"]
    rounds = "trees" if facts.kind == "xgboost" else "passes over its samples"
    yield "## The exported model"
    yield ""
    yield (
        f"Fitted on the first {training['train_fraction']:.0%} of the time span, stopped by the next"
        f" {training['stopping_fraction']:.0%} after {model['rounds']} {rounds}, calibrated on the"
        f" {training['calibration_fraction']:.0%} after that (Platt: slope {calibration['slope']:.3f}, intercept"
        f" {calibration['intercept']:.3f}), measured on the rest. Settings: "
        + ", ".join(f"{name} {value}" for name, value in settings.items())
        + f"; seed {training['seed']}."
    )
    yield ""
    yield from _table(
        ("part", "samples", "base rate", "AUC", "Brier", "Brier of base rate", "precision", "coverage"),
        (
            [
                part,
                f"{one['samples']:,}",
                f"{one['base_rate']:.3f}",
                figure(one["auc"], ".3f"),
                f"{one['brier']:.4f}",
                f"{one['brier_base_rate']:.4f}",
                "–" if one["precision"] is None else f"{one['precision']:.3f}",
                f"{one['coverage']:.3f}",
            ]
            for part, one in model["metrics"].items()
        ),
    )


def _importance(facts: CardFacts) -> Iterable[str]:
    yield "## Feature importance"
    yield ""
    yield f"On the samples that measure the model: {facts.importance_measure}."
    yield ""
    yield from _table(
        ("feature", "importance"), ([f"`{name}`", f"{value:.4f}"] for name, value in facts.importance.items())
    )


def _reference(facts: CardFacts) -> Iterable[str]:
    yield "## Reference distributions"
    yield ""
    yield (
        "What drift is measured against: features where the model was fitted, its score where it was calibrated. The"
        " deciles are those of all instruments together; the shares in between are kept by instrument. Values within"
        " the correlation time repeat each other, so few of the samples are independent."
    )
    yield ""
    yield from _table(
        ("feature", "samples", "independent", "correlation time", "undefined", "deciles"),
        (
            [
                f"`{name}`",
                f"{_samples(parts):,}",
                f"{sum(part['independent'] for part in parts):,.0f}",
                f"{one['correlation_seconds']:.1f} s",
                f"{sum(part['undefined'] * part['samples'] for part in parts) / max(1, _samples(parts)):.3f}",
                " ".join(f"{edge + 0.0:.3g}" for edge in one["edges"]) or "–",
            ]
            for name, one in facts.described["reference"].items()
            for parts in (list(one["instruments"].values()),)
        ),
    )


def _samples(parts: Iterable[Mapping[str, Any]]) -> int:
    return sum(part["samples"] for part in parts)


def _limits(facts: CardFacts) -> Iterable[str]:
    samples, walk = facts.samples, facts.walk
    yield "## Limits of validity"
    yield ""
    if facts.described["data"]["source"].startswith(_SIMULATED):
        yield "- The data is simulated; how much its features tell was set by hand. No figure here is about a market."
    else:
        yield (
            f"- The data is {_minutes(samples)} of one session: one regime of {_listed(samples.instruments)}, which"
            " move together. Nothing here says how the model does at another hour, day or volatility."
        )
    if not isinstance(walk, str):
        yield (
            f"- The walk-forward figures rest on {walk.independent_blocks} spans of"
            f" {walk.settings.bootstrap.block_seconds:g} s. The intervals assume that they are independent; what lasts"
            " longer makes them too narrow."
        )
        yield "- Models and baselines were compared on the same blocks; looking at them again and again wears them out."
    yield "- Markouts are of the mid: no fee, no spread, no queue and no impact of the order itself is in them."
    yield (
        "- Valid for the feature set named above alone, which the server checks, and for instruments whose features are"
        " distributed as in the table above, which drift monitoring has to watch."
    )


def render_html(directory: Path) -> str:
    """The card in a folder as one HTML file, its pictures included.

    Raises:
        FileNotFoundError: The folder has no card, or not all of it.
    """
    markdown = (directory / FILE).read_text()
    body = MarkdownIt("commonmark").enable("table").render(markdown)
    for name in (_RELIABILITY, _COVERAGE):
        if f'<img src="{name}"' not in body:  # of a model that was not measured
            continue
        svg = (directory / name).read_text()
        before, _, after = body.partition(f'<img src="{name}"')
        body = before + svg[svg.index("<svg") :] + after[after.index(">") + 1 :]
    title = markdown.partition("\n")[0].lstrip("# ").replace("`", "")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}</body></html>\n"
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield "| " + " | ".join(headings) + " |"
    yield "|" + "---|" + "---:|" * (len(headings) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _figure(estimate: Estimate, digits: int) -> str:
    value, low, high = estimate
    if value is None:
        return "–"
    if low is None or high is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def _named(decider: str, kind: Kind) -> str:
    return f"**{decider}**" if decider == kind else decider


def _what(kind: Kind) -> str:
    return "Gradient-boosted trees (XGBoost)" if kind == "xgboost" else "A multilayer perceptron (Torch)"


def _listed(names: Sequence[str]) -> str:
    return " and ".join((", ".join(names[:-1]), names[-1]) if len(names) > 1 else names)


def _minutes(samples: Samples) -> str:
    return f"{(int(samples.time_ns.max()) - int(samples.time_ns.min())) / 60e9:.1f} minutes"


def _utc(time_ns: int) -> datetime:
    return datetime.fromtimestamp(time_ns // 1_000_000_000, UTC)


def _yes(true: bool) -> str:
    return "yes" if true else "no"
