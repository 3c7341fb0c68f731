"""The command `decide`: asks a running server about one order. A client of the public gRPC API only.

Exit codes: 0 done; 1 the server refused; 2 wrong usage; 3 the server could not be reached; 7 the time was over.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand

from pretrade.client.cli.options import AsJson, Directory, Target
from pretrade.client.stack_file import DEFAULT_DIRECTORY

_NEGATIVE: Final = re.compile(r"-\.?\d")

_LOOKUPS: Final = "pretrade.lookups"
"""Group of the entry points by which `pretrade-server` says what only it knows."""

app = typer.Typer()


class SideName(enum.StrEnum):
    """Sides on the command line."""

    BUY = "buy"
    SELL = "sell"


class _Order(TyperCommand):
    """The command with an order's words: one that begins with a minus is a number and no option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads the arguments; refuses a negative quantity, which would be taken for an option, for what it is."""
        options = {name for param in self.params for name in param.opts if name.startswith("-")}
        for before, word in zip(["", *args], args, strict=False):
            if _NEGATIVE.match(word) and before not in options:
                ctx.fail(
                    f"{word} is negative: a quantity is a positive number, and `sell` or `buy` says the direction."
                )
        return super().parse_args(ctx, args)


@app.command(cls=_Order)
def decide(
    instrument: Annotated[str, typer.Argument(help="SYMBOL.VENUE, for example BTCUSDT.BINANCE.")],
    side: Annotated[SideName, typer.Argument(help="Side.")],
    quantity: Annotated[float, typer.Argument(help="Base-asset quantity.")],
    limit_price: Annotated[float | None, typer.Option("--limit", help="Limit price; none for a market order.")] = None,
    strategy: Annotated[str, typer.Option(help="Strategy that asks.")] = "cli",
    idempotency_key: Annotated[str, typer.Option("--key", help="Idempotency key.")] = "",
    reduce_only: Annotated[bool, typer.Option(help="The order only reduces an exposure.")] = False,
    feature: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="A feature that the order brings, for example urgency=0.9; repeatable."
        ),
    ] = None,
    feature_set: Annotated[
        str, typer.Option(metavar="SET", help="The feature set that these are of, where more than one has them.")
    ] = "",
    timeout_ms: Annotated[float, typer.Option(min=0.001, help="Deadline in milliseconds.")] = 1000.0,
    explain: Annotated[bool, typer.Option(help="Also explain the score.")] = False,
    target: Target = None,
    directory: Directory = DEFAULT_DIRECTORY,
    as_json: AsJson = False,
) -> None:
    """Decide one order: trade, no trade, or abstain."""
    import grpc
    from google.protobuf.json_format import MessageToJson
    from rich.console import Console

    from pretrade.client.cli.connection import RPC_SECONDS, connected
    from pretrade.client.cli.views import decision_table, explanation_table
    from pretrade.decision.v1 import decision_pb2, decision_pb2_grpc

    order = decision_pb2.Order(
        order_ref="cli",
        instrument=instrument,
        side=decision_pb2.SIDE_BUY if side is SideName.BUY else decision_pb2.SIDE_SELL,
        quantity=quantity,
        limit_price=limit_price,
        strategy=strategy,
        idempotency_key=idempotency_key,
        reduce_only=reduce_only,
    )
    if feature:
        order.features.CopyFrom(_brought(feature, feature_set))
    order.timeout.FromNanoseconds(round(timeout_ms * 1e6))  # exact: gRPC rounds the call's own up to milliseconds
    with connected(target, directory, "decision") as channel:
        grpc.channel_ready_future(channel).result(RPC_SECONDS)
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        request = decision_pb2.DecideRequest(order=order, explain=explain)
        response = stub.Decide(request, timeout=timeout_ms / 1e3)
    if as_json:
        print(MessageToJson(response if explain else response.decision, preserving_proto_field_name=True))
        return
    Console().print(decision_table(response.decision))
    if explain:
        Console().print(explanation_table(response.explanation))


def _brought(words: Sequence[str], feature_set: str) -> Any:
    """The features that these words, each `NAME=VALUE`, bring. Raises typer.BadParameter."""
    from pretrade.decision.v1 import decision_pb2

    given = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            given[name.strip()] = float(value)
        except ValueError:
            raise typer.BadParameter(
                f"{word!r} is not NAME=VALUE, for example urgency=0.9", param_hint="--feature"
            ) from None
    lookup = next(iter(entry_points(group=_LOOKUPS, name="vector_of")), None)
    if lookup is None:
        raise typer.BadParameter(
            "the names of features are known where pretrade-server is installed, and it is not installed here",
            param_hint="--feature",
        )
    try:
        set_id, values = lookup.load()(given, feature_set)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--feature") from error
    return decision_pb2.FeatureVector(feature_set_id=set_id, values=values)
