"""`pretrade models add`, `combine`, `show`, `export` and `remove`: what others trained, in the model store."""

from __future__ import annotations

import base64
import json
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape

from local.training.cli import Delay, Horizon, Price, feature_set_of, label_of, store_of
from pretrade.client.cli.option_groups import spreads_options
from pretrade.client.cli.options import AdminTarget, AsJson, Directory, Yes
from pretrade.client.stack_file import DEFAULT_DIRECTORY, NoStackError, stack_endpoint
from server.errors import ModelUnknownError
from server.inference.model_map import RESERVED, ModelName
from server.inference.model_names import DEFAULT
from server.models.archive import read_archive
from server.models.registry import ALIASES, CANDIDATE, CARDS, EVALUATION_FILE, VERSIONS, ModelUnusableError, Registry
from torchserve import portable
from torchserve.brought.errors import BroughtError
from torchserve.validity import MOST_DAYS, VALID_DAYS, expiry_text

if TYPE_CHECKING:
    from feature_cache.feature_set import FeatureSet
    from torchserve.brought.adding import Added, Adding
    from torchserve.brought.combining import Part
    from torchserve.brought.data import Data
    from torchserve.label import Label

_FILES_OF: Final = {"onnx": "model.onnx", "xgboost": "model.ubj", "torchscript": "model.pt", "torch": "state.pt"}
"""What an exported model's weights are called, by its runtime."""
_ASK_SECONDS: Final = 5.0
_NAMES: Final = ("champion", "challenger")

app = typer.Typer()

Store = Annotated[Path | None, typer.Option(help="The model store. Default: that of the running stack.")]
Version = Annotated[str, typer.Argument(help="A version of `pretrade models list`, or an alias.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Describing:
    """How a model that others trained becomes a version: what its archive is to say of it, and where that is put."""

    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Parquet or CSV with the set's columns and a label of 0 and 1, none of which trained the model; better"
            " with `time` and `instrument`."
        ),
    ] = None
    label_column: Annotated[str, typer.Option(help="The label's column. Default: eligible, or label.")] = ""
    threshold: Annotated[
        float | None, typer.Option(help="TRADE at this score or more. Default: chosen from the dataset.")
    ] = None
    target_precision: Annotated[
        float, typer.Option(min=0.01, max=0.999, help="Wanted share of right TRADE answers.")
    ] = 0.95
    name: Annotated[str, typer.Option(help="Whose place the model is for: champion or challenger.")] = "champion"
    model: Annotated[
        str, typer.Option(help="The model of the server whose candidate it becomes (docs/model-map.md).")
    ] = DEFAULT
    horizon: Horizon = None
    delay: Delay = None
    price: Price = None
    valid_days: Annotated[
        float,
        typer.Option(
            min=0, max=MOST_DAYS, help="Days that it may decide after the dataset's newest market; 0: for ever."
        ),
    ] = VALID_DAYS
    store: Store = None
    directory: Directory = DEFAULT_DIRECTORY
    as_json: AsJson = False

    @property
    def root(self) -> Path:
        """The model store."""
        return self.store or store_of(self.directory, None)

    def check(self) -> None:
        """Raises BadParameter for names that cannot be: the registry has a folder of the model's name."""
        if self.name not in _NAMES:
            raise typer.BadParameter(f"{self.name} is neither champion nor challenger", param_hint="--name")
        if self.model == DEFAULT:
            return
        said = f"{', '.join(sorted(RESERVED))} are taken" if self.model in RESERVED else ""
        try:
            TypeAdapter(ModelName).validate_python(self.model)
        except ValidationError:
            said = "it must be a lower-case word of at most 32 letters, digits and hyphens"
        if said:
            raise typer.BadParameter(f"{self.model!r} is no name for a model: {said}", param_hint="--model")

    def adding(self, feature_set: FeatureSet, *, fill_undefined: bool = False) -> Adding:
        """What is decided of a model of a set."""
        from torchserve.brought.adding import Adding  # noqa: PLC0415 - the machine-learning libraries
        from torchserve.training import TrainingSettings  # noqa: PLC0415

        settings = TrainingSettings(target_precision=self.target_precision, valid_days=self.valid_days or None)
        if (label := self._label) is not None:
            settings = settings.model_copy(update={"label": label})
        return Adding(feature_set, self.name, self.threshold, fill_undefined, settings)

    def data(self, feature_set: FeatureSet) -> Data | None:
        """The rows of the dataset; None without one.

        Raises:
            BroughtError: They cannot be used.
        """
        from torchserve.brought.data import read_data  # noqa: PLC0415 - as above

        return (
            None if self.calibrate is None else read_data(self.calibrate, feature_set, self.label_column, self._label)
        )

    @property
    def _label(self) -> Label | None:
        return label_of(self.horizon, self.delay, self.price)


