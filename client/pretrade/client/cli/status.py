"""The command `status`: what a running server says of itself. A client of the public gRPC API only."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from pretrade.client.cli.change_options import EXIT_CODES
from pretrade.client.cli.options import AdminTarget, AsJson, Directory
from pretrade.client.stack_file import DEFAULT_DIRECTORY

_REFRESH_SECONDS: Final = 0.5

app = typer.Typer()


@app.command(epilog=EXIT_CODES)
def status(
    target: AdminTarget = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: AsJson = False,
    watch: Annotated[
        bool | None,
        typer.Option("--watch/--once", help="Keep refreshing; the default on a terminal that has room for it."),
    ] = None,
    wide: Annotated[
        bool, typer.Option("--wide", help="Also show the version and the sequence of vectors, and the workers.")
    ] = False,
) -> None:
    """Show the worst thing now, and replicas, features, flags, the audit journal and the canary."""
    import sys
    import time

    from google.protobuf.json_format import MessageToJson
    from rich.console import Console, Group
    from rich.live import Live

    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.connection import RPC_SECONDS, connected
    from pretrade.client.cli.views import CHANGES_SHOWN, History, status_view

    with connected(target, directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)

        def ask() -> admin_pb2.GetStatusResponse:
            return stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=RPC_SECONDS)

        def view(found: admin_pb2.GetStatusResponse) -> Group:
            if found.HasField("canary"):
                evidence = stub.GetCanary(admin_pb2.GetCanaryRequest(), timeout=RPC_SECONDS)
                found.canary.CopyFrom(evidence.canary)
            return status_view(found, wide=wide)

        if as_json:
            print(MessageToJson(ask(), always_print_fields_with_no_presence=True))
            return
        console, first = Console(), view(ask())
        fits = len(console.render_lines(first, pad=False)) + CHANGES_SHOWN < console.height
        if not (sys.stdout.isatty() and fits if watch is None else watch):
            console.print(first)  # a live view would cut off what is below the terminal's last line
            return
        history = History()
        with Live(first, console=console, refresh_per_second=4) as live:
            while True:
                found = ask()
                history.add(time.monotonic(), found, stub)
                live.update(Group(view(found), history.view()))
                time.sleep(_REFRESH_SECONDS)
