"""`pretrade alerts`: what fires, and silences, which Alertmanager is asked for; and rules, which a server keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from pretrade.client.cli.alert_rules import rules_app
from pretrade.client.cli.options import UNREACHABLE, USER, AsJson, Author, Directory, seconds
from pretrade.client.stack_file import DEFAULT_DIRECTORY

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pretrade.client.cli.alertmanager import Alertmanager

ADDRESS: Final = "PRETRADE_ALERTMANAGER_URL"
_EXIT_CODES: Final = "Exit codes: 0 done; 1 Alertmanager refused; 2 wrong usage; 3 no Alertmanager could be reached."

alerts_app = typer.Typer(
    name="alerts",
    no_args_is_help=True,
    help="List the alerts that fire, silence some, end a silence, or define your own.",
)
alerts_app.add_typer(rules_app)
app = typer.Typer()
app.add_typer(alerts_app)

Address = Annotated[
    str | None, typer.Option("--alertmanager", metavar="URL", help="Instead of the stack's.", envvar=ADDRESS)
]


@alerts_app.command("list", epilog=_EXIT_CODES)
def list_(alertmanager: Address = None, directory: Directory = DEFAULT_DIRECTORY, as_json: AsJson = False) -> None:
    """List the alerts that fire, the most urgent first, and the silences with their ids."""
    import json

    from rich.console import Console

    with _connected(alertmanager, directory) as found:
        alerts, silences = found.alerts(), found.silences()
    if as_json:
        print(json.dumps({"alerts": alerts, "silences": silences}, indent=2))
        return
    console = Console()
    console.print(_alerts(alerts) if alerts else "no alert fires")
    if silences:
        console.print()
        console.print(_silences(silences))


@alerts_app.command(epilog=_EXIT_CODES)
def silence(
    which: Annotated[
        list[str],
        typer.Argument(
            metavar="WHICH...",
            help="Names of an alert, or conditions on its labels, all of which have to hold: ReplicaDown, "
            "replica=primary, 'instance=~server-[01].*'.",
        ),
    ],
    reason: Annotated[str, typer.Option(help="Why, for those who wonder.")],
    lasting: Annotated[float, typer.Option("--for", parser=seconds, metavar="TIME", help="How long: 90, 10m, 2h, 1d.")],
    author: Author = USER,
    alertmanager: Address = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """Tell nobody of some alerts for a while, and print the id of the silence. They go on being listed."""
    from datetime import UTC, datetime

    from pretrade.client.cli.alertmanager import Matcher

    try:
        matchers = [Matcher.parse(text) for text in which]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not reason.strip():
        raise typer.BadParameter("--reason must say why")
    with _connected(alertmanager, directory) as found:
        hit = len(found.matched(matchers))
        begin = datetime.now(UTC)
        made = found.silence(matchers, begin=begin, seconds=lasting, author=author, reason=reason)
    print(made)
    typer.echo(f"silences {hit} {'alert' if hit == 1 else 'alerts'} that fire now, and those to come", err=True)


@alerts_app.command(epilog=_EXIT_CODES)
def unsilence(
    silence: Annotated[str, typer.Argument(metavar="ID", help="Of the silence, as `pretrade alerts list` shows it.")],
    alertmanager: Address = None,
    directory: Directory = DEFAULT_DIRECTORY,
) -> None:
    """End a silence: people are told of its alerts again."""
    with _connected(alertmanager, directory) as found:
        found.unsilence(silence)


@contextmanager
def _connected(url: str | None, directory: Any) -> Iterator[Alertmanager]:
    """The Alertmanager at a URL, or of the stack in `directory`; turns failures into messages and exit codes."""
    from pretrade.client.cli.alertmanager import Alertmanager, AlertmanagerError, UnreachableError
    from pretrade.client.stack_file import NoStackError, stack_endpoint

    try:
        yield Alertmanager(url or stack_endpoint(directory, "alertmanager_url", f"--alertmanager URL, or {ADDRESS}"))
    except NoStackError as error:
        typer.echo(error, err=True)
        typer.echo("A stack has an Alertmanager after `pretrade up --alerts`.", err=True)
        raise typer.Exit(UNREACHABLE) from None
    except UnreachableError as error:
        typer.echo(error, err=True)
        raise typer.Exit(UNREACHABLE) from None
    except AlertmanagerError as error:
        typer.echo(f"Alertmanager refuses it: {error}", err=True)
        raise typer.Exit(1) from None


def _alerts(alerts: list[dict[str, Any]]) -> RenderableType:
    from pretrade.client.cli.alertmanager import by_urgency, moment, told
    from pretrade.client.cli.fitting import Rows

    rows = Rows("alert", "severity", "since (UTC)", "told", "what")
    for one in by_urgency(alerts):
        labels, what = one["labels"], one["annotations"].get("summary", "")
        rows.add(labels.get("alertname", "?"), labels.get("severity", ""), moment(one["startsAt"]), told(one), what)
    return rows


def _silences(silences: list[dict[str, Any]]) -> RenderableType:
    from pretrade.client.cli.alertmanager import matchers_of, moment
    from pretrade.client.cli.fitting import Rows

    rows = Rows("silence", "of", "until (UTC)", "by", "why")
    for one in sorted(silences, key=lambda each: each["endsAt"]):
        of = " ".join(map(str, matchers_of(one)))
        rows.add(one["id"], of, moment(one["endsAt"]), one["createdBy"], one["comment"])
    return rows