@app.command()
@spreads_options
def add(
    file: Annotated[Path, typer.Argument(help="The model.")],
    kind: Annotated[str, typer.Option(help="onnx, xgboost, lightgbm, sklearn or torchscript.")],
    features: Annotated[str, typer.Option(help="Feature set that its rows hold (`pretrade features list`).")] = "mf1",
    output: Annotated[str, typer.Option(help="ONNX: the output that is the score, if there are several.")] = "",
    output_is: Annotated[
        str | None, typer.Option(help="margin (log odds) or probability. Default: by its values.")
    ] = None,
    fill_undefined: Annotated[
        bool, typer.Option("--fill-undefined", help="Give the model the dataset's medians where a row is undefined.")
    ] = False,
    trusted: Annotated[
        bool, typer.Option("--trusted", help="sklearn: I know who made this pickle. Reading it runs its code.")
    ] = False,
    *,
    how: Describing,
) -> None:
    """Add a model that was trained elsewhere, as a version that a canary can give orders.

    The file is read, its scores are held against the library that trained it, and calibration, threshold, limits and
    reference histograms are measured on the dataset. The alias `candidate` then means the new version.

    Exit code 1: it was refused; the message says what to change.
    """
    from torchserve.brought import adding as brought_adding  # noqa: PLC0415 - the machine-learning libraries
    from torchserve.brought.reading import KINDS, read_model  # noqa: PLC0415
    from torchserve.dataset import SamplesError  # noqa: PLC0415

    if kind not in KINDS:
        raise typer.BadParameter(f"one of {', '.join(KINDS)}", param_hint="--kind")
    if output_is not in (None, "margin", "probability"):
        raise typer.BadParameter("margin or probability", param_hint="--output-is")
    if kind == "sklearn" and not trusted:
        raise typer.BadParameter(
            "reading a pickle runs whatever code is in it: say --trusted if you know who made it", param_hint="--kind"
        )
    how.check()
    feature_set = feature_set_of(features)
    adding = how.adding(feature_set, fill_undefined=fill_undefined)
    try:
        brought = read_model(file, kind, feature_set, output=output, output_is=output_is)  # type: ignore[arg-type]
        added = brought_adding.add(brought, how.data(feature_set), adding)
    except (BroughtError, SamplesError) as error:
        raise _refused(str(error)) from error
    _publish(added, f"`{file.name}`", how)


@app.command()
@spreads_options
def combine(
    parts: Annotated[
        list[str], typer.Argument(help="Versions or aliases; for a mean each with =WEIGHT, or all alike.")
    ],
    mean: Annotated[bool, typer.Option("--mean", help="The weighted mean of their scores.")] = False,
    stack: Annotated[bool, typer.Option("--stack", help="A logistic regression on their margins.")] = False,
    *,
    how: Describing,
) -> None:
    """Make one version of several. Its archive holds them whole, and an explanation shows the score of each.

    Exit code 1: it was refused; the message says what to change.
    """
    from torchserve.brought import combining  # noqa: PLC0415
    from torchserve.dataset import SamplesError  # noqa: PLC0415

    if mean == stack:
        raise typer.BadParameter("say one of the two", param_hint="--mean or --stack")
    how.check()
    try:
        combined = [_part(Registry(how.root), one) for one in parts]
        feature_set = feature_set_of(str(combined[0].metadata["feature_set"]))
        data, adding = how.data(feature_set), how.adding(feature_set)
        added = combining.combine("mean" if mean else "stack", combined, data, adding)
    except (BroughtError, SamplesError, ModelUnknownError) as error:
        raise _refused(str(error)) from error
    _publish(added, " and ".join(f"`{one.version}`" for one in combined), how)


