"""The console, `pretrade console`: its pages in a browser."""

from __future__ import annotations

import os
import secrets
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from local.stack.errors import NotReadyError
from local.stack.parts import server
from local.stack.ports import LOOPBACK
from pretrade.client import credential_variables
from pretrade.client.cli.alerts import ADDRESS as ALERTMANAGER
from pretrade.client.stack_file import Endpoints
from pretrade.console.sealing import KEY_BYTES
from server.security.private import write_private

_OWN: Final = "PRETRADE_CONSOLE_"
"""Settings of a console that a person starts, which are not for this one."""


def url(port: int) -> str:
    """Where it is served."""
    return f"http://{LOOPBACK}:{port}"


def write_key(path: Path) -> None:
    """Makes what links are sealed with that log in, for our eyes only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private(path, secrets.token_hex(KEY_BYTES))


def argv(endpoints: Endpoints, port: int) -> list[str]:
    """Runs it on this port of the loopback interface."""
    assert endpoints.admin is not None
    assert endpoints.console_key_file is not None
    where = ["--target", endpoints.admin, "--host", LOOPBACK, "--port", str(port)]
    return [sys.executable, "-m", "local", "console", *where, "--link-key", endpoints.console_key_file]


def env(endpoints: Endpoints) -> Mapping[str, str]:
    """Its environment: ours, with the credentials that a person's command would show."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OWN)}
    token_file = server.admin_credentials(endpoints).token_file
    shown = {} if token_file is None else {credential_variables.TOKEN_FILE: str(token_file)}
    alertmanager = {} if endpoints.alertmanager_url is None else {ALERTMANAGER: endpoints.alertmanager_url}
    return inherited | shown | alertmanager


def ready(port: int) -> None:
    """Asks whether it serves.

    Raises:
        NotReadyError: It does not, or not yet.
    """
    try:
        with urllib.request.urlopen(f"{url(port)}/health", timeout=2.0):  # noqa: S310 - a fixed http URL
            pass
    except OSError as error:
        raise NotReadyError(str(error)) from error
