"""Writes the alert rules that users set where Prometheus reads them: `pretrade alerts rules write`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from local.stack.errors import NotReadyError
from local.stack.parts import server
from pretrade.client import credential_variables
from pretrade.client.stack_file import Endpoints

_EVERY = "2s"


def argv(endpoints: Endpoints, path: Path) -> list[str]:
    """Runs it for a file among those of the stack's Prometheus."""
    assert endpoints.admin is not None
    assert endpoints.prometheus_url is not None
    where = ["--target", endpoints.admin, "--prometheus", endpoints.prometheus_url]
    return [sys.executable, "-m", "local", "alerts", "rules", "write", str(path), "--every", _EVERY, *where]


def env(endpoints: Endpoints) -> Mapping[str, str]:
    """Its environment: ours, with the credentials that a person's command would show."""
    token_file = server.admin_credentials(endpoints).token_file
    return os.environ | ({} if token_file is None else {credential_variables.TOKEN_FILE: str(token_file)})


def ready(path: Path) -> None:
    """Looks whether it has written the file.

    Raises:
        NotReadyError: It has not.
    """
    if not path.is_file():
        raise NotReadyError("no rules were written yet")
