"""`pretrade dataset` and `pretrade train`."""

from __future__ import annotations

import datetime as dt
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer
from pydantic import TypeAdapter, ValidationError
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from feature_cache import feature_sets
from feature_cache.feature_set import FeatureSetError
from feature_cache.features import MF1
from feature_cache.sources.session import SessionError
from pretrade.client.cli.options import Directory
from pretrade.client.stack_file import DEFAULT_DIRECTORY
from server.audit.reading.places import model_store
from torchserve.config import store_directory
from torchserve.dataset import SamplesError
from torchserve.label import Label
from torchserve.sources import (
    SIMULATED_SECONDS,
    SUFFIX,
    dataset_set,
    is_dataset,
    load_events,
    load_samples,
    write_dataset,
)
from torchserve.validity import MOST_DAYS, VALID_DAYS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from feature_cache.feature_set import FeatureSet
    from local.training.training import Made, Outcome
    from pretrade.market.v1 import market_pb2 as pb
    from torchserve.dataset import Samples
    from torchserve.training import Kind
    from torchserve.walk_forward import WalkForward

T = TypeVar("T")

REFUSED: Final = 3
"""Exit code when a model does not beat the baselines beyond chance, or knows nothing, and was not written."""

dataset_app = typer.Typer(
    name="dataset", help="Build or show a dataset: training samples as Parquet.", no_args_is_help=True
)
app = typer.Typer()
app.add_typer(dataset_app)

Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of simulation and training.")]
Horizon = Annotated[
    float | None, typer.Option(help="Seconds that the label looks ahead. Default: 5, or that of the dataset file.")
]
Delay = Annotated[float | None, typer.Option(help="Seconds from the decision to the market. Default: 0.")]
Price = Annotated[str | None, typer.Option(help="What an order is done at: mid or touch. Default: mid.")]
Features = Annotated[
    str | None,
    typer.Option(help="Feature set of the rows (`pretrade features list`). Default: mf1, or that of the dataset file."),
]
Seconds = Annotated[float, typer.Option(min=60, help="Length of the simulated session, without a recorded one.")]


@dataset_app.command("build")
def build(
    out: Annotated[Path, typer.Option(help="The dataset file, NAME.parquet.")],
    recordings: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Recordings or folders of them, in any format that `pretrade replay` reads. Default: the simulator."
        ),
    ] = None,
    seed: Seed = 1,
    seconds: Seconds = SIMULATED_SECONDS,
    horizon: Horizon = None,
    delay: Delay = None,
    price: Price = None,
    features: Features = None,
) -> None:
    """Replay market data through the feature engine, and label both sides of every decision instant."""
    if out.suffix != SUFFIX:
        raise typer.BadParameter(f"must end in {SUFFIX}", param_hint="--out")
    label = label_of(horizon, delay, price)
    console = Console()
    samples = _shown(
        console,
        lambda report: load_samples(
            recordings or [],
            seed=seed,
            simulated_seconds=seconds,
            label=label,
            feature_set=None if features is None else feature_set_of(features),
            report=report,
        ),
    )
    if not len(samples.rows):
        console.print("[red]no sample: no instant with a known book had another a label's horizon later[/red]")
        raise typer.Exit(1)
    write_dataset(samples, out)
    _describe(console, samples)
    console.print(f"{out}: {out.stat().st_size:,} bytes", highlight=False)


@dataset_app.command("show")
def show(file: Annotated[Path, typer.Argument(help="A dataset file.")]) -> None:
    """Show what a dataset file holds: span, source, hashes, and how many samples are eligible."""
    console = Console()
    _describe(console, _shown(console, lambda _: load_samples([file])))


