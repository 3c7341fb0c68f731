"""What on-call sees, as a picture: a server's status, and the first dashboard as a table with Grafana's legends."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from rich.console import Console

from pretrade.admin.v1 import admin_pb2
from pretrade.client.cli.fitting import Rows
from pretrade.client.cli.views import status_view
from support.dashboards import Query

TITLE: Final = "pretrade status, and the dashboard On call"
_COLUMNS: Final = 100


def burning(samples: Iterable[tuple[Query, Mapping[str, Any]]]) -> list[str]:
    """The promises whose error budget is spent faster than allowed: not what a picture is to show as usual."""
    return [
        str(sample["metric"]["slo"])
        for _, sample in samples
        if "slo" in sample["metric"] and float(sample["value"][1]) > 1.0
    ]


def dashboard(samples: Iterable[tuple[Query, Mapping[str, Any]]]) -> Rows:
    """A dashboard's samples by panel, named as Grafana would name them, with their units."""
    table, before = Rows("panel", "series", "value>"), ""
    for query, sample in samples:
        series = _named(query.legend, sample["metric"])
        table.add("" if query.panel == before else query.panel, series, _value(float(sample["value"][1]), query.unit))
        before = query.panel
    return table


def picture(status: admin_pb2.GetStatusResponse, samples: Iterable[tuple[Query, Mapping[str, Any]]]) -> Console:
    """Both, drawn; `save_svg` makes a file of it. The server has the name that it has in Kubernetes."""
    shown = admin_pb2.GetStatusResponse()
    shown.CopyFrom(status)
    shown.instance_id = "server-0"
    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print("[dim]$ pretrade status --once[/]")
    console.print(status_view(shown))
    console.print("\n[bold]Dashboard On call[/]")
    console.print(dashboard(samples))
    return console


def _named(legend: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], "none"), legend)


def _value(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e3:.1f} ms"
    return f"{value:.2f}/s" if unit == "reqps" else f"{value:g}"
