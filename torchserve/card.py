"""The model card: what a model was made from, how good it is, how sure that is, and where it must not be trusted.

It is Markdown with two pictures, which `pretrade card` renders as one HTML file. Nothing in it is typed by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from markdown_it import MarkdownIt

from feature_cache.domain import Domain
from feature_cache.har import REGIMES, regimes
from pretrade.client.figures import figure
from torchserve.card_plots import coverage_plot, reliability_plot
from torchserve.dataset import STEP_NS, Samples
from torchserve.domain import caught, false_alarms
from torchserve.evaluation import Blocks, Decided, Estimate, class_balance
from torchserve.label_study import WIDEST, Studied
from torchserve.limits import LimitsReport, joined
from torchserve.threshold import Cut, independent
from torchserve.training import Kind, TrainingSettings, split_by_time
from torchserve.volatility import explained
from torchserve.walk_forward import ALWAYS, CHAMPION, RULES, WalkForward

FILE: Final = "card.md"
_RELIABILITY, _COVERAGE = "reliability.svg", "coverage.svg"
_MOST_CORRUPTED: Final = 25
"""Features, the most important ones: of a hundred it would take minutes, and nobody would read it."""
_SHOWN: Final = 0.02
"""How closely a precision is to be known."""
_SAID: Final = {ALWAYS: "always trading", RULES: "the rules", CHAMPION: "the few monotone features"}
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
    studied: Sequence[Studied] = ()
    """What became of every label; empty where they were not compared."""

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
        ()
        if isinstance(walk, str)
        else (
            _walk_forward(facts, walk),
            _by_block(facts, walk),
            _regimes(facts, walk),
            _baselines(facts, walk),
            _band(facts, walk),
        )
    )
    about = (_final_model(facts), _domain(facts), _importance(facts), _reference(facts), _limits(facts))
    labels = (_labels(facts),) if facts.studied else ()
    sections = (_head(facts), _data(facts), *measured, *labels, *about)
    return "\n".join(line for section in sections for line in (*section, ""))[:-1]


def _head(facts: CardFacts) -> Iterable[str]:
    model = facts.described
    reached = "reached" if model["target_precision_reached"] else "**not reached**"
    yield f"# Model card: {model['name']} `{model['version']}`"
    yield ""
    confidence = model["training"]["confidence"]
    yield (
        f"{_what(facts.kind)}. Feature set `{model['feature_set']}`. A score is the probability that the order is"
        f" *eligible*: {model['label']['text']}. TRADE at {model['threshold']:.4f} or more. That the precision is at"
        f" least the wanted {model['target_precision']:.2f}, at {confidence:.0%} confidence, was {reached} where the"
        " threshold was chosen."
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
    yield f"- {_expiry(facts.described)}"
    yield ""
    yield from _table(
        ("samples", "number", "eligible"),
        ([name, f"{n:,}", f"{share:.3f}"] for name, (n, share) in class_balance(samples).items()),
    )


def _expiry(described: Mapping[str, Any]) -> str:
    if not described["expires_at"]:
        return "Does not expire"
    until, expires_at = (datetime.fromtimestamp(described[name], UTC) for name in ("trained_until", "expires_at"))
    return (
        f"Knows the market until {until:%Y-%m-%d %H:%M}, and expires on {expires_at:%Y-%m-%d %H:%M} of it (UTC): after"
        " that its answers are ABSTAIN"
    )


def _walk_forward(facts: CardFacts, walk: WalkForward) -> Iterable[str]:
    bootstrap, label = walk.settings.bootstrap, walk.samples.label
    training = TrainingSettings.model_validate(facts.described["training"])
    yield "## Walk-forward"
    yield ""
    yield (
        f"{walk.blocks} blocks of time, each decided by models and baselines made anew from what lay before it, less"
        f" {label.span_ns / 1e9:g} s (purging) and {(training.gap_ns - label.span_ns) / 1e9:g} s (embargo)."
        f" {len(walk.samples.rows):,} samples, worth about {walk.independent:,.0f} independent observations of the"
        f" label, in {walk.independent_blocks} spans of time. Base rate {_figure(walk.base_rate, 3)}. In brackets:"
        f" {bootstrap.confidence:.0%} intervals of a block bootstrap. *n* are the samples that a decider trades, and"
        " how many independent ones they are worth. Markouts in bps. *Saved* is what the refused orders would have"
        " lost, in bps per order, refused or not; *break-even* is what refusing one may cost before trading all of them"
        " is better."
    )
    yield ""
    columns = ("precision", "coverage", "recall", "auc", "brier", "ece")
    headings = ("", "precision", "n", "coverage", "recall", "AUC", "Brier", "ECE")
    markouts = ("markout_traded_bps", "markout_refused_bps", "markout_difference_bps", "saved_bps", "break_even_bps")
    yield from _table(
        headings,
        (
            [
                _named(name, facts.kind),
                _figure(figures.precision, 3),
                _numbers(int(walk.decided[name].trade.sum()), walk.independent_traded[name]),
                *(_figure(getattr(figures, column), 3) for column in columns[1:]),
            ]
            for name, figures in walk.figures.items()
        ),
    )
    yield ""
    yield from _table(
        ("", "traded", "refused", "difference", "saved", "break-even"),
        (
            [_named(name, facts.kind), *(_figure(getattr(figures, column), 3) for column in markouts)]
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
        (
            *("from", "to", "samples", "base rate", "threshold", "its lower bound", "independent"),
            *("precision", "coverage", "AUC", "Brier", "difference"),
        ),
        (
            [
                f"{_utc(block.start_ns):%H:%M:%S}",
                f"{_utc(block.end_ns):%H:%M:%S}",
                f"{block.samples:,}",
                f"{block.base_rate:.3f}",
                *_threshold(block.threshold),
                *(_figure(getattr(block.figures, name), 3) for name in ("precision", "coverage", "auc", "brier")),
                _figure(block.figures.markout_difference_bps, 2),
            ]
            for block in walk.by_block[facts.kind]
        ),
    )


def _regimes(facts: CardFacts, walk: WalkForward) -> Iterable[str]:
    samples, decided = walk.samples, walk.decided[facts.kind]
    yield "### By volatility"
    yield ""
    if not np.isfinite(walk.volatility).any():
        yield "The samples are too few to forecast volatility from."
        return
    low, high = np.nanquantile(walk.volatility, (1 / 3, 2 / 3))
    place = regimes(walk.volatility, (float(low), float(high)))
    yield (
        "Thirds of the samples by the volatility of the next 5 s, as a block's history forecasts it from the last 1, 5"
        f" and 30 s (HAR-RV). The rank correlation of that forecast with what became of it is"
        f" {figure(explained(samples.of_mf1, walk.volatility), '.2f')}; `pretrade audit drift` says how the model does"
        " in the same regimes later."
    )
    yield ""
    rows = []
    for number, name in enumerate(_bounds(float(low), float(high))):
        inside = place == number
        if not inside.any():
            continue
        part = samples.take(np.flatnonzero(inside))
        score = None if decided.score is None else decided.score[inside]
        figures = Blocks(part, walk.settings.bootstrap).figures(Decided(decided.trade[inside], score))
        traded = _numbers(int(decided.trade[inside].sum()), independent(part, decided.trade[inside]))
        shown = (figures.precision, figures.coverage, figures.auc, figures.saved_bps)
        rows.append([name, f"{part.eligible.mean():.3f}", traded, *(_figure(one, 3) for one in shown)])
    yield from _table(("bps in 5 s", "base rate", "n", "precision", "coverage", "AUC", "saved"), rows)


def _bounds(low: float, high: float) -> tuple[str, ...]:
    """Each regime with its bounds."""
    bounds = (f"up to {low:.2f}", f"{low:.2f} to {high:.2f}", f"above {high:.2f}")
    return tuple(f"{name}: {where}" for name, where in zip(REGIMES, bounds, strict=True))


def _threshold(cut: Cut | None) -> tuple[str, str, str]:
    """A threshold, the lower end of the precision where it was chosen, and independent observations behind that."""
    if cut is None or not cut.traded:
        return ("–", "–", "–") if cut is None else (f"{cut.threshold:.3f}", "–", "–")
    return f"{cut.threshold:.3f}", f"{cut.low:.3f}", f"{cut.independent:,.0f}"


def _labels(facts: CardFacts) -> Iterable[str]:
    yield "## What can be foretold how surely"
    yield ""
    wanted = facts.described["target_precision"]
    yield (
        "The few monotone features on other labels, in the same walk forward: how far the label looks ahead, and how"
        " long after the decision the order reaches the market. *Reached* counts the blocks before which a threshold"
        f" was found whose lower bound reaches {wanted:.2f}. In the rows *{WIDEST}* the history of each block chose the"
        " horizon, too: the one with the widest coverage at that bound, else the one with the highest bound. No block"
        " that is counted had a say in its horizon or threshold."
    )
    yield ""
    yield from _table(
        ("horizon", "delay", "base rate", "precision", "n", "coverage", "reached", "AUC", "saved", "break-even"),
        (
            [
                one.horizon if one.horizon == WIDEST else f"{one.horizon} s",
                f"{1e3 * one.delay_seconds:g} ms",
                f"{one.base_rate:.3f}",
                _figure(one.figures.precision, 3),
                _numbers(one.traded, one.independent),
                _figure(one.figures.coverage, 3),
                str(one.blocks_reached),
                # Scores of different labels do not rank together.
                "–" if one.horizon == WIDEST else _figure(one.figures.auc, 3),
                _figure(one.figures.saved_bps, 3),
                _figure(one.figures.break_even_bps, 3),
            ]
            for one in facts.studied
        ),
    )


def _numbers(samples: int, worth: float) -> str:
    """A number of samples, and how many independent ones they are worth."""
    return f"{samples:,} ({worth:,.0f})"


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


def _band(facts: CardFacts, walk: WalkForward) -> Iterable[str]:
    blocks = walk.limits[facts.kind]
    yield "### Where it is uncertain"
    yield ""
    yield (
        "The guard `UNCERTAIN` keeps scores in a conformal band from trading. Of the orders that are not eligible at"
        f" most {blocks[0].band.error:.0%} shall trade. The part of each block's history that set the threshold makes"
        f" the band: so wide that the {blocks[0].band.confidence:.0%} interval of the error there ends at the wanted"
        " one, for as many independent observations as its orders that are not eligible are worth. *Abstains* are"
        " orders that would trade and do not; *in the band* are all orders there, of which most do not trade anyway."
    )
    yield ""
    yield from _table(
        (
            *("block", "band", "independent", "wanted error", "observed error", "error without it"),
            *("traded", "abstains", "in the band", "precision", "precision without it"),
        ),
        ([str(number), *_uncertainty(block)] for number, block in enumerate((*blocks, joined(blocks)), start=1)),
    )


def _uncertainty(block: LimitsReport) -> Iterable[str]:
    yield "all" if block.threshold is None else f"{block.band.low:.3f} … {block.band.high:.3f}"
    yield "–" if block.threshold is None else f"{block.band.independent[0]:,.0f}"
    yield f"{block.band.error:.3f}"
    shares = (block.error, block.error_without, block.traded, block.abstains, block.in_band)
    yield from (
        "–" if share is None else f"{share:.3f}" for share in (*shares, block.precision, block.precision_without)
    )


def _domain(facts: CardFacts) -> Iterable[str]:
    described = facts.described["domain"]
    yield "## What it has seen"
    yield ""
    if described is None:
        yield "It looks at no feature, so there is nothing that it must have seen."
        return
    domain = Domain(described, facts.samples.feature_set)
    each = "Each feature" if len(domain.names) <= _MOST_CORRUPTED else f"Each of the {_MOST_CORRUPTED} chief features"
    corrupted = [name for name in facts.importance if name in domain.names][:_MOST_CORRUPTED]
    split = split_by_time(facts.samples.time_ns, TrainingSettings.model_validate(facts.described["training"]))
    measured = facts.samples.take(split.test)
    alarms = false_alarms(domain, measured)
    yield (
        f"The guard `OUT_OF_DOMAIN` looks at the {len(domain.names)} features that can change a score. One vector is"
        " refused for a value far beyond what was seen, for other undefined values than ever, or for values that do not"
        " go together; later vectors of an instrument also because a feature is stuck, or has contradicted the others"
        f" for too long. On the samples that measure the model it refuses {alarms.at_once:.2%} at once and"
        f" {alarms.watched:.2%} in all, wrongly."
    )
    yield ""
    if not isinstance(facts.walk, str):
        yield from _table(
            ("block", "refused at once", "refused in all"),
            (
                [str(number), f"{one.alarms.at_once:.2%}", f"{one.alarms.watched:.2%}"]
                for number, one in enumerate(facts.walk.limits[facts.kind], start=1)
            ),
        )
        yield ""
    yield (
        f"{each} of those samples was corrupted, from the first one on. *Alone* is the share of the changed"
        " vectors that is refused by itself, *in all* the share of vectors from then on, and *after* how long it took"
        " in the slower instrument."
    )
    yield ""
    yield from _table(
        ("feature", "corruption", "alone", "in all", "after"),
        (
            [
                f"`{one.feature}`",
                one.corruption,
                f"{one.at_once:.3f}",
                f"{one.watched:.3f}",
                "never" if one.seconds is None else f"{one.seconds:.1f} s",
            ]
            for one in caught(domain, measured, corrupted)
        ),
    )


def _final_model(facts: CardFacts) -> Iterable[str]:
    model = facts.described
    training, calibration = model["training"], model["calibration"]
    settings = training[facts.kind]
    rounds = "passes over its samples" if facts.kind == "torch" else "trees"
    yield "## The exported model"
    yield ""
    yield (
        f"Fitted on the first {training['train_fraction']:.0%} of the time span, stopped by the next"
        f" {training['stopping_fraction']:.0%} after {model['rounds']} {rounds}, calibrated on the"
        f" {training['calibration_fraction']:.0%} after that (Platt: slope {calibration['slope']:.3f}, intercept"
        f" {calibration['intercept']:.3f}), cut by the next {training['threshold_fraction']:.0%}, measured on the rest."
        " *n* are samples, and how many independent observations of the label they are worth. Settings: "
        + ", ".join(f"{name} {_setting(value)}" for name, value in settings.items())
        + f"; seed {training['seed']}."
    )
    yield ""
    yield from _table(
        ("part", "n", "base rate", "AUC", "Brier", "Brier of base rate", "precision", "n traded", "coverage"),
        (
            [
                part,
                _numbers(one["samples"], one["independent"]),
                f"{one['base_rate']:.3f}",
                figure(one["auc"], ".3f"),
                f"{one['brier']:.4f}",
                f"{one['brier_base_rate']:.4f}",
                _figure(Estimate(one["precision"], one["precision_low"], one["precision_high"]), 3),
                _numbers(one["traded"], one["traded_independent"]),
                f"{one['coverage']:.3f}",
            ]
            for part, one in model["metrics"].items()
        ),
    )


def _setting(value: object) -> str:
    """A setting's value; of features with a direction, their names with a sign."""
    if isinstance(value, Mapping):
        return " ".join(f"{'+' if direction > 0 else '-'}`{name}`" for name, direction in value.items())
    return str(value)


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
    if samples.is_simulated:
        yield (
            "- The data is simulated. That market was fitted to a recorded one, but nobody in it reacts to orders. No"
            " figure here is about a real market."
        )
    else:
        yield (
            f"- The data is {_minutes(samples)} of one session: one regime of {_listed(samples.instruments)}, which"
            " move together. Nothing here says how the model does at another hour, day or volatility."
        )
    if not isinstance(walk, str):
        yield (
            f"- The walk-forward figures rest on {walk.independent_blocks} spans of {walk.block_seconds:g} s. The"
            " intervals assume that they are independent; what lasts longer makes them too narrow."
        )
        yield f"- {data_needed(walk, facts.kind, TrainingSettings.model_validate(facts.described['training']))}"
        yield "- Models and baselines were compared on the same blocks; looking at them again and again wears them out."
    yield (
        f"- Markouts begin at the {facts.described['label']['price']} and end at the mid: no fee, no queue and no"
        " impact of the order itself is in them."
    )
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


