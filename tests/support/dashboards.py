"""The dashboards' panels and the names that their queries may ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from feature_cache.bars import metrics as bars_metrics
from feature_cache.metrics import Histogram
from feature_cache.sources import metrics as ingest_metrics
from feature_cache.worker import metrics as worker_metrics
from server.composition import metrics_port

OBSERVABILITY: Final = Path(__file__).parents[2] / "k8s" / "observability"
RULES: Final = OBSERVABILITY / "prometheus"
DASHBOARDS: Final = sorted((OBSERVABILITY / "grafana" / "dashboards").glob("*.json"))


class Query(NamedTuple):
    dashboard: str
    panel: str
    expression: str
    """As Prometheus takes it: Grafana's variable for the interval of a rate is 1m."""
    legend: str
    """The name of each series: a text in which `{{label}}` stands for the label's value."""
    unit: str
    """Grafana's name for it: `s`, `reqps`, `short`, …"""


def rules() -> Iterator[dict[str, Any]]:
    """Every rule, recording and alerting."""
    for path in sorted(RULES.glob("*.rules.yaml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def queries() -> Iterator[Query]:
    """Every query of metrics of every panel."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                if target["datasource"]["type"] != "prometheus":
                    continue
                expression = target["expr"].replace("$__rate_interval", "1m")
                unit = panel["fieldConfig"]["defaults"].get("unit", "short")
                yield Query(path.stem, panel["title"], expression, target["legendFormat"], unit)


def series_that_exist() -> set[str]:
    """What a scrape shows, and what the rules record."""
    there = {rule["record"] for rule in rules() if "record" in rule}
    for metric in (*metrics_port.METRICS, *worker_metrics.METRICS, *ingest_metrics.METRICS, *bars_metrics.METRICS):
        suffixes = ("_bucket", "_sum", "_count") if isinstance(metric, Histogram) else ("",)
        there |= {f"{metric.scraped_name}{suffix}" for suffix in suffixes}
    return there


def series_asked_for(expression: str) -> set[str]:
    """The names of ours in an expression."""
    return set(re.findall(r"\bpretrade[_:][\w:]+", expression))