@app.command()
def show(
    version: Version,
    store: Store = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: AsJson = False,
) -> None:
    """Show what a version says of itself."""
    registry = Registry(store or store_of(directory, None))
    try:
        found = registry.resolve(version)
        archive = read_archive(registry.path(found))
    except ModelUnknownError as error:
        raise _refused(str(error)) from error
    about: dict[str, Any] = json.loads(archive.files["metadata.json"])
    if as_json:
        print(json.dumps({"version": found, **about}))
        return
    record, standing = registry.describe(found), registry.standing(found)
    aliases = [alias for alias, one in registry.aliases().items() if one == found]
    lines = {
        "version": " ".join([found, *aliases]),
        "kind": f"{about['kind']}, for the place of the {about['name']}"
        + (", brought and not trained here" if about.get("brought") else ""),
        "features": record.feature_set,
        "label": about.get("label", {}).get("text", "not said"),
        "threshold": f"{about['threshold']:.4f}",
        "calibration": "slope {slope:.4f}, intercept {intercept:.4f}".format(**about["calibration"]),
        "expiry": expiry_text(about.get("expires_at", 0), time.time()),
        "standing": standing.text,
        "card": str(standing.card or "none"),
        "problem": record.problem or "none",
    }
    for part in (about.get("ensemble") or {}).get("parts", ()):
        lines[f"part {part['version']}"] = f"{part['kind']}, weight {part['weight']:.4g}"
    for heading, line in lines.items():
        typer.echo(f"{heading:<14}{line}")


@app.command()
def export(
    version: Version,
    out: Annotated[Path, typer.Argument(help="The folder; made when missing.")],
    store: Store = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """Copy a version out of the store: its archive, metadata and card, and the weights as they are served.

    Models of LightGBM and scikit-learn are served as ONNX. A network that pretrade has trained is there as Torch's
    weights and as ONNX, the parts of an ensemble as they are in its archive. The weights give margins or probabilities
    before calibration; the metadata say how these become scores.
    """
    registry = Registry(store or store_of(directory, None))
    try:
        found = registry.resolve(version)
        archive = read_archive(registry.path(found))
    except ModelUnknownError as error:
        raise _refused(str(error)) from error
    about: dict[str, Any] = json.loads(archive.files["metadata.json"])
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy2(registry.path(found), out / f"{found}.mar")
    (out / f"{found}.json").write_text(json.dumps({"version": found, **about}, indent=2) + "\n")
    runtime = about.get("runtime") or ("xgboost" if about["network"] is None else "torch")
    (out / _FILES_OF.get(runtime, "parts.zip")).write_bytes(archive.files["weights.bin"])
    if network := about.get(portable.METADATA):
        (out / _FILES_OF["onnx"]).write_bytes(base64.b64decode(network["model"]))
    card = registry.root / CARDS / found
    if card.is_dir():
        shutil.copytree(card, out / "card", dirs_exist_ok=True)
    for path in sorted(out.iterdir()):
        typer.echo(path)


@app.command()
def remove(
    version: Annotated[str, typer.Argument(help="A version; no alias.")],
    store: Store = None,
    target: AdminTarget = None,
    directory: Directory = DEFAULT_DIRECTORY,
    yes: Yes = False,
) -> None:
    """Take a version out of the store. Its decisions can then no longer be replayed or explained.

    Refused for a version that an alias names, that the stack starts with, or that a running server has loaded.
    """
    registry = Registry(store or store_of(directory, None))
    if version in ALIASES:
        raise _refused(f"{version} is an alias: name the version that is to go")
    aliases = [alias for alias, one in registry.aliases_of_all().items() if one == version]
    if aliases:
        raise _refused(
            f"{version} is the {' and the '.join(aliases)}: `pretrade models alias` points an alias elsewhere first"
        )
    try:
        found = registry.resolve(version)
    except ModelUnknownError as error:
        raise _refused(str(error)) from error
    installed = [path.name for path in registry.root.glob("*.mar") if _version_in(path) == found]
    if installed:
        raise _refused(f"{found} is what the stack starts with, as {' and '.join(installed)}: `make models` first")
    loaded_on = _loaded_on(found, target, directory)
    if loaded_on:
        raise _refused(f"{found} is loaded on {', '.join(loaded_on)}: end its canary, or restart the replica, first")
    if not yes:
        typer.confirm(f"Decisions of {found} can then no longer be replayed or explained. Remove it?", abort=True)
    registry.path(found).unlink()
    (registry.root / VERSIONS / f"{found}.json").unlink(missing_ok=True)
    shutil.rmtree(registry.root / CARDS / found, ignore_errors=True)
    typer.echo(f"removed {found}")


def _part(registry: Registry, named: str) -> Part:
    """A part of an ensemble, `VERSION` or `VERSION=WEIGHT`. Raises BroughtError, ModelUnknownError."""
    from torchserve.brought.combining import Part  # noqa: PLC0415 - the machine-learning libraries

    version, _, weight = named.partition("=")
    found = registry.resolve(version)
    archive = read_archive(registry.path(found))
    try:
        share = float(weight or 1)
    except ValueError as error:
        raise BroughtError(f"{named}: must be VERSION or VERSION=WEIGHT, for example {found}=0.5") from error
    return Part(found, json.loads(archive.files["metadata.json"]), archive.files["weights.bin"], share)


def _publish(added: Added, source: str, how: Describing) -> None:
    """Writes archive and card, moves the alias, and says so."""
    from torchserve.brought.card import STANDING, write_card  # noqa: PLC0415 - the machine-learning libraries
    from torchserve.export import write_archive  # noqa: PLC0415

    store = how.root
    version = write_archive(added, added.metadata, store, install=False)
    folder = store / CARDS / version
    command = shlex.join(["pretrade", *sys.argv[1:]])
    card = write_card(version, added, source, command, folder)
    (folder / EVALUATION_FILE).write_text(json.dumps({"standing": {added.metadata["kind"]: STANDING}}, indent=1) + "\n")
    registry = Registry(store, how.model)
    try:
        registry.set_alias(CANDIDATE, version)
    except ModelUnusableError as error:
        raise _refused(f"it was written to {registry.path(version)}, but: {error}") from error
    if how.as_json:
        described = {"version": version, **added.metadata, "archive": str(registry.path(version)), "card": str(card)}
        print(json.dumps(described | {"lacks": added.lacks, "notes": added.notes}))
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{added.name} [bold]{version}[/] ({added.metadata['kind']}): threshold {added.metadata['threshold']:.4f},"
        f" {registry.path(version)}, card {card}"
    )
    if added.metrics:
        test = added.metrics["test"]
        precision = "no trade" if test.precision is None else f"precision {test.precision:.3f}"
        if test.precision_low is not None and test.precision_high is not None:
            precision += f" ({test.precision_low:.3f} to {test.precision_high:.3f})"
        console.print(f"on its last part: {precision} at coverage {test.coverage:.3f}, AUC {test.auc:.3f}")
    if added.difference:
        console.print(f"its scores are within {added.difference:.1g} of those of {added.metadata['kind']}")
    expires_at = added.metadata["expires_at"]
    if expires_at:
        style = "yellow" if expires_at <= time.time() else "default"
        console.print(f"it {expiry_text(expires_at, time.time())}", style=style)
    for note in added.notes:
        console.print(f"[dim]{escape(note)}[/]")
    for lack in added.lacks:
        console.print(f"[yellow]not available[/]: {escape(lack)}")
    console.print(f"next: {_next(registry, version, how.model)}")


