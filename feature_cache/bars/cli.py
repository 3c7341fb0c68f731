"""The command `bars`: an instrument's bars as `python -m feature_cache.bars` keeps them.

It needs the database's client, so the command is part of `pretrade-server` and not of `pretrade`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from pretrade.client.cli.options import UNREACHABLE, AsJson, Directory
from pretrade.client.stack_file import DEFAULT_DIRECTORY, NoStackError, stack_endpoint

VARIABLE: Final = "PRETRADE_BARS_DATABASE_URL"
_LOOK_SECONDS: Final = 0.5
_SHOWN: Final = ("open", "high", "low", "close", "vwap", "trades", "volume", "buy_volume", "sell_volume", "mid_close")

app = typer.Typer()


@app.command()
def bars(
    instrument: Annotated[str, typer.Argument(help="SYMBOL.VENUE, for example BTCUSDT.BINANCE.")],
    interval: Annotated[str, typer.Option(help="1s, 10s, 1m or 5m.")] = "10s",
    count: Annotated[int, typer.Option("--last", "-n", min=1, max=100_000, help="How many bars.")] = 20,
    database: Annotated[
        str, typer.Option(envvar=VARIABLE, help="URL of the database that keeps the bars, instead of the stack's.")
    ] = "",
    directory: Directory = DEFAULT_DIRECTORY,
    tail: Annotated[bool, typer.Option("--tail", help="Go on: print each bar when it has ended.")] = False,
    chart: Annotated[Path | None, typer.Option(help="Draw the bars into this SVG or PNG file instead.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show an instrument's last bars: prices, volume, trades, and what a bar lacks. `--tail` goes on with each new one.

    Bars are kept by `pretrade up --bars`, or by `python -m feature_cache.bars`; docs/bars.md says more.
    """
    from feature_cache.bars.bar import INTERVALS  # noqa: PLC0415
    from feature_cache.bars.store import BarStore, BarStoreError  # noqa: PLC0415

    if interval not in INTERVALS:
        raise typer.BadParameter(f"{interval!r} must be one of {', '.join(INTERVALS)}", param_hint="--interval")
    try:
        store = BarStore(database or stack_endpoint(directory, "database_url", f"--database URL, or {VARIABLE}"))
    except NoStackError as error:
        typer.echo(error, err=True)
        raise typer.Exit(UNREACHABLE) from None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--database") from error
    try:
        rows = store.last(instrument, interval, count)
        if not rows:
            known = ", ".join(store.instruments()) or "none; does the keeper of bars run (`pretrade up --bars`)?"
            typer.echo(f"There are no bars of {instrument}. Instruments with bars: {known}", err=True)
            raise typer.Exit(1)
        if chart is not None:
            _draw(chart, instrument, interval, rows)
            return
        _print(rows, as_json, header=True)
        while tail:
            time.sleep(_LOOK_SECONDS)
            if news := store.after(instrument, interval, rows[-1]["start"]):
                rows = news
                _print(rows, as_json, header=False)
    except BarStoreError as error:
        typer.echo(f"The database of bars cannot be used: {error}", err=True)
        raise typer.Exit(UNREACHABLE) from None
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
    finally:
        store.close()


def _print(rows: list[dict[str, Any]], as_json: bool, *, header: bool) -> None:
    from feature_cache.bars.store import lacks_of  # noqa: PLC0415

    if as_json:
        for row in rows:
            print(json.dumps(row | {"start": row["start"].isoformat(), "lacks": lacks_of(row)}), flush=True)
        return
    table = Table(box=None, show_header=header, padding=(0, 1))
    table.add_column("start, UTC", min_width=19, no_wrap=True)
    for name in _SHOWN:
        table.add_column(name.replace("_", " "), justify="right", min_width=11, no_wrap=True)
    table.add_column("lacks", min_width=22, no_wrap=True)
    for row in rows:
        cells = ["" if row[name] is None else f"{row[name]:,.10g}" for name in _SHOWN]
        table.add_row(f"{row['start']:%Y-%m-%d %H:%M:%S}", *cells, lacks_of(row))
    console = Console()
    # As wide as it is: a line that is cut or folded is no figure any more.
    Console(width=max(console.width, 180)).print(table)


def _draw(path: Path, instrument: str, interval: str, rows: list[dict[str, Any]]) -> None:
    if path.suffix not in {".svg", ".png"}:
        raise typer.BadParameter(f"{path} must end with .svg or .png", param_hint="--chart")
    try:
        from feature_cache.bars.chart import draw  # noqa: PLC0415
    except ImportError:
        typer.echo("A chart needs matplotlib: pip install 'pretrade-server[plots]'", err=True)
        raise typer.Exit(1) from None
    try:
        draw(path, f"{instrument}, {interval}", rows)
    except OSError as error:
        typer.echo(f"{path} cannot be written: {error.strerror}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{len(rows)} bars in {path}")