def data_needed(walk: WalkForward, kind: str, training: TrainingSettings) -> str:
    """In a sentence, how much data shows the wanted precision at the smallest coverage, and how much there is."""
    precision, coverage = training.target_precision, training.minimum_coverage
    hours = walk.hours_needed(kind, precision, _SHOWN, coverage)
    have = f"the blocks here are {_minutes(walk.samples)}. `pretrade ingest --record` records more."
    if hours is None:
        return f"It trades nothing, so nothing says how much data shows a precision of {precision:.0%}; {have}"
    return (
        f"To show a precision of {precision:.0%} ± {_SHOWN:.0%} at {coverage:.0%} coverage takes about {hours:.1f}"
        f" hours of each instrument's market, all instruments and both sides together, in one regime; {have}"
    )


def _what(kind: Kind) -> str:
    return {
        "monotone": "Shallow boosted trees on a few features, monotone in each (XGBoost)",
        "xgboost": "Gradient-boosted trees on all features (XGBoost)",
        "torch": "A multilayer perceptron on all features (Torch)",
    }[kind]


def _listed(names: Sequence[str]) -> str:
    return " and ".join((", ".join(names[:-1]), names[-1]) if len(names) > 1 else names)


def _minutes(samples: Samples) -> str:
    return f"{(int(samples.time_ns.max()) - int(samples.time_ns.min())) / 60e9:.1f} minutes"


def _utc(time_ns: int) -> datetime:
    return datetime.fromtimestamp(time_ns // 1_000_000_000, UTC)


def _yes(true: bool) -> str:
    return "yes" if true else "no"