@dataset_app.command("features")
def join_features(
    orders: Annotated[
        Path, typer.Argument(help="CSV or Parquet with the columns instrument, time (UTC), and perhaps side.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write, NAME.parquet.")],
    recordings: Annotated[
        list[Path] | None,
        typer.Argument(help="Recordings or folders of them, as for `pretrade replay`. Default: the simulator."),
    ] = None,
    features: Annotated[
        str, typer.Option("--features", help="Whose features: the id of a set (`pretrade features list`).")
    ] = "mf1",
    seed: Seed = 1,
    seconds: Seconds = SIMULATED_SECONDS,
) -> None:
    """Add to each of your own orders the features as they were known at its time, from recordings.

    With a column `side` (buy or sell) they are turned for it, as models see them. What callers bring of a set is a
    column of the orders, as it would be sent: not turned. All other columns are kept.

    Example: `pretrade dataset features orders.csv recordings/ --out features.parquet`
    """
    from torchserve.point_in_time import join  # noqa: PLC0415 - only for this command

    if out.suffix != SUFFIX:
        raise typer.BadParameter(f"must end in {SUFFIX}", param_hint="--out")
    feature_set = feature_set_of(features)
    console = Console()

    def joined(report: Callable[[str], None]) -> tuple[int, int]:
        def events(only: set[str]) -> Iterable[pb.MarketEvent]:
            return load_events(recordings or [], only, feature_set, seed=seed, simulated_seconds=seconds, report=report)

        return join(orders, events, out, feature_set)

    number, known = _shown(console, joined)
    console.print(f"{out}: {number:,} orders, {known:,} with a known book", highlight=False)


@app.command()
def train(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="monotone (mf1 alone), xgboost or torch; can be repeated. Default: monotone, for another set xgboost;"
            " with --install monotone and torch."
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="A dataset file, or recordings as for `pretrade replay`; can be repeated. Default: the simulator."
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="The model store. Default: that of the running stack, else the one it would make."),
    ] = None,
    name: Annotated[str, typer.Option(help="Whose place the model is for: champion or challenger.")] = "champion",
    seed: Seed = 1,
    seconds: Seconds = SIMULATED_SECONDS,
    horizon: Horizon = None,
    delay: Delay = None,
    price: Price = None,
    features: Features = None,
    valid_days: Annotated[
        float,
        typer.Option(
            min=0,
            max=MOST_DAYS,
            help="Days that it may decide after the newest market in its data; 0: for ever.",
        ),
    ] = VALID_DAYS,
    blocks: Annotated[int, typer.Option(min=1, max=100, help="Walk-forward blocks.")] = 5,
    trials: Annotated[
        int, typer.Option(min=0, max=10_000, help="Trials of a search for settings (extra `search`).")
    ] = 0,
    install: Annotated[
        bool, typer.Option("--install", help="Make both models what the stack starts with, not just new versions.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write a model that does not beat the baselines, too; its card says so.")
    ] = False,
    cards: Annotated[
        Path | None, typer.Option(help="Also write the cards here, by model name; in the store they are by version.")
    ] = None,
    mlflow: Annotated[
        str | None,
        typer.Option(
            envvar="MLFLOW_TRACKING_URI",
            help="MLflow to log runs to (extra `mlflow`): a tracking URI, or `local` for mlflow.db in --dir.",
        ),
    ] = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON.")] = False,
) -> None:
    """Train models, compare them with the baselines in a walk-forward evaluation, and publish them with their cards.

    Prints the version of each; the alias `candidate` then means the last, as in `pretrade canary start candidate`.

    Exit code 3: a model does not beat the baselines beyond chance and was not published (see --force), or it knows
    nothing: every order would get the same score.
    """
    from local.training.training import Plan, carry_out  # noqa: PLC0415 - the machine-learning libraries

    feature_set = None if features is None else feature_set_of(features)
    alone = ["monotone"] if _is_of_mf1(feature_set, data or ()) else ["xgboost"]
    kinds = _kinds(model or (["monotone", "torch"] if install else alone))
    if name not in ("champion", "challenger"):
        raise typer.BadParameter(f"{name} is neither champion nor challenger", param_hint="--name")
    if install and not _is_of_mf1(feature_set, data or ()):
        raise typer.BadParameter(f"the stack starts with models of {MF1.id}", param_hint="--features")
    if install and (trials or set(kinds) != {"monotone", "torch"} or len(data or ()) > 1 or is_dataset(data or ())):
        raise typer.BadParameter("the stack starts with both models of one recording, without a search")
    plan = Plan(
        kinds=kinds,
        data=tuple(data or ()),
        store=store or store_of(directory, data),
        name=name,
        seed=seed,
        simulated_seconds=seconds,
        label=label_of(horizon, delay, price),
        valid_days=valid_days or None,
        blocks=blocks,
        trials=trials,
        install=install,
        force=force,
        feature_set=feature_set,
        labels=True,
        cards=cards,
        command=shlex.join(["pretrade", *sys.argv[1:]]),
    )
    console = Console(stderr=as_json)
    try:
        outcome = _shown(console, lambda report: carry_out(plan, report))
        runs = (
            {}
            if mlflow is None
            else {made.described["version"]: _track(mlflow, made, outcome.walk, directory) for made in outcome.made}
        )
    except ImportError as error:
        console.print(f"[red]{error}: pip install 'pretrade-server\\[search,mlflow]'[/red]")
        raise typer.Exit(1) from error
    if as_json:
        described = [one.described | {"archive": str(one.archive), "card": str(one.card)} for one in outcome.made]
        walk = outcome.walk if isinstance(outcome.walk, str) else outcome.walk.summary()
        print(json.dumps({"models": described, "refused": outcome.refused, "walk_forward": walk}))
    else:
        _report(console, outcome, runs)
    raise typer.Exit(REFUSED if outcome.refused else 0)


