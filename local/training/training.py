"""From samples to models in a model store. Each model is compared with the baselines before it is written.

It is not part of `torchserve`, because one of the baselines is the rules baseline of `fallback`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fallback.rules import RulesBaseline, RulesSettings
from feature_cache.feature_set import FeatureSet
from feature_cache.features import MF1
from local.training.installed import move_aliases
from server.models.registry import CANDIDATE, CARDS, EVALUATION_FILE, Registry
from torchserve.build import NAMES, Chosen, build_models, descriptions
from torchserve.card import CardFacts, standing, write_card
from torchserve.dataset import Market, Samples, SamplesError
from torchserve.export import VERSIONS_DIRECTORY, metadata_of, write_archive
from torchserve.handler import WEIGHTS_FILE
from torchserve.importance import importance_of
from torchserve.label import Label
from torchserve.label_study import Studied, study
from torchserve.search import search
from torchserve.sources import Report, is_dataset, load_market, load_samples
from torchserve.training import Kind, TrainingSettings, split_by_time, train
from torchserve.walk_forward import WalkForward, WalkForwardSettings, walk_forward


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be trained, on what, and where it goes."""

    kinds: tuple[Kind, ...]
    data: tuple[Path, ...]
    """See `load_samples`."""
    store: Path
    name: str
    """Which replicas' place the models are for: see `training.KINDS`."""
    seed: int
    simulated_seconds: float
    label: Label | None
    """What is to be learnt; None for the default, or for what a dataset file has."""
    valid_days: float | None
    """How long the models may decide after the newest market in their data, in days; None: for ever."""
    blocks: int
    """Of the walk-forward evaluation."""
    trials: int
    """Of the search for settings; 0 for none."""
    install: bool
    """Make the stack start with them: the monotone trees as its champion, the network as its challenger."""
    force: bool
    """Write models that do not beat the baselines, too."""
    feature_set: FeatureSet | None
    """What the models take; None for `mf1`, or for that of a dataset file."""
    labels: bool
    """Compare labels, for the card; that takes as long as evaluating and training."""
    cards: Path | None
    """Folder for another copy of each card, by model name; in the store they are by version."""
    command: str
    """What the card says made it."""


@dataclass(frozen=True, slots=True)
class Made:
    """A model that was written."""

    described: dict[str, Any]
    """Its metadata with its version."""
    archive: Path
    card: Path
    """Folder of its card."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a plan."""

    walk: WalkForward | str
    """The evaluation; a sentence that says why where there is none."""
    made: tuple[Made, ...]
    refused: tuple[Kind, ...]
    """Models that do not beat the baselines and were not forced, and those that know nothing."""


def carry_out(plan: Plan, report: Report = lambda _: None) -> Outcome:
    """Evaluates, trains, writes.

    A model that is to be installed by force is installed also where the samples are too few to evaluate it; its card
    then says so.

    Raises:
        feature_cache.sources.session.SessionError: A recording cannot be read.
        torchserve.dataset.SamplesError: The samples cannot make a model.
    """
    walk_settings = WalkForwardSettings(blocks=plan.blocks)
    market, samples = _load(plan, report)
    training = TrainingSettings(seed=plan.seed, label=samples.label, valid_days=plan.valid_days)
    if plan.trials:
        for kind in plan.kinds:
            training = search(kind, samples, training, walk_settings, trials=plan.trials, report=report)
    walk: WalkForward | str
    refused: tuple[Kind, ...] = ()
    try:
        walk = walk_forward(samples, plan.kinds, training, walk_settings, rules_trades(), report)
        refused = tuple(kind for kind in plan.kinds if not (plan.force or walk.beats_baselines(kind)))
    except SamplesError as error:
        if not (plan.install and plan.force):
            raise
        walk = str(error)
    if plan.install and refused:
        return Outcome(walk, (), refused)
    if plan.install:
        written = _install(plan, samples, report)
    else:
        written, uninformed = _publish(plan, samples, training, refused, report)
        refused += uninformed
    studied: Sequence[Studied] = ()
    if plan.labels and written and market is not None and not isinstance(walk, str):
        with suppress(SamplesError):  # another label may be the same throughout, or look too far for these samples
            studied = study(market, training, walk_settings, report=report)
    if plan.cards:
        _write_evaluation(plan.cards, plan.kinds, walk, studied)
    made = []
    for described in written:
        report(f"card of {described['name']} {described['version']}")
        made.append(_with_card(described, plan, samples, walk, studied))
    return Outcome(walk, tuple(made), refused)


