"""The servers that the benchmarks load: decision servers of their own, and alternatives that score an order."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from urllib.error import URLError
from urllib.request import Request, urlopen

import grpc
import numpy as np
import psutil
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from feature_cache.features import MF1
from loadtest.generators.load import ALTERNATIVE, LARGE_BATCH, ORDERS, Call, Method, Server, Usage, framed
from local.bench.fastapi_model import ARCHIVE, PATH
from local.stack.errors import NotReadyError
from local.stack.guard import Guard
from local.stack.parts import server, torchserve
from local.stack.ports import LOOPBACK, free_ports
from local.stack.process import Process
from local.stack.stack import Stack
from pretrade.client import operator_token
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from pretrade.wire.torchserve.inference_pb2_grpc import InferenceAPIsServiceStub
from server.inference import wire
from server.models.archive import read_archive
from torchserve.config import TorchServeSettings, prepare

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 20.0
_BATCHING: Final = {"batchSize": 32, "maxBatchDelay": 1}
"""TorchServe's own, as it is to be for callers that send single rows: up to 32 rows, 1 ms."""
_SCORED: Final[tuple[tuple[Method, int], ...]] = (("unary", 1), ("batch", ORDERS["batch"]), ("batch", LARGE_BATCH))
"""The calls that servers take which only score."""
_PREDICTIONS: Final = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"


@dataclass(frozen=True, slots=True)
class Target:
    """A decision server under load."""

    address: str
    metrics_url: str
    process: psutil.Process
    http_address: str
    """Where its HTTP port is, unless it has none."""
    token_file: Path
    """Its operator token."""

    def count(self, name: str, **labels: str) -> float:
        """The sum of the series of a metric that carry these labels."""
        return _sum(self._samples(), name, labels)

    def usage(self) -> Usage:
        """What it has used and decided so far."""
        samples, resources = self._samples(), self.resources()
        decisions = "pretrade_decisions_total"
        return Usage(
            cpu_seconds=resources.cpu_seconds,
            memory_bytes=resources.memory_bytes,
            decisions=_sum(samples, decisions, {}),
            refused=_sum(samples, "pretrade_errors_total", {}),
            scored=sum(_sum(samples, decisions, {"source": source}) for source in ("PRIMARY", "SECONDARY", "EMBEDDED")),
        )

    def resources(self) -> Usage:
        """What it and all its processes have used so far, and hold; not what they have decided."""
        return usage_of_process(self.process)

    def deciding(self) -> psutil.Process:
        """The process that decides: Envoy where there is one, a child of the supervisor's."""
        children = self.process.children()
        return next((child for child in children if "envoy" in child.exe()), self.process)

    def _samples(self) -> list[Any]:
        with urlopen(self.metrics_url, timeout=5.0) as response:  # noqa: S310 - our own
            families = list(text_string_to_metric_families(response.read().decode()))
        return [sample for family in families for sample in family.samples]


def _sum(samples: list[Any], name: str, labels: Mapping[str, str]) -> float:
    values = (each.value for each in samples if each.name == name and labels.items() <= each.labels.items())
    return float(sum(values))


def usage_of_process(process: psutil.Process) -> Usage:
    """What a process and all that it started have used so far, and hold."""
    family = [process, *process.children(recursive=True)]
    cpu = sum(sum(each.cpu_times()[:2]) for each in family)
    return Usage(cpu, sum(each.memory_info().rss for each in family))


def usage_of_port(port: int) -> Callable[[], Usage]:
    """Tells what the process that listens on a port, one of our descendants, and its processes use.

    Raises:
        LookupError: None of them does.
    """
    for child in psutil.Process().children(recursive=True):
        if any(found.laddr.port == port for found in child.net_connections("tcp") if found.status == "LISTEN"):
            return partial(usage_of_process, child)
    raise LookupError(f"no process of ours listens on port {port}")


@contextmanager
def decision_server(
    stack: Stack,
    directory: Path,
    edge: str,
    settings: Mapping[str, str] = MappingProxyType({}),
    python: Path | None = None,
) -> Iterator[Target]:
    """A decision server on an edge, with settings of its own, in front of the stack's replicas and features.

    Args:
        stack: What is behind it.
        directory: For what it keeps.
        edge: Who speaks HTTP/2 with its callers.
        settings: Variables of its own; empty for one that is not to be set.
        python: The interpreter of another version of the server; None for this one.
    """
    directory = directory.resolve()
    names = ("decision", "admin", "metrics", "http")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    env = {
        **server.env(stack.endpoints, ports),
        "PRETRADE_GRPC__EDGE": edge,
        "PRETRADE_DATABASE_URL": f"sqlite:///{directory / 'audit.db'}",
        "PRETRADE_JOURNAL__PATH": str(directory / "journal.db"),
        **settings,
    }
    env = {name: value for name, value in env.items() if value}
    argv = server.argv(None)
    if python is not None:
        argv[0] = str(python)
    with _running(f"server on {edge}", argv, directory, partial(server.ready, ports["decision"]), env) as pid:
        yield Target(
            address=server.address(ports["decision"]),
            metrics_url=f"http://{LOOPBACK}:{ports['metrics']}/metrics",
            process=psutil.Process(pid),
            http_address=server.address(ports["http"]),
            token_file=operator_token.path_from(env),
        )


