"""Hours in which nothing is wrong, made of what a real stack's metrics did under each load; no alert may fire in them.

    PYTHONPATH=tests python -m support.healthy_hours MODELS envoy|grpcio [--minutes 60] [LOAD …]

runs `pretrade up --alerts` with the models of a folder. With `--minutes` it first watches it for so long at 50 orders a
second, with its own Prometheus and Alertmanager, and prints what fired, what people were told and how fast the budgets
burned. Then it puts it under each load, or those that are named, for a minute, scrapes the server and the feature
worker as Prometheus would, and writes `tests/contract/healthy/EDGE.json`. A test repeats what was recorded for an hour
and has promtool evaluate the rules on it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode
from urllib.request import urlopen

import grpc.aio
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from loadtest.generators.closed_loop import call_decide, call_decide_batch
from loadtest.generators.measurement import percentile
from loadtest.generators.open_loop import offer
from loadtest.generators.orders import OrderFlow
from pretrade.client.stack_file import Endpoints
from pretrade.decision.v1 import decision_pb2_grpc
from support.dashboards import rules, series_asked_for
from support.receivers import Mailbox, Webhook, serving, written_configuration
from support.up_command import up

RECORDINGS: Final = Path(__file__).parents[1] / "contract" / "healthy"
STEP_SECONDS: Final = 5
"""Between scrapes, as in `prometheus.yaml`."""
_SAMPLES: Final = 13
"""Of each load: a minute."""
_WARM_UP_SECONDS: Final = 5.0
_DEADLINE_SECONDS: Final = 0.2
_NUMBERS: Final = re.compile(r"\[[^\]]*\]")
_WATCHED_ORDERS_PER_SECOND: Final = 50
_WATCHED_WARM_UP_SECONDS: Final = 30.0
_JOBS: Final = {"pretrade-server": "server:7003", "pretrade-worker": "worker:7004"}

Recording = dict[str, dict[str, list[float]]]
"""Values of each series, by load; one where it is always the same. Those of a counter are what it grew by."""
_Load = Callable[[Any, Sequence[Any], float], Coroutine[Any, Any, Any]]
"""Puts a stub of the decision service under load: with these orders, for so many seconds."""


def _rate(orders_per_second: float) -> _Load:
    return lambda stub, orders, seconds: offer(
        stub, "unary", orders, rate=orders_per_second, seconds=seconds, deadline_seconds=_DEADLINE_SECONDS
    )


def _callers(number: int) -> _Load:
    return lambda stub, orders, seconds: call_decide(
        stub, orders, callers=number, seconds=seconds, deadline_seconds=_DEADLINE_SECONDS
    )


def _batches(callers: int) -> _Load:
    return lambda stub, orders, seconds: call_decide_batch(
        stub, orders, callers=callers, seconds=seconds, deadline_seconds=_DEADLINE_SECONDS
    )


LOADS: Final[Mapping[str, _Load]] = {
    "10 orders a second": _rate(10),
    "200 orders a second": _rate(200),
    "16 callers": _callers(16),
    "64 callers": _callers(64),
    "1 caller with batches of 64": _batches(1),
}
"""Callers are those of the benchmark: each asks again at once."""
EDGES: Final = ("envoy", "grpcio")


def hour(series: Mapping[str, Sequence[float]]) -> list[dict[str, str]]:
    """The input series of an hour in which the recorded seconds repeat, in promtool's words."""
    steps = 3600 // STEP_SECONDS
    return [
        {"series": name, "values": " ".join(f"{value:.12g}" for value in _repeated(name, values, steps))}
        for name, values in series.items()
    ]


def _repeated(name: str, values: Sequence[float], steps: int) -> Iterator[float]:
    total = 0.0
    for step in range(steps + 1):
        value = values[step % len(values)]
        total += value
        yield total if _is_counter(name) else value


def _is_counter(series: str) -> bool:
    return series.partition("{")[0].endswith(("_total", "_bucket", "_count", "_sum"))


def _scraped(url: str, job: str) -> dict[str, float]:
    """The series that the rules ask for; Unix times as their distance from now, for a test's clock begins at 0."""
    wanted = series_asked_for(" ".join(rule["expr"] for rule in rules()))
    with urlopen(url, timeout=10.0) as response:
        text = response.read().decode()
    families = text_string_to_metric_families(text)
    found = {_name(one, job): one.value for family in families for one in family.samples if one.name in wanted}
    return found | {f'up{{job="{job}", instance="{_JOBS[job]}"}}': 1.0}


def _name(sample: Sample, job: str) -> str:
    labels = {"job": job, "instance": _JOBS[job]} | sample.labels
    return f"{sample.name}{{{', '.join(f'{name}={json.dumps(value)}' for name, value in labels.items())}}}"


async def _record(endpoints: Endpoints, loads: Iterable[str]) -> Recording:
    assert endpoints.decision is not None
    flow, found = OrderFlow(endpoints.instruments), Recording()
    orders = [flow.next({}) for _ in range(4_096)]
    async with grpc.aio.insecure_channel(endpoints.decision) as channel:
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        for name in loads:
            seconds = _WARM_UP_SECONDS + STEP_SECONDS * _SAMPLES
            under_load: asyncio.Task[Any] = asyncio.create_task(LOADS[name](stub, orders, seconds))
            await asyncio.sleep(_WARM_UP_SECONDS)
            scrapes = [await _scrape_all(endpoints)]
            for _ in range(_SAMPLES - 1):
                await asyncio.sleep(STEP_SECONDS)
                scrapes.append(await _scrape_all(endpoints))
            await under_load
            found[name] = _series(scrapes)
    return found