def _next(registry: Registry, version: str, model: str) -> str:
    """What is done with a new version: a canary, or, where its model has no champion yet, that."""
    if model == DEFAULT:
        return f"pretrade canary start {version}"
    has_champion = "champion" in registry.aliases()
    return f"pretrade {'canary start' if has_champion else 'models alias champion'} {version} --model {model}"


def _refused(why: str) -> typer.Exit:
    """Says why; to be raised."""
    typer.echo(f"pretrade models: {why}", err=True)
    return typer.Exit(1)


def _version_in(path: Path) -> str:
    try:
        return read_archive(path).version
    except ModelUnknownError:
        return ""


def _loaded_on(version: str, target: str | None, directory: Path) -> list[str]:
    """Replicas of a running server that have a version; none where no server runs."""
    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc  # noqa: PLC0415 - for this command alone
    from pretrade.client.cli.connection import connected  # noqa: PLC0415

    try:
        target = target or stack_endpoint(directory, "admin", "--target HOST:PORT")
    except NoStackError:
        return []
    with connected(target, directory, "admin") as channel:
        found = admin_pb2_grpc.AdminServiceStub(channel).ListModels(admin_pb2.ListModelsRequest(), timeout=_ASK_SECONDS)
    return [replica for one in found.models if one.model_version == version for replica in one.loaded_on]