@contextmanager
def _running(
    name: str, argv: Sequence[str], directory: Path, ready: Callable[[], None], env: Mapping[str, str]
) -> Iterator[int]:
    """A program that is ready, under a guard of its own; yields its process id.

    Raises:
        PartFailedError: It did not start.
    """
    with closing(Guard(grace_seconds=2)) as guard:
        process = Process(
            name,
            argv,
            directory=directory,
            log_path=directory / "log",
            guard=guard,
            ready=ready,
            start_timeout_seconds=_START_SECONDS,
            stop_timeout_seconds=_STOP_SECONDS,
            env=env,
        )
        process.start()
        try:
            assert process.pid is not None
            yield process.pid
        finally:
            process.stop()


def warm_up(address: str, order: pb.Order) -> pb.DecideResponse:
    """Decides until a replica has answered, for a while; a typical response."""
    until = time.monotonic() + _STOP_SECONDS
    with grpc.insecure_channel(address) as channel:
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        while True:
            try:
                response = stub.Decide(pb.DecideRequest(order=order), timeout=5.0)
            except grpc.RpcError:
                if time.monotonic() > until:
                    raise
                continue  # too late, on a machine that is still starting something
            if response.decision.source == pb.SOURCE_PRIMARY or time.monotonic() > until:
                return response


@contextmanager
def torchserve_alone(name: str, archive: Path, directory: Path) -> Iterator[Server]:
    """TorchServe with its own batching, for callers that ask it for scores and for nothing else."""
    (port,) = free_ports(1)
    launch = prepare(
        TorchServeSettings(
            archive=archive, model_name="champion", directory=directory, grpc_port=port, job_queue_size=1_024
        )
    )
    batching = {
        "champion": {
            read_archive(archive).version: {**_BATCHING, "minWorkers": 1, "maxWorkers": 1, "marName": archive.name}
        }
    }
    with (directory / "config.properties").open("a") as properties:
        properties.write(f"models={json.dumps(batching)}\n")
    with _running(name, launch.argv, directory, partial(torchserve.ready, port, "champion"), launch.env) as pid:
        address = torchserve.address(port)
        yield Server(
            name=name,
            kind=ALTERNATIVE,
            address=address,
            calls={key: _prediction(address, key[1]) for key in _SCORED},
            usage=partial(usage_of_process, psutil.Process(pid)),
        )


def _prediction(address: str, rows: int) -> Call:
    """A request for the scores of so many rows, and the length of the answer to it."""
    request = wire.request("champion", [_rows(rows).tobytes()])
    with grpc.insecure_channel(address) as channel:
        answer = InferenceAPIsServiceStub(channel).Predictions(request, timeout=_STOP_SECONDS)
    # A caller that leaves just when its answer is sent ends TorchServe's worker, which is back only seconds later.
    return Call(_PREDICTIONS, framed(request), rows, answer_bytes=len(framed(answer)), may_be_cut=False)


@contextmanager
def fastapi_with_model(name: str, archive: Path, directory: Path) -> Iterator[Server]:
    """FastAPI on uvicorn with the model in its process, `fastapi_model.py`: JSON in, JSON out, over HTTP/1.1."""
    (port,) = free_ports(1)
    argv = [
        sys.executable,
        "-m",
        "uvicorn",
        "--factory",
        "local.bench.fastapi_model:build",
        "--host",
        LOOPBACK,
        "--port",
        str(port),
    ]
    argv += ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
    calls = {
        key: Call(PATH, json.dumps({"rows": _rows(key[1]).tolist()}).encode(), key[1], is_grpc=False) for key in _SCORED
    }
    ready = partial(_answers, f"http://{LOOPBACK}:{port}{PATH}", calls["unary", 1].body)
    with _running(name, argv, directory, ready, os.environ | {ARCHIVE: str(archive.resolve())}) as pid:
        yield Server(
            name, ALTERNATIVE, f"{LOOPBACK}:{port}", calls, usage=partial(usage_of_process, psutil.Process(pid))
        )


def _answers(url: str, body: bytes) -> None:
    request = Request(url, body, {"content-type": "application/json"})  # noqa: S310 - our own
    try:
        with urlopen(request, timeout=5.0) as response:  # noqa: S310 - our own
            response.read()
    except (URLError, ConnectionError) as error:
        raise NotReadyError(str(error)) from error


def _rows(number: int) -> NDArray[np.float32]:
    """Rows like those that an order's features make."""
    return np.random.default_rng(1).normal(size=(number, len(MF1))).astype("<f4")
