"""Alertmanager, where it is installed: it tells people of alerts, each once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from local.stack.parts import prometheus
from local.stack.ports import LOOPBACK

_CONFIGURATION: Final = prometheus.OBSERVABILITY / "alertmanager" / "alertmanager.yaml"


def program() -> str | None:
    """Its path; None where it is not installed. Debian has a name of its own for it."""
    return shutil.which("alertmanager") or shutil.which("prometheus-alertmanager")


def url(port: int) -> str:
    """Where its API and its page are served."""
    return f"http://{LOOPBACK}:{port}"


def argv(port: int, directory: Path, configuration: Path | None) -> list[str]:
    """Runs it on this port of the loopback interface, without peers.

    Args:
        port: Of its API and its page.
        directory: Where it keeps silences, and what it has told.
        configuration: The user's; None for ours, by which nobody is told.
    """
    found = program()
    assert found is not None
    return [
        found,
        f"--config.file={configuration or _CONFIGURATION}",
        f"--storage.path={directory / 'data'}",
        f"--web.listen-address={LOOPBACK}:{port}",
        "--cluster.listen-address=",
    ]