def _load(plan: Plan, report: Report) -> tuple[Market | None, Samples]:
    """The samples, and the market that has other labels, too; None where they are from a dataset file."""
    data = list(plan.data)
    if is_dataset(data):
        return None, load_samples(data, label=plan.label, feature_set=plan.feature_set)
    market = load_market(
        data,
        seed=plan.seed,
        simulated_seconds=plan.simulated_seconds,
        feature_set=plan.feature_set or MF1,
        report=report,
    )
    return market, market.samples(plan.label or Label())


def rules_trades(settings: RulesSettings | None = None) -> Callable[[NDArray[np.float32]], NDArray[np.bool_]]:
    """What the rules baseline would trade; where a rule cannot be decided it trades nothing."""
    rules = RulesBaseline(settings or RulesSettings(), clock=lambda: 0.0)

    def trades(rows: NDArray[np.float32]) -> NDArray[np.bool_]:
        return np.array([rules.passes(row) is True for row in rows], dtype=np.bool_)

    return trades


def _install(plan: Plan, samples: Samples, report: Report) -> Sequence[dict[str, Any]]:
    data = plan.data[0] if plan.data else None
    try:
        before = {name: str(one["version"]) for name, one in descriptions(plan.store).items()}
    except OSError:
        before = {}
    built = build_models(
        data,
        plan.store,
        seed=plan.seed,
        simulated_seconds=plan.simulated_seconds,
        chosen=Chosen(label=samples.label, valid_days=plan.valid_days),
        samples=samples,
        report=report,
    )
    move_aliases(Registry(plan.store), before, {name: str(built[name]["version"]) for name in NAMES})
    return [built[name] for name in NAMES]


def _publish(
    plan: Plan, samples: Samples, training: TrainingSettings, refused: Sequence[Kind], report: Report
) -> tuple[Sequence[dict[str, Any]], tuple[Kind, ...]]:
    """Writes those that are not refused; returns their metadata, and the models that know nothing, also by force."""
    written, uninformed = [], []
    for kind in plan.kinds:
        if kind not in refused:
            report(f"training {kind} on {len(samples.rows):,} samples")
            model = train(plan.name, samples, training, kind)
            if not model.knows_something:
                report(f"{kind} knows nothing of the labels: every order would get the same score")
                uninformed.append(kind)
                continue
            metadata = metadata_of(model, samples, training)
            version = write_archive(model, metadata, plan.store, install=False)
            Registry(plan.store).set_alias(CANDIDATE, version)
            written.append({"version": version, **metadata})
    return written, tuple(uninformed)


def _with_card(
    described: dict[str, Any], plan: Plan, samples: Samples, walk: WalkForward | str, studied: Sequence[Studied]
) -> Made:
    archive = plan.store / VERSIONS_DIRECTORY / f"{described['version']}.mar"
    with zipfile.ZipFile(archive) as archived:
        weights = archived.read(WEIGHTS_FILE)
    test = split_by_time(samples.time_ns, TrainingSettings.model_validate(described["training"])).test
    importance, measure = importance_of(described, weights, samples.rows[test], samples.eligible[test])
    facts = CardFacts(described, samples, walk, importance, measure, plan.command, studied)
    card = plan.store / CARDS / described["version"]
    write_card(facts, card)
    knows_something = described["calibration"]["slope"] > 0
    _write_evaluation(card, [described["kind"]], walk, studied, knows_something=knows_something)
    if plan.cards:
        card = plan.cards / described["name"]
        write_card(facts, card)
    return Made(described, archive, card)


def _write_evaluation(
    directory: Path,
    kinds: Sequence[Kind],
    walk: WalkForward | str,
    studied: Sequence[Studied],
    *,
    knows_something: bool = True,
) -> None:
    """Writes the figures of the walk forward, and how each kind of model stands by them.

    One run measures all models, so copies of cards that are made together share the file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    figures = {} if isinstance(walk, str) else walk.summary()
    described = {
        **figures,
        **({"labels": [asdict(one) for one in studied]} if studied else {}),
        "standing": {kind: standing(walk, kind, knows_something=knows_something) for kind in kinds},
    }
    (directory / EVALUATION_FILE).write_text(json.dumps(described, indent=1) + "\n")
