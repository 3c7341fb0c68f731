"""`pretrade models list`, `load` and `alias`: the versions that a running server sees, as clients of `AdminService`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Final

import typer

from pretrade.client.cli.change_options import EXIT_CODES, REASON, How
from pretrade.client.cli.option_groups import spreads_options
from pretrade.client.cli.options import (
    DEFAULT_MODEL,
    USER,
    AdminTarget,
    AsJson,
    Author,
    Directory,
    DryRun,
    Model,
    Reason,
    every_order_of,
)
from pretrade.client.stack_file import DEFAULT_DIRECTORY

if TYPE_CHECKING:
    from pretrade.admin.v1 import admin_pb2

LOAD_SECONDS: Final = 180.0
"""A version may have to be loaded, warmed up and checked on two replicas."""

app = typer.Typer()

Version = Annotated[str, typer.Argument(help="A version of `pretrade models list`, or an alias.")]


def dry(change: admin_pb2.Change) -> str:
    """What is added to a line about a change that was only tried."""
    return "  (dry run: nothing was changed)" if change.dry_run else ""


@app.command("list", epilog=EXIT_CODES)
def list_models(target: AdminTarget = None, directory: Directory = DEFAULT_DIRECTORY, as_json: AsJson = False) -> None:
    """List every version in the registry, the newest first, with its aliases and where it is loaded."""
    from google.protobuf.json_format import MessageToJson

    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.connection import connected

    with connected(target, directory, "admin") as channel:
        found = admin_pb2_grpc.AdminServiceStub(channel).ListModels(admin_pb2.ListModelsRequest(), timeout=LOAD_SECONDS)
    if as_json:
        print(MessageToJson(found, always_print_fields_with_no_presence=True))
        return
    _print_models(found.models)


@app.command(epilog=EXIT_CODES)
def load(
    version: Version,
    replica: Annotated[
        list[str] | None, typer.Option(help="Load it into this one; can be repeated. [primary and secondary]")
    ] = None,
    model: Model = DEFAULT_MODEL,
    author: Author = USER,
    reason: Reason = REASON,
    dry_run: DryRun = False,
    target: AdminTarget = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: AsJson = False,
) -> None:
    """Load a version beside what is served, warm it up and check its canned scores. It gets no orders by that."""
    from google.protobuf.json_format import MessageToJson

    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.connection import connected

    request = admin_pb2.LoadModelRequest(
        model_version=version, replicas=replica or (), model=model, author=author, reason=reason, dry_run=dry_run
    )
    with connected(target, directory, "admin") as channel:
        response = admin_pb2_grpc.AdminServiceStub(channel).LoadModel(request, timeout=LOAD_SECONDS)
    if as_json:
        print(MessageToJson(response))
    else:
        print("\n".join(response.change.diff) + dry(response.change))
        _print_models([response.model])


@app.command(epilog=EXIT_CODES)
@spreads_options
def alias(
    name: Annotated[str, typer.Argument(help="champion, challenger, previous or candidate.")],
    version: Version,
    model: Model = DEFAULT_MODEL,
    *,
    how: How,
) -> None:
    """Point an alias at a version. That of the champion makes the version decide every order, without a canary."""
    from google.protobuf.json_format import MessageToJson

    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.changing import changed
    from pretrade.client.cli.connection import connected

    def risk(would: admin_pb2.SetModelAliasResponse) -> str:
        request.model_version = would.model.model_version  # as in `start`
        return f"{would.model.model_version} then decides {every_order_of(model)}, without having been a canary."

    request = admin_pb2.SetModelAliasRequest(alias=name, model_version=version, model=model)
    with connected(how.target, how.directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        response = changed(
            stub.SetModelAlias, request, how, risk if name == "champion" else "", rpc_seconds=LOAD_SECONDS
        )
    if how.as_json:
        print(MessageToJson(response))
    else:
        print("\n".join(response.change.diff) + dry(response.change))


def _print_models(models: Iterable[admin_pb2.ModelVersion]) -> None:
    """Two lines a model, three if it expires, for 80 columns, and where the champion's card is."""
    import datetime as dt

    from rich.console import Console

    from pretrade.client.cli.model_lines import standing_line
    from pretrade.client.cli.views import local_time

    console = Console()
    champions = []
    for model in models:
        loaded = f"on {', '.join(model.loaded_on)}" if model.loaded_on else "not loaded"
        line = f"{model.model_version}  {', '.join(model.aliases) or '–':<10}  {model.kind:<7}  {loaded}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        written = local_time(model.created_at.ToDatetime(dt.UTC))[:16]
        style = "red" if model.problem else "dim"
        console.print(
            f"{'':4}{written}  {model.problem or model.standing}",
            highlight=False,
            markup=False,
            soft_wrap=True,
            style=style,
        )
        if model.HasField("expires_at"):
            until = model.expires_at.ToDatetime()
            console.print(f"{'':4}may decide on markets until {until:%Y-%m-%d %H:%M} UTC", highlight=False, style="dim")
        if "champion" in model.aliases:
            champions.append(model)
    for model in champions:
        line = standing_line(model.model_version, model.standing, model.card)
        console.print(line, highlight=False, soft_wrap=True)
