"""A bounded search for settings with Optuna, only on the data before the first walk-forward block.

No figure of the walk-forward evaluation is therefore computed on data that influenced the choice of settings. The bound
is a number of trials and not a time: with one seed the same samples give the same settings on any machine.
"""

from __future__ import annotations

from sklearn.metrics import log_loss

from torchserve.dataset import Samples, SamplesError
from torchserve.fitting import NetworkSettings, TreeSettings
from torchserve.sources import Report
from torchserve.training import Kind, Split, TrainingSettings, check_labels, cut, fit
from torchserve.walk_forward import WalkForwardSettings


def search(
    kind: Kind,
    samples: Samples,
    training: TrainingSettings,
    settings: WalkForwardSettings,
    *,
    trials: int,
    report: Report = lambda _: None,
) -> TrainingSettings:
    """The settings whose model has the least log loss, calibrated, on the last part of the first span.

    The settings given are the first trial, so the result is none that is worse on that part.

    Raises:
        SamplesError: That span is too short, or a part of it has one label only.
        ImportError: The extra `search` is not installed.
    """
    import optuna  # noqa: PLC0415 - an optional extra

    start, end = int(samples.time_ns.min()), int(samples.time_ns.max())
    first = start + round((end - start) * settings.first_fraction) - training.gap_ns
    parts = cut(samples.time_ns, start, first, (0.5, 0.1, 0.1, 0.1, 1.0), training.gap_ns)
    split = Split(*parts)
    if not all(map(len, parts)):
        raise SamplesError(f"{(first - start) / 1e9:.1f} s before the first walk-forward block are too short to search")
    check_labels(samples, split)

    def tried(trial: optuna.Trial) -> TrainingSettings:
        if kind != "torch":
            before: TreeSettings = getattr(training, kind)
            chosen = {
                "max_depth": trial.suggest_int("max_depth", 1, 6 if kind == "xgboost" else 3),
                "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.3, log=True),
                "min_child_weight": trial.suggest_float("min_child_weight", 10, 500, log=True),
                "subsample": trial.suggest_float("subsample", 0.4, 1.0),
                "colsample": trial.suggest_float("colsample", 0.3, 1.0),
                "l2": trial.suggest_float("l2", 0.1, 100, log=True),
            }
            return training.model_copy(update={kind: before.model_copy(update=chosen)})
        width = trial.suggest_categorical("width", [8, 16, 32, 64])
        network = NetworkSettings(
            hidden=(width, max(4, width // 2)),
            learning_rate=trial.suggest_float("learning_rate", 3e-4, 1e-2, log=True),
            weight_decay=trial.suggest_float("weight_decay", 1e-4, 1.0, log=True),
            batch=training.torch.batch,
            patience=training.torch.patience,
        )
        return training.model_copy(update={"torch": network})

    def loss(candidate: TrainingSettings) -> float:
        model = fit(kind, samples, split, candidate)
        return float(log_loss(samples.eligible[split.test], model.scores(samples.rows[split.test])))

    best, least = training, loss(training)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=training.seed))
    for number in range(1, trials + 1):
        report(f"search, trial {number} of {trials}: {kind}, log loss {least:.5f} so far")
        trial = study.ask()
        candidate = tried(trial)
        reached = loss(candidate)
        study.tell(trial, reached)
        if reached < least:
            best, least = candidate, reached
    return best
