"""The command `console`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from pretrade.client.addresses import is_loopback
from pretrade.client.cli.alerts import Address
from pretrade.client.cli.options import ADMIN_TARGET, UNREACHABLE, AdminTarget, Directory
from pretrade.client.stack_file import DEFAULT_DIRECTORY, Endpoints, NoStackError, running_stack, stack_endpoint

if TYPE_CHECKING:
    from pretrade.client.cli.alertmanager import Alertmanager

PORT: Final = 7020
_OIDC: Final = "Login by OpenID Connect"
_ONCE: Final = "The link logs you in once."
_LIBRARIES: Final = ("authlib", "httpx2", "jinja2", "markdown_it", "starlette", "uvicorn")
"""What the extra `console` brings."""

app = typer.Typer()


@app.command(
    epilog="Exit codes: 0 stopped; 1 the port is taken; 2 wrong usage; 3 no server was named and no stack runs."
)
def console(
    target: AdminTarget = None,
    directory: Directory = DEFAULT_DIRECTORY,
    host: Annotated[
        str, typer.Option(envvar="PRETRADE_CONSOLE_HOST", help="Address to listen on. Beyond loopback it needs TLS.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            envvar="PRETRADE_CONSOLE_PORT",
            min=0,
            max=65_535,
            help="Port to listen on; 0: any free one.",
            show_default=str(PORT),
        ),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(envvar="PRETRADE_CONSOLE_CERTIFICATE", help="Certificate that browsers are shown, in PEM."),
    ] = None,
    private_key: Annotated[
        Path | None, typer.Option(envvar="PRETRADE_CONSOLE_PRIVATE_KEY", help="The certificate's private key, in PEM.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A name by which browsers call the console, besides localhost; can be repeated."
        ),
    ] = None,
    public_url: Annotated[
        str,
        typer.Option(
            metavar="URL",
            envvar="PRETRADE_CONSOLE_PUBLIC_URL",
            help="The URL by which browsers call the console, where a proxy is in front of it that ends TLS: "
            "https://console.example.com.",
        ),
    ] = "",
    open_to_network: Annotated[
        bool,
        typer.Option(
            "--open-to-network",
            envvar="PRETRADE_CONSOLE_OPEN_TO_NETWORK",
            help="Listen beyond loopback without TLS. Only where nobody else is on the network between the console and "
            "the proxy, or the container's published port on loopback.",
        ),
    ] = False,
    alertmanager: Address = None,
    oidc_issuer: Annotated[
        str,
        typer.Option(
            metavar="URL",
            envvar="PRETRADE_CONSOLE_OIDC_ISSUER",
            help="Let people log in at this OpenID provider, whose tokens the server takes.",
            rich_help_panel=_OIDC,
        ),
    ] = "",
    oidc_client_id: Annotated[
        str,
        typer.Option(
            envvar="PRETRADE_CONSOLE_OIDC_CLIENT_ID",
            help="As which client the provider knows the console.",
            rich_help_panel=_OIDC,
        ),
    ] = "pretrade-console",
    oidc_client_secret_file: Annotated[
        Path | None,
        typer.Option(
            envvar="PRETRADE_CONSOLE_OIDC_CLIENT_SECRET_FILE",
            help="That client's secret, in a file; none for a public client.",
            rich_help_panel=_OIDC,
        ),
    ] = None,
    oidc_scope: Annotated[
        str,
        typer.Option(
            envvar="PRETRADE_CONSOLE_OIDC_SCOPE",
            help="What is asked for, with spaces between: what makes the provider give out tokens for the server, and "
            "offline_access where it gives refresh tokens only then.",
            rich_help_panel=_OIDC,
        ),
    ] = "openid",
    link_key: Annotated[
        Path | None, typer.Option(hidden=True, help="A file with what others seal links with that log in.")
    ] = None,
) -> None:
    """Serve the console: pages for on-call and compliance, in a browser, until Ctrl-C.

    People log in with the tokens that this command line takes, and may do there what their roles allow. The command
    prints a link that logs you in once with your own credentials. Where `pretrade up` serves a console already, it
    prints a link to that one and ends, unless you name a port or a server.
    """
    if target is None and port is None and (served := _of_the_stack(directory)):
        typer.echo(f"console: {served}\n{_ONCE} The stack serves the console.")
        return
    if (certificate is None) != (private_key is None):
        raise typer.BadParameter("--certificate and --private-key go together")
    if certificate is None and not is_loopback(host) and not open_to_network:
        raise typer.BadParameter(
            f"--host {host}: beyond loopback tokens would travel in the open. Give --certificate and --private-key, or "
            "--open-to-network where a proxy of yours ends TLS"
        )
    import asyncio

    from pretrade.client.cli.connection import credentials
    from pretrade.client.errors import CredentialsError

    try:
        from pretrade.console.oidc import OidcSettings
        from pretrade.console.reach import Reach
        from pretrade.console.serving import serve
    except ModuleNotFoundError as error:
        if error.name not in _LIBRARIES:
            raise
        raise SystemExit(f"{error.name} is missing: pip install 'pretrade[console]'") from error
    try:
        reach = Reach.of(
            listens_on=host, names=allow_host or (), public_url=public_url, has_tls=certificate is not None
        )
    except ValueError as error:
        raise typer.BadParameter(f"--public-url: {error}") from None
    try:
        secret = "" if oidc_client_secret_file is None else oidc_client_secret_file.read_text().strip()
        oidc = OidcSettings.checked(oidc_issuer, oidc_client_id, secret, oidc_scope) if oidc_issuer else None
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"OpenID Connect: {error}") from None
    try:
        address = target or stack_endpoint(directory, "admin", f"--target HOST:PORT, or {ADMIN_TARGET}")
        shown = credentials(address, directory, admin=True)
        # A token is never sent in the open: said here, and not to the first who logs in.
        shown.with_changes({"token": "none"}).plain_channel(address, []).close()
        tls = None if certificate is None or private_key is None else (certificate, private_key)
        key = None if link_key is None else link_key.read_bytes()
        listened = PORT if port is None else port
        asyncio.run(
            serve(
                address,
                shown,
                host=host,
                port=listened,
                reach=reach,
                tls=tls,
                link_key=key,
                oidc=oidc,
                alertmanager=_alertmanager(alertmanager, address, directory),
                announce=_announce,
            )
        )
    except NoStackError as error:
        typer.echo(error, err=True)
        raise typer.Exit(UNREACHABLE) from None
    except CredentialsError as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        typer.echo(f"cannot listen on {host}:{PORT if port is None else port}: {error}. Another port: --port", err=True)
        raise typer.Exit(1) from None


def _announce(url: str) -> None:
    typer.echo(f"console: {url}")
    if "ticket" in url:
        typer.echo(f"{_ONCE} Ctrl-C stops the console.")


def _alertmanager(url: str | None, address: str, directory: Path) -> Alertmanager | None:
    """The Alertmanager that was named; else that of the stack whose server is at `address`, if there is one."""
    if url is None:
        with contextlib.suppress(NoStackError):
            endpoints = running_stack(directory).endpoints
            url = endpoints.alertmanager_url if endpoints.admin == address else None
    from pretrade.client.cli.alertmanager import Alertmanager

    return None if url is None else Alertmanager(url)


def _of_the_stack(directory: Path) -> str:
    """A link to the console of the stack that runs in `directory`; empty without one."""
    try:
        return login_link(running_stack(directory).endpoints)
    except NoStackError:
        return ""


def login_link(endpoints: Endpoints) -> str:
    """A link that logs whoever opens it in to a stack's console, once and within ten minutes; empty without one."""
    if endpoints.console_url is None or endpoints.console_key_file is None:
        return ""
    import time

    from pretrade.console.tickets import link

    return link(f"{endpoints.console_url}/", Path(endpoints.console_key_file).read_bytes(), time.time())