def _is_of_mf1(feature_set: FeatureSet | None, data: Sequence[Path]) -> bool:
    """Whether the samples have rows of `mf1`; a dataset file that cannot be read is refused later."""
    if feature_set is None and is_dataset(data):
        try:
            return dataset_set(data[0]) == MF1
        except SamplesError:
            return True
    return feature_set in (None, MF1)


def _track(uri: str, made: Made, walk: WalkForward | str, directory: Path) -> str:
    from torchserve.tracking import track  # noqa: PLC0415 - an optional extra

    if isinstance(walk, str):
        raise SamplesError(f"nothing to log to MLflow: {walk}")
    return track(uri, directory, made.described, walk, made.card, made.archive)


def _kinds(names: list[str]) -> tuple[Kind, ...]:
    from torchserve.training import Kind  # noqa: PLC0415 - the machine-learning libraries

    try:
        return tuple(TypeAdapter(list[Kind]).validate_python(list(dict.fromkeys(names))))
    except ValidationError as error:
        raise typer.BadParameter("one of monotone, xgboost, torch", param_hint="--model") from error


def label_of(horizon: float | None, delay: float | None, price: str | None) -> Label | None:
    """What is to be learnt; None when nothing was said."""
    said = {"horizon_seconds": horizon, "delay_seconds": delay, "price": price}
    given = {name: value for name, value in said.items() if value is not None}
    try:
        return Label.model_validate(given) if given else None
    except ValidationError as error:
        first = error.errors()[0]
        raise typer.BadParameter(first["msg"], param_hint=f"--{str(first['loc'][0]).partition('_')[0]}") from error


@app.command()
def card(
    directory: Annotated[Path, typer.Argument(help="Folder of the card: in the store, cards/VERSION.")],
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("card.html"),
) -> None:
    """Render a model's card, with its pictures, as one HTML file."""
    from torchserve.card import render_html  # noqa: PLC0415 - the machine-learning libraries

    try:
        out.write_text(render_html(directory))
    except FileNotFoundError as error:
        raise typer.BadParameter(f"no {error.filename}", param_hint="DIRECTORY") from error
    typer.echo(out)


def store_of(directory: Path, data: list[Path] | None) -> Path:
    """The store of the stack that runs in a directory, else the one that it would make of these data."""
    running = model_store(directory)
    if running != directory / "models":
        return running
    return store_directory(directory, data[0] if data and not is_dataset(data) else None)


def feature_set_of(named: str) -> FeatureSet:
    """The set of an option `--features`."""
    try:
        found = feature_sets.by_id(named)
    except FeatureSetError as error:
        raise typer.BadParameter(str(error), param_hint="--features") from error
    if found is None:
        raise typer.BadParameter(
            f"no set {named!r}; known are {feature_sets.names()}, and {feature_sets.FILE_VARIABLE} names a file with"
            " others",
            param_hint="--features",
        )
    return found


