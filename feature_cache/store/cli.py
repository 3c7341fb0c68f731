"""The command `features`: one instrument's features, read directly from Redis.

It needs the Redis client, so the command is part of `pretrade-server` and not of `pretrade`.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from rich.console import Console

from pretrade.client.cli.options import AsJson, Directory
from pretrade.client.stack_file import DEFAULT_DIRECTORY, NoStackError, stack_endpoint

app = typer.Typer()


@app.command()
def features(
    instrument: Annotated[str, typer.Argument(help="SYMBOL.VENUE, for example BTCUSDT.BINANCE.")],
    redis: Annotated[
        str | None, typer.Option(help="URL of the Redis that the worker writes to, instead of the stack's.")
    ] = None,
    directory: Directory = DEFAULT_DIRECTORY,
    once: Annotated[bool, typer.Option("--once", help="Show what there is now, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch one instrument's features as they change, with the state of its book and its worker's lag."""
    from feature_cache import logs  # noqa: PLC0415
    from feature_cache.store.cluster import check_url  # noqa: PLC0415
    from feature_cache.store.watch import watch  # noqa: PLC0415

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
        raise typer.Exit(asyncio.run(watch(url, instrument, once=once, as_json=as_json, console=console)))
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
