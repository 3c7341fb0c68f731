"""`pretrade alerts rules`: alerts that users define, as a client of `AdminService`; Prometheus evaluates them."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from pretrade.client.cli.change_options import EXIT_CODES, How
from pretrade.client.cli.option_groups import spreads_options
from pretrade.client.cli.options import AdminTarget, AsJson, Directory, seconds
from pretrade.client.stack_file import DEFAULT_DIRECTORY

if TYPE_CHECKING:
    import grpc
    from google.protobuf.duration_pb2 import Duration

    from pretrade.admin.v1 import admin_pb2

_RELOAD_SECONDS: Final = 10.0
"""How long Prometheus may take to read its files."""

rules_app = typer.Typer(
    name="rules", no_args_is_help=True, help="List the alerts that users defined, set or delete one, or write them."
)


class ActionName(enum.StrEnum):
    """Actions on the command line."""

    TRADE = "trade"
    NO_TRADE = "no_trade"
    ABSTAIN = "abstain"


class SeverityName(enum.StrEnum):
    """Severities on the command line."""

    PAGE = "page"
    TICKET = "ticket"


@rules_app.command("list")
def list_(target: AdminTarget = None, directory: Directory = DEFAULT_DIRECTORY, as_json: AsJson = False) -> None:
    """List the alert rules that users set."""
    from google.protobuf.json_format import MessageToJson

    from pretrade.client.cli.connection import connected

    with connected(target, directory, "admin") as channel:
        found = _found(channel)
    if as_json:
        print(MessageToJson(found, always_print_fields_with_no_presence=True))
        return
    for line in map(in_words, found.rules):
        print(line)
    if not found.rules:
        print("no alert rule of a user")


@rules_app.command("set", epilog=EXIT_CODES)
@spreads_options
def set_(
    name: Annotated[str, typer.Argument(help="Of the rule, in lower case; one of this name is replaced.")],
    share: Annotated[ActionName | None, typer.Option(help="Of decisions, the share that had this action.")] = None,
    strategy: Annotated[str, typer.Option(help="Decisions of this strategy. Default: all.")] = "",
    window_seconds: Annotated[
        float, typer.Option("--window", parser=seconds, metavar="TIME", help="Over which the share is taken.")
    ] = 300.0,
    feature: Annotated[str, typer.Option(help="The value of this feature of the set mf1.")] = "",
    instrument: Annotated[str, typer.Option(help="Of this instrument. Default: each by itself.")] = "",
    above: Annotated[float | None, typer.Option(help="While it is greater than this.")] = None,
    below: Annotated[float | None, typer.Option(help="While it is less than this.")] = None,
    for_seconds: Annotated[
        float | None, typer.Option("--for", parser=seconds, metavar="TIME", help="How long it has to hold.")
    ] = None,
    cooldown_seconds: Annotated[
        float | None,
        typer.Option("--cooldown", parser=seconds, metavar="TIME", help="How long the alert outlasts its condition."),
    ] = None,
    severity: Annotated[SeverityName, typer.Option(help="How urgent it is.")] = SeverityName.TICKET,
    *,
    how: How,
) -> None:
    """Set one alert: on the share of an action among decisions, or on the value of a feature.

    For example `pretrade alerts rules set twap-trades --share trade --strategy twap --above 0.9 --for 5m`.
    """
    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.changing import changed, show
    from pretrade.client.cli.connection import connected

    rule = admin_pb2.AlertRule(name=name, severity=severity)
    if (share is None) == (not feature):
        raise typer.BadParameter("give either --share or --feature")
    if (above is None) == (below is None):
        raise typer.BadParameter("give either --above or --below")
    if share is not None:
        if instrument:
            raise typer.BadParameter("--instrument belongs to --feature")
        window = _duration(window_seconds)
        rule.share.CopyFrom(admin_pb2.DecisionShare(action=share.name, strategy=strategy, window=window))
    else:
        if strategy:
            raise typer.BadParameter("--strategy belongs to --share")
        rule.feature.CopyFrom(admin_pb2.FeatureValue(name=feature, instrument=instrument))
    if above is not None:
        rule.above = above
    if below is not None:
        rule.below = below
    if for_seconds is not None:
        rule.lasting.CopyFrom(_duration(for_seconds))
    if cooldown_seconds is not None:
        rule.cooldown.CopyFrom(_duration(cooldown_seconds))
    with connected(how.target, how.directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        response = changed(stub.SetAlertRule, admin_pb2.SetAlertRuleRequest(rule=rule), how)
    show(response, response.change, as_json=how.as_json)


@rules_app.command(epilog=EXIT_CODES)
@spreads_options
def delete(name: Annotated[str, typer.Argument(help="Of the rule.")], *, how: How) -> None:
    """Delete one alert rule."""
    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.changing import changed, show
    from pretrade.client.cli.connection import connected

    with connected(how.target, how.directory, "admin") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        response = changed(stub.DeleteAlertRule, admin_pb2.DeleteAlertRuleRequest(name=name), how)
    show(response, response.change, as_json=how.as_json)


@rules_app.command()
def write(
    file: Annotated[Path, typer.Argument(help="A rules file that Prometheus reads.")],
    every_seconds: Annotated[
        float | None,
        typer.Option("--every", parser=seconds, metavar="TIME", help="Go on, and look this often. Default: once."),
    ] = None,
    prometheus: Annotated[
        str | None, typer.Option(metavar="URL", help="Has this Prometheus read its files again when they differ.")
    ] = None,
    kubernetes: Annotated[bool, typer.Option("--kubernetes", help="As a PrometheusRule of its operator.")] = False,
    target: AdminTarget = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """Write the alert rules that users set as a rules file of Prometheus, and have it read them.

    With `--every` it goes on for ever. The last file stays while the server cannot be reached.
    """
    import sys
    import time

    from pretrade.client.cli.connection import connected

    unread = prometheus is not None  # it may have been started before the file was written
    failed = ""
    while True:
        try:
            with connected(target, directory, "admin") as channel:
                text = _found(channel).rules_file
            if _replace(file, _wrapped(text) if kubernetes else text):
                unread = prometheus is not None
            if unread and prometheus is not None:
                _reload(prometheus)
                unread = False
            failed = ""
        except OSError as error:
            if every_seconds is None:
                typer.echo(error, err=True)
                raise typer.Exit(1) from None
            if str(error) != failed:
                print(f"{error}; trying again", file=sys.stderr, flush=True)
            failed = str(error)
        except typer.Exit as error:
            if every_seconds is None or not error.exit_code:
                raise
        if every_seconds is None:
            return
        time.sleep(every_seconds)


def in_words(rule: admin_pb2.AlertRule) -> str:
    """A rule in one line."""
    return f"{rule.name}: {rule.severity} while {condition(rule)}"


def condition(rule: admin_pb2.AlertRule) -> str:
    """What a rule waits for, in words."""
    if rule.HasField("share"):
        whose = f"strategy {rule.share.strategy}" if rule.share.strategy else "all strategies"
        what = f"{rule.share.action} share of {whose} over {rule.share.window.seconds} s"
    else:
        what = f"{rule.feature.name} of {rule.feature.instrument or 'each instrument'}"
    crosses = f"above {rule.above:g}" if rule.HasField("above") else f"below {rule.below:g}"
    lasting = f" for {rule.lasting.seconds} s" if rule.lasting.seconds else ""
    cooldown = f", then for another {rule.cooldown.seconds} s" if rule.cooldown.seconds else ""
    return f"{what} is {crosses}{lasting}{cooldown}"


def _found(channel: grpc.Channel) -> admin_pb2.ListAlertRulesResponse:
    from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
    from pretrade.client.cli.connection import RPC_SECONDS

    stub = admin_pb2_grpc.AdminServiceStub(channel)
    return stub.ListAlertRules(admin_pb2.ListAlertRulesRequest(), timeout=RPC_SECONDS)


def _duration(whole: float) -> Duration:
    from google.protobuf.duration_pb2 import Duration

    duration = Duration()
    duration.FromNanoseconds(int(whole * 1e9))
    return duration


def _replace(file: Path, text: str) -> bool:
    """Writes a file as a whole unless it is as it should be; True when it was written.

    Raises:
        OSError: It cannot be written.
    """
    if file.is_file() and file.read_text() == text:
        return False
    new = file.with_name(f".{file.name}.new")
    new.write_text(text)
    new.replace(file)
    return True


def _wrapped(text: str) -> str:
    """A rules file as an object of the Prometheus operator, in JSON, which is YAML."""
    import json

    spec: Any = json.loads(text)
    head = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": {"name": "pretrade-user"}}
    return f"{json.dumps(head | {'spec': spec}, indent=2)}\n"


def _reload(prometheus: str) -> None:
    """Has Prometheus read its files.

    Raises:
        OSError: It cannot be reached, or refuses them.
    """
    import urllib.error
    import urllib.request

    # The address is the user's.
    request = urllib.request.Request(f"{prometheus.rstrip('/')}/-/reload", method="POST")  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_RELOAD_SECONDS):  # noqa: S310
            pass
    except urllib.error.HTTPError as error:
        raise OSError(f"Prometheus does not take its files: {error.read().decode(errors='replace').strip()}") from error
    except urllib.error.URLError as error:
        raise OSError(f"Prometheus at {prometheus} cannot be reached: {error.reason}") from error
