"""The group `pretrade features`: one instrument's features, read directly from Redis, and the feature sets.

It needs the Redis client, so the commands are part of `pretrade-server` and not of `pretrade`.
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from pretrade.client.cli.options import AsJson, Directory
from pretrade.client.stack_file import DEFAULT_DIRECTORY, NoStackError, stack_endpoint

if TYPE_CHECKING:
    from feature_cache.feature_set import Feature
    from feature_cache.feature_sets import FeatureSets, Registered


class _Features(TyperGroup):
    """`pretrade features BTCUSDT.BINANCE` is `pretrade features watch BTCUSDT.BINANCE`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that is called, and its arguments."""
        return super().resolve_command(ctx, ["watch", *args] if "." in args[0] else args)


app = typer.Typer(
    name="features",
    cls=_Features,
    epilog="`pretrade features SYMBOL.VENUE` is short for `pretrade features watch SYMBOL.VENUE`.",
    no_args_is_help=True,
)
File = Annotated[
    Path | None,
    typer.Option(
        envvar="PRETRADE_FEATURES__FILE", help="Python file with sets of your own, as the server's setting names it."
    ),
]


@app.callback()
def features() -> None:
    """Watch one instrument's features as they change; list, show and check feature sets."""


@app.command()
def watch(
    instrument: Annotated[str, typer.Argument(help="SYMBOL.VENUE, for example BTCUSDT.BINANCE.")],
    redis: Annotated[
        str | None, typer.Option(help="URL of the Redis that the worker writes to, instead of the stack's.")
    ] = None,
    set_id: Annotated[str, typer.Option("--features", help="Id of the set to watch.")] = "mf1",
    file: File = None,
    directory: Directory = DEFAULT_DIRECTORY,
    once: Annotated[bool, typer.Option("--once", help="Show what there is now, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch one instrument's features as they change, with the state of its book and its worker's lag."""
    from feature_cache import logs  # noqa: PLC0415
    from feature_cache.store import watch as watching  # noqa: PLC0415
    from feature_cache.store.cluster import check_url  # noqa: PLC0415

    watched = _named(set_id, file, "--features")
    if watched.make is None and watched.feature_set.id != "mf1":
        raise typer.BadParameter(
            f"no worker computes {set_id}: its features are those of other sets, and what callers bring; watch mf1",
            param_hint="--features",
        )
    logs.configure("error", "features")  # what is printed is the features
    try:
        url = redis or stack_endpoint(directory, "redis_url", "--redis URL")
        check_url(url)
    except NoStackError as error:
        typer.echo(error, err=True)
        raise typer.Exit(3) from None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--redis") from error
    console = Console()
    once = once or not (as_json or console.is_terminal)
    try:
        shown = watching.watch(url, instrument, watched.feature_set, once=once, as_json=as_json, console=console)
        raise typer.Exit(asyncio.run(shown))
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@app.command("list")
def list_sets(file: File = None) -> None:
    """List the feature sets that are known here: of this product, of installed packages and of a file."""
    table = Table("set", "features", "its own", "from elsewhere", "origin", box=None)
    for one in _loaded(file):
        sources = sorted({feature.source for feature in one.feature_set.features} - {""})
        size, own = len(one.feature_set), len(one.own)
        table.add_row(one.feature_set.version, str(size), str(own), ", ".join(sources), escape(one.origin))
    Console().print(table)


@app.command()
def show(
    set_id: Annotated[str, typer.Argument(metavar="SET", help="Id of a set, for example mf1.")], file: File = None
) -> None:
    """Show the table of a feature set: names, units, ranges, what a sell does to a feature, and its source."""
    _print(_named(set_id, file, "SET"))


@app.command()
def check(
    what: Annotated[
        str,
        typer.Argument(
            metavar="FILE|SET",
            help="Python file with a list FEATURE_SETS, or the id of a set that is known here, for example ta1.",
        ),
    ],
    seconds: Annotated[
        float, typer.Option(min=0, max=3600, help="Of simulated market that computed sets are tried on; 0 for none.")
    ] = 90.0,
    file: File = None,
) -> None:
    """Check feature sets: show their tables, and try those that compute on a simulated market.

    A set must stay within its ranges, give the same values for the same events again, and leave events as they are.
    What it costs is shown. Exit code 1: something is wrong.
    """
    found = _of_file(Path(what)) if Path(what).name != what or "." in what else [_named(what, file, "SET")]
    for one in found:
        _print(one)
    tried = [_is_sound(one, seconds) for one in found if one.make is not None and seconds]
    raise typer.Exit(0 if all(tried) else 1)


def _of_file(path: Path) -> list[Registered]:
    """The sets of a file, if they go together with those of packages; ends the command if not."""
    from feature_cache import feature_sets  # noqa: PLC0415
    from feature_cache.feature_set import FeatureSetError  # noqa: PLC0415

    try:
        found = feature_sets.of_file(path)
        feature_sets.FeatureSets([*feature_sets.of_packages(), *found])
    except FeatureSetError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
    return found


def _is_sound(one: Registered, seconds: float) -> bool:
    """Tries a set and says what was found."""
    from feature_cache.worker import trial  # noqa: PLC0415

    found, name = trial.run(one, seconds), one.feature_set.version
    for problem in found.problems:
        typer.echo(f"{name}: {problem}", err=True)
    if not found.events:
        return False
    event, vector = (1e6 * one / found.events for one in (found.event_seconds, found.values_seconds))
    typer.echo(
        f"{name}: {found.events:,} events of {found.seconds:.0f} s; an event takes {event:.1f} µs and a vector"
        f" {vector:.1f} µs, the slowest call {1e3 * found.slowest_seconds:.1f} ms; one such instrument takes at most"
        f" {100 * found.core_share:.2g} % of a core"
    )
    if found.undefined and not found.problems:
        typer.echo(f"{name}: never defined in that time: {', '.join(found.undefined)}")
    return not found.problems


def _loaded(file: Path | None) -> FeatureSets:
    from feature_cache import feature_sets, logs  # noqa: PLC0415
    from feature_cache.feature_set import FeatureSetError  # noqa: PLC0415

    logs.configure("warning", "features")
    try:
        return feature_sets.load(file)
    except FeatureSetError as error:
        raise typer.BadParameter(str(error), param_hint="--file") from error


def _named(set_id: str, file: Path | None, hint: str) -> Registered:
    """The set of that id, of those that are known here."""
    sets = _loaded(file)
    found = sets.by_id(set_id)
    if found is None:
        known = ", ".join(one.feature_set.id for one in sets)
        raise typer.BadParameter(f"{set_id!r} is no set known here: {known}; --file names others", param_hint=hint)
    return found


def _print(one: Registered) -> None:
    feature_set = one.feature_set
    table = Table("", "feature", "unit", "range", "for a sell", "source", "meaning", box=None)
    table.title, table.title_justify = f"{feature_set.version}, {escape(one.origin)}", "left"
    for place, feature in enumerate(feature_set.features):
        source = feature.source or feature_set.id
        turned = "negated" if feature.signed else f"swapped with {feature.swapped_with}" if feature.swapped_with else ""
        unit, doc = escape(feature.unit), escape(feature.doc)  # "in [bps]" is no markup
        table.add_row(str(place), feature.name, unit, _range(feature), turned, source, doc)
    Console().print(table)


def _range(feature: Feature) -> str:
    lowest, highest = feature.lowest, feature.highest
    if math.isinf(lowest) and math.isinf(highest):
        return "any"
    if math.isinf(highest):
        return f"≥ {lowest:g}"
    return f"≤ {highest:g}" if math.isinf(lowest) else f"{lowest:g} to {highest:g}"
