"""One MLflow run per trained model: parameters, figures, card and archive, and an entry in MLflow's model registry.

Servers load models from our own registry. MLflow's entry points at the same archive and has the same version.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torchserve.walk_forward import WalkForward

EXPERIMENT: Final = "pretrade"


LOCAL: Final = "local"
"""Instead of a URI: a store of our own."""


def track(uri: str, directory: Path, described: Mapping[str, Any], walk: WalkForward, card: Path, archive: Path) -> str:
    """Logs a run and registers the model.

    Args:
        uri: Of MLflow's tracking server or store, for example `http://HOST:PORT`; or `LOCAL`: a database file
            `mlflow.db` and files below `directory`.
        directory: See there.
        described: The model's metadata with its version.
        walk: Its evaluation.
        card: Folder of its card.
        archive: The `.mar`.

    Returns:
        The run's id.

    Raises:
        ImportError: The extra `mlflow` is not installed.
        mlflow.exceptions.MlflowException: The store cannot be written.
    """
    # Its own default is to report usage to its makers.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient  # noqa: PLC0415 - an optional extra

    kind = described["kind"]
    artifacts = None
    if uri == LOCAL:
        directory.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{(directory / 'mlflow.db').resolve()}"
        artifacts = (directory / "mlflow").resolve().as_uri()  # else they would be put into the current folder
    client = MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name(EXPERIMENT)
    experiment = known.experiment_id if known else client.create_experiment(EXPERIMENT, artifact_location=artifacts)
    name, version = f"pretrade-{described['name']}", described["version"]
    tags = {"version": version, "data_sha256": described["data"]["sha256"], "source": described["data"]["source"]}
    run = client.create_run(experiment, run_name=f"{name}-{version}", tags=tags).info.run_id
    for parameter, value in _flat(described["training"]):
        client.log_param(run, parameter, value)
    for metric, value in _figures(described, walk, kind):
        client.log_metric(run, metric, value)
    client.log_artifacts(run, str(card), "card")
    client.log_artifact(run, str(archive), "archive")
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    source = f"{client.get_run(run).info.artifact_uri}/archive/{archive.name}"
    client.create_model_version(name, source, run, tags={"version": version})
    client.set_terminated(run)
    return str(run)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as dotted names."""
    flat: list[tuple[str, Any]] = []
    for name, value in settings.items():
        flat += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return flat


def _figures(described: Mapping[str, Any], walk: WalkForward, kind: str) -> list[tuple[str, float]]:
    """Every figure that is defined: of the walk, and of the exported model by part."""
    figures = walk.figures[kind]
    of_walk = [(f"walk_forward.{name}", getattr(figures, name).value) for name in figures.__dataclass_fields__]
    of_parts = [
        (f"{part}.{name}", value) for part, metrics in described["metrics"].items() for name, value in metrics.items()
    ]
    found = [
        *of_walk,
        *of_parts,
        ("threshold", described["threshold"]),
        ("beats_baselines", walk.beats_baselines(kind)),
    ]
    return [(name, float(value)) for name, value in found if value is not None]
