"""`pretrade models map`: which named model decides which orders, as a client of `AdminService`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Final

import typer

from pretrade.client.cli.change_options import EXIT_CODES, How
from pretrade.client.cli.option_groups import spreads_options
from pretrade.client.cli.options import For

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pretrade.admin.v1 import admin_pb2

_FORM: Final = "[INSTRUMENT][:STRATEGY]=MODEL"

app = typer.Typer()


@app.command("map", epilog=EXIT_CODES)
@spreads_options
def map_models(
    rules: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=f"[{_FORM}]...",
            help="The whole map, in the order in which rules are tried. Patterns are those of a shell; one left "
            "out stands for all. Without any: show the map.",
        ),
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(metavar=_FORM, help="Put this rule before those that there are; can be repeated."),
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar=_FORM, help="Take this rule out; can be repeated.")
    ] = None,
    default: Annotated[bool, typer.Option("--default", help="Take all rules out.")] = False,
    expires_in_seconds: For = None,
    *,
    how: How,
) -> None:
    """Show which model decides which orders, or set it. The first rule that fits an order holds. Asks first.

    An order that no rule fits is decided by the model `default`. For example
    `pretrade models map --add "BTC*:sweep-?=scalper"`.
    """
    from google.protobuf.json_format import MessageToJson

    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.changing import changed, show
    from pretrade.client.cli.connection import RPC_SECONDS, connected

    if sum(map(bool, (rules, add or remove, default))) > 1:
        raise typer.BadParameter("either the whole map, or --add and --remove, or --default")
    given, more, less = (_rules(texts or ()) for texts in (rules, add, remove))
    with connected(how.target, how.directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        found = stub.GetModelMap(admin_pb2.GetModelMapRequest(), timeout=RPC_SECONDS)
        if not (rules or add or remove or default):
            print(MessageToJson(found, always_print_fields_with_no_presence=True) if how.as_json else _shown(found))
            return
        if add or remove:
            given = _changed_rules(found.rules, more, less)
            if how.expect is None:
                how = replace(how, expect=found.control_version)  # what was read is what is changed
        request = admin_pb2.SetModelMapRequest(rules=given)
        risk = "Orders under way keep their model; all others are decided by the model that the map then names."
        response = changed(stub.SetModelMap, request, how, risk, expires_in_seconds)
    show(response, response.change, as_json=how.as_json)


def _rules(texts: Iterable[str]) -> list[admin_pb2.ModelMapRule]:
    from pretrade.admin.v1 import admin_pb2

    rules = []
    for text in texts:
        patterns, equals, model = text.rpartition("=")
        if not equals or not model:
            raise typer.BadParameter(f"{text!r} is no rule: it must look like {_FORM}")
        instrument, _, strategy = patterns.partition(":")
        rules.append(admin_pb2.ModelMapRule(instrument=instrument or "*", strategy=strategy or "*", model=model))
    return rules


def _changed_rules(
    before: Iterable[admin_pb2.ModelMapRule],
    added: Sequence[admin_pb2.ModelMapRule],
    removed: Sequence[admin_pb2.ModelMapRule],
) -> list[admin_pb2.ModelMapRule]:
    """The rules after a change; a rule that is added takes the place of one with the same patterns."""
    standing = list(before)
    if unknown := [one for one in removed if one not in standing]:
        raise typer.BadParameter(f"no rule {', '.join(map(_text, unknown))}: `pretrade models map` shows them")
    replaced = [(one.instrument, one.strategy) for one in added]
    kept = [one for one in standing if one not in removed and (one.instrument, one.strategy) not in replaced]
    return [*added, *kept]


def _text(rule: admin_pb2.ModelMapRule) -> str:
    return f"{rule.instrument}:{rule.strategy}={rule.model}"


def _shown(found: admin_pb2.GetModelMapResponse) -> str:
    """The map and the models, a line each."""
    lines = [*map(_text, found.rules), "*:*=default (always last)"]
    for model in found.models:
        champion = model.champion_version or "no champion yet"
        known = f", {model.feature_set}" if model.feature_set else ""
        lines.append(f"model {model.name}: {champion}{known}, {'available' if model.available else 'NOT AVAILABLE'}")
    return "\n".join((*lines, f"control state: version {found.control_version}"))