def _shown(console: Console, work: Callable[[Callable[[str], None]], T]) -> T:
    """Does something while showing what is being done."""
    try:
        with console.status("starting") as status:

            def report(doing: str) -> None:
                status.update(doing)
                if not console.is_terminal:
                    console.print(doing, highlight=False)

            return work(report)
    except (SessionError, SamplesError, FeatureSetError) as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        raise typer.Exit(1) from error


def _describe(console: Console, samples: Samples) -> None:
    from torchserve.evaluation import class_balance  # noqa: PLC0415 - the machine-learning libraries

    span = (int(samples.time_ns.max()) - int(samples.time_ns.min())) / 1e9
    console.print(f"{samples.source}\nsource {samples.source_sha256}, samples {samples.sha256()}", highlight=False)
    console.print(f"eligible: {samples.label.text}", highlight=False)
    table = Table(box=box.SIMPLE)
    for heading in (f"over {span:,.1f} s", "samples", "eligible"):
        table.add_column(heading, justify="right" if heading != f"over {span:,.1f} s" else "left")
    for part, (number, share) in class_balance(samples).items():
        table.add_row(part, f"{number:,}", f"{share:.3f}")
    console.print(table)


def _report(console: Console, outcome: Outcome, runs: dict[str, str]) -> None:
    if isinstance(outcome.walk, str):
        console.print(f"[red]not held against the baselines[/]: {escape(outcome.walk)}", highlight=False)
    else:
        _report_walk(console, outcome.walk)
    for made in outcome.made:
        described: dict[str, Any] = made.described
        run = runs.get(described["version"])
        console.print(
            f"{described['name']} [bold]{described['version']}[/] ({described['kind']}): threshold"
            f" {described['threshold']:.4f}, {made.archive}, card {made.card}" + (f", MLflow run {run}" if run else ""),
            highlight=False,
        )
        if described["expires_at"]:
            console.print(_expiry(described["trained_until"], described["expires_at"], time.time()), highlight=False)
    for kind in outcome.refused:
        console.print(
            f"[red]{kind} was not published[/]: it does not beat the baselines beyond chance (--force publishes it all"
            " the same), or gives every order the same score",
            highlight=False,
        )


def _expiry(until: int, expires_at: int, now: float) -> str:
    """When a model expires; markup of rich."""
    said = f"its data ends at {_utc(until)}, and it may decide until {_utc(expires_at)} of the market (--valid-days)"
    if expires_at > now:
        return f"[dim]{said}[/]"
    return f"{said}: [yellow]on a replay of its data it decides, on a live market it has expired already[/]"


def _utc(seconds: int) -> str:
    return f"{dt.datetime.fromtimestamp(seconds, dt.UTC):%Y-%m-%d %H:%M} UTC"


def _report_walk(console: Console, walk: WalkForward) -> None:
    from torchserve.card import data_needed, verdict  # noqa: PLC0415 - as above
    from torchserve.training import TrainingSettings  # noqa: PLC0415

    table = Table(box=box.SIMPLE, padding=(0, 0, 0, 1))
    table.title = f"walk-forward, {walk.blocks} blocks, {len(walk.samples.rows):,} samples, markouts in bps"
    columns = {
        "precision": "precision",
        "coverage": "coverage",
        "auc": "AUC",
        "brier": "Brier",
        "markout_traded_bps": "traded",
        "markout_refused_bps": "refused",
        "saved_bps": "saved",
    }
    table.add_column("", no_wrap=True)
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for decider, figures in walk.figures.items():
        values = [getattr(figures, column).value for column in columns]
        table.add_row(decider, *("–" if value is None else f"{value:.3f}" for value in values))
    console.print(table)
    for kind in walk.comparisons:
        console.print(f"{kind}: {verdict(walk, kind)} {data_needed(walk, kind, TrainingSettings())}", highlight=False)