async def _scrape_all(endpoints: Endpoints) -> dict[str, float]:
    server, worker = f"{endpoints.metrics_url}/metrics", f"{endpoints.worker_url}/metrics"
    return await asyncio.to_thread(_scraped, server, "pretrade-server") | await asyncio.to_thread(
        _scraped, worker, "pretrade-worker"
    )


def _series(scrapes: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """What each counter grew by between two scrapes, and the value of each gauge."""
    found = {}
    for name in scrapes[0]:
        if all(name in one for one in scrapes):
            steps = itertools.pairwise(one[name] for one in scrapes)
            values = [round(after - before if _is_counter(name) else after, 6) for before, after in steps]
            found[name] = values if len(set(values)) > 1 else values[:1]
    return found


async def _watch(endpoints: Endpoints, minutes: float) -> dict[str, Any]:
    """What Prometheus makes of a stack at an ordinary load, and what the callers saw."""
    assert endpoints.decision is not None
    flow = OrderFlow(endpoints.instruments)
    orders = [flow.next({}) for _ in range(4_096)]
    async with grpc.aio.insecure_channel(endpoints.decision) as channel:
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        await _rate(_WATCHED_ORDERS_PER_SECOND)(stub, orders, _WATCHED_WARM_UP_SECONDS)
        began = time.time()
        measured = await _rate(_WATCHED_ORDERS_PER_SECOND)(stub, orders, 60.0 * minutes)
    return await asyncio.to_thread(_found, endpoints, began) | {
        "minutes": round((time.time() - began) / 60, 1),
        "machine's load average over the last 15 minutes": round(os.getloadavg()[2], 1),
        "calls": {
            "decisions": measured.decisions,
            "errors": dict(measured.errors),
            "sources": dict(measured.sources),
            "milliseconds": {
                f"p{100 * share:g}": round(1e3 * percentile(measured.latencies, share), 1)
                for share in (0.5, 0.99, 0.999)
            },
        },
    }


def _found(endpoints: Endpoints, began: float) -> dict[str, Any]:
    seconds = time.time() - began
    window = f"{round(seconds)}s"

    def asked(expression: str) -> dict[str, float]:
        query = urlencode({"query": expression})
        with urlopen(f"{endpoints.prometheus_url}/api/v1/query?{query}", timeout=60.0) as response:
            found = json.load(response)["data"]["result"]
        return {
            " ".join(f"{name}={value}" for name, value in sorted(one["metric"].items()) if name != "__name__"): float(
                one["value"][1]
            )
            for one in found
        }

    return {
        "firing": asked(f'max_over_time(ALERTS{{alertstate="firing"}}[{window}])'),
        "pending": asked(f'count_over_time(ALERTS{{alertstate="pending"}}[{window}])'),
        "fastest burn of 5 minutes": asked(f"max_over_time(pretrade:slo_burn:rate5m[{window}])"),
        "burn of the hour": asked("pretrade:slo_burn:rate1h"),
        "decisions": asked(f"sum by (source) (increase(pretrade_decisions_total[{window}]))"),
        "late": asked(f"sum(increase(pretrade_late_total[{window}]))"),
        "series": asked('count({__name__=~"pretrade_.+"})'),
    }


def main() -> None:
    """Watches if that is wanted; records all loads on an edge, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="folder of champion.mar and challenger.mar")
    parser.add_argument("edge", choices=EDGES)
    parser.add_argument("loads", nargs="*", choices=[[], *LOADS], metavar="LOAD")
    parser.add_argument("--minutes", type=float, default=0.0, help="watch it first")
    given = parser.parse_args()
    path = RECORDINGS / f"{given.edge}.json"
    recorded = json.loads(path.read_text()) if given.loads else {}
    pages, mails = Webhook(), Mailbox()
    with tempfile.TemporaryDirectory() as name, serving(pages, mails):
        folder = Path(name)
        settings = {
            "PRETRADE_GRPC__EDGE": given.edge,
            "PRETRADE_LOCAL_MODEL_STORE": str(given.models.resolve()),
            "PRETRADE_LOCAL_ALERTS": "true",
            "PRETRADE_LOCAL_ALERTMANAGER_CONFIG": str(written_configuration(folder, pages, mails)),
        }
        with up(folder, **settings) as command:
            endpoints = command.wait_until_up(180.0).endpoints
            if given.minutes:
                watched = asyncio.run(_watch(endpoints, given.minutes))
                watched["told"] = mails.subjects()
                watched["restarted"] = re.findall(r"! (.*)", command.output)
                print(json.dumps(watched, indent=1), flush=True)
            recorded |= asyncio.run(_record(endpoints, given.loads or LOADS))
            command.process.terminate()
            command.process.wait(60.0)
    text = json.dumps({name: recorded[name] for name in LOADS if name in recorded}, indent=1)
    path.write_text(_NUMBERS.sub(lambda found: " ".join(found[0].split()), text) + "\n")


if __name__ == "__main__":
    main()
