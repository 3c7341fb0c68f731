"""Prometheus, where it is installed, with the scrapes and the rules of the deployment."""

from __future__ import annotations

import shutil
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import yaml

from local.stack.errors import NotReadyError
from local.stack.ports import LOOPBACK
from pretrade.client.stack_file import Endpoints

OBSERVABILITY: Final = Path(__file__).parents[3] / "k8s" / "observability"
"""Rules and configurations. They are not installed with the package: a clone of the repository has them."""
_RULES: Final = OBSERVABILITY / "prometheus"
_OURS: Final = "*.rules.yaml"
_RETENTION: Final = "7d"


def program() -> str | None:
    """Its path; None where it is not installed."""
    return shutil.which("prometheus")


def url(port: int) -> str:
    """Where its API and its page are served."""
    return f"http://{LOOPBACK}:{port}"


def user_rules(directory: Path) -> Path:
    """The rules that users set, in the directory of its configuration."""
    return directory / "user.rules.yaml"


def write_configuration(directory: Path, endpoints: Endpoints, processes: int | None, bars: str | None) -> None:
    """Writes the deployment's configuration with the addresses of this stack.

    Args:
        directory: Where it is written.
        endpoints: What is scraped, and the Alertmanager that is told.
        processes: Decision server processes, whose metrics ports follow on the first one's; None for a single one.
        bars: Base URL of the keeper of bars; None without one.
    """
    found = yaml.safe_load((_RULES / "prometheus.yaml").read_text())
    targets = {
        "pretrade-server": _server_targets(endpoints.metrics_url, processes),
        "pretrade-worker": _targets(endpoints.worker_url),
        "pretrade-bars": _targets(bars),
    }
    found["rule_files"] = [str(_RULES / _OURS), str(user_rules(directory))]
    found["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": _targets(endpoints.alertmanager_url)}]}]}
    found["scrape_configs"] = [
        {"job_name": job, "static_configs": [{"targets": addresses}]} for job, addresses in targets.items() if addresses
    ]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(found))


def argv(port: int, directory: Path) -> list[str]:
    """Runs it on this port of the loopback interface, with the configuration in `directory`."""
    found = program()
    assert found is not None
    return [
        found,
        f"--config.file={directory / 'prometheus.yaml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--storage.tsdb.retention.time={_RETENTION}",
        f"--web.listen-address={LOOPBACK}:{port}",
        "--web.enable-lifecycle",  # it reads its rules again when it is asked
    ]


def ready(base: str) -> None:
    """Asks Prometheus or Alertmanager whether it serves.

    Raises:
        NotReadyError: It does not, or not yet.
    """
    try:
        with urllib.request.urlopen(f"{base}/-/ready", timeout=2.0):  # noqa: S310 - a fixed http URL
            pass
    except OSError as error:
        raise NotReadyError(str(error)) from error


def _targets(base: str | None) -> Sequence[str]:
    return [] if base is None else [base.removeprefix("http://")]


def _server_targets(base: str | None, processes: int | None) -> Sequence[str]:
    (first,) = _targets(base) or ("",)
    if not first:
        return []
    host, _, port = first.rpartition(":")
    return [f"{host}:{int(port) + index}" for index in range(processes or 1)]
