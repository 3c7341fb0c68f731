"""`pretrade bench-serving`: the cost of a call to a model server and in process, and the effect of each setting.

It prints three tables: runtimes in this process, TorchServe calls of 1 to 256 rows, and TorchServe with one setting
changed compared with one as `torchserve.config` starts it. Those two take turns of half a second, and ratios of
neighbouring turns are compared, so that other work on the machine affects both alike. The first variant changes
nothing, and shows how much noise remains.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import grpc
import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from loadtest.benchmark.bench import commit, print_whole
from local.bench.runtimes import champion_margins, metadata_and_weights, network_margins
from local.stack.guard import Guard
from local.stack.parts import torchserve
from local.stack.ports import free_ports
from local.stack.process import Process
from pretrade.wire.torchserve.inference_pb2 import PredictionsRequest
from pretrade.wire.torchserve.inference_pb2_grpc import InferenceAPIsServiceStub
from server.inference import wire
from torchserve.config import TorchServeSettings, prepare

ROWS: Final = (1, 8, 32, 64, 256)
_CALLERS: Final = 4
_TIMED: Final = 200
"""Calls of one runtime or server with so many rows."""
_TURNS: Final = 5
"""In which a server's are made."""
_WARM_UP_CALLS: Final = 2_000
"""Until then a JVM compiles what it runs."""
_TURN_SECONDS: Final = 0.5
_MODELS: Final = ("champion", "challenger")


@dataclass(frozen=True, slots=True)
class Variant:
    """TorchServe with something changed."""

    name: str
    properties: Mapping[str, str] = field(default_factory=dict)
    """Lines of `config.properties` that replace ours."""
    without: tuple[str, ...] = ()
    """Beginnings of the JVM's arguments that are left out."""
    jvm: tuple[str, ...] = ()
    """Arguments for the JVM besides."""
    prometheus: bool = False


VARIANTS: Final = (
    Variant("nothing changed"),
    Variant("both JIT compilers", without=("-XX:TieredStopAtLevel",)),
    Variant("G1 collector", without=("-XX:+UseSerialGC",), jvm=("-XX:+UseG1GC",)),
    Variant("heap 512 MiB", without=("-Xmx",), jvm=("-Xmx512m",)),
    Variant("Netty threads as shipped", {"number_of_netty_threads": "0", "netty_client_threads": "0"}),
    Variant("logs as shipped", without=("-Dlog4j.configurationFile",)),
    Variant("system metrics as shipped", {"disable_system_metrics": "false"}),
    Variant("Prometheus endpoint", prometheus=True),
    Variant("job queue 100, as shipped", {"job_queue_size": "100"}),
    Variant("job tickets", {"use_job_ticket": "true"}),
    Variant("2 workers", {"default_workers_per_model": "2"}),
    Variant("Open Inference Protocol on", {"ts_open_inference_protocol": "true"}),
)


@dataclass(frozen=True, slots=True)
class _Running:
    """A TorchServe that serves one model."""

    process: Process
    port: int
    start_seconds: float

    def cpu_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.process.tree())


@dataclass(frozen=True, slots=True)
class Load:
    """What callers saw, each with one call after another."""

    callers: int
    calls_per_second: float
    p50_ms: float
    p99_ms: float
    refused: int
    cpu_us: float
    """CPU of TorchServe, its worker included, per call in microseconds."""


@dataclass(frozen=True, slots=True)
class Configured:
    """One variant, measured in turn with our settings."""

    name: str
    start_seconds: float
    memory_mebibytes: float
    turns: list[tuple[Load, Load]]
    """(ours, the variant), with one caller and with several."""

    def ratios(self, callers: int, figure: str) -> list[float]:
        """The variant's figure divided by ours, for each turn with this number of callers; sorted."""
        pairs = [(ours, variant) for ours, variant in self.turns if ours.callers == callers]
        return sorted(getattr(variant, figure) / getattr(ours, figure) for ours, variant in pairs)


@dataclass(frozen=True, slots=True)
class Timing:
    """One runtime or server, and one number of rows."""

    name: str
    rows: int
    call_us: float
    """Median."""
    row_us: float
    largest_difference: float
    """Of a score, from the handler's."""


def run_serving_bench(store: Path, rounds: int, report: Path | None) -> int:
    """Measures, prints and returns the exit code.

    Args:
        store: Directory of `champion.mar` and `challenger.mar`.
        rounds: Turns of half a second that each variant and ours take, with one caller and with several.
        report: JSON file for all figures.
    """
    console = Console()
    archives = {model: store / f"{model}.mar" for model in _MODELS}
    missing = [path for path in archives.values() if not path.exists()]
    if missing:
        console.print(f"no {missing[0]}: `make models` trains it, or name a --store", highlight=False)
        return 2
    with console.status("runtimes in this process"):
        runtimes = [timing for archive in archives.values() for timing in _runtimes(archive)]
    print_whole(console, _timings(runtimes, "in this process, one thread"))
    with tempfile.TemporaryDirectory(prefix="pretrade-serving-") as directory, closing(Guard(grace_seconds=2)) as guard:
        launch = partial(_torchserve, guard, Path(directory))
        with console.status("calls of TorchServe"):
            served = list(_served(launch, archives))
        print_whole(console, _timings(served, "a TorchServe call over gRPC, one caller"))
        with launch(archives["champion"], Variant("ours")) as ours:
            configured = []
            _warm_up(ours, _one_row(archives["champion"]))
            for variant in VARIANTS:
                with console.status(variant.name):
                    configured.append(_configured(launch, archives["champion"], ours, variant, rounds))
    print_whole(console, _configurations(configured))
    if report is not None:
        document = {
            "commit": commit(),
            "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "grpc": grpc.__version__},
            "load_average": os.getloadavg(),
            "rounds": rounds,
            "runtimes": [asdict(timing) for timing in runtimes],
            "served": [asdict(timing) for timing in served],
            "configurations": [asdict(each) for each in configured],
        }
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(document, indent=2) + "\n")
    return 0


_Launch = Callable[[Path, Variant], AbstractContextManager[_Running]]


@contextmanager
def _torchserve(guard: Guard, root: Path, archive: Path, variant: Variant) -> Iterator[_Running]:
    """A TorchServe of its own."""
    port, metrics_port = free_ports(2)
    directory = root / str(port)
    launch = prepare(
        TorchServeSettings(
            archive=archive,
            directory=directory,
            grpc_port=port,
            metrics_port=metrics_port if variant.prometheus else None,
        )
    )
    with (directory / "config.properties").open("a") as properties:
        properties.writelines(f"{name}={value}\n" for name, value in variant.properties.items())  # the last one counts
    java, *arguments = (one for one in launch.argv if not one.startswith(variant.without or ("\0",)))
    process = Process(
        variant.name,
        (java, *variant.jvm, *arguments),
        directory=directory,
        log_path=directory / "log",
        guard=guard,
        ready=partial(torchserve.ready, port, archive.stem),
        start_timeout_seconds=60.0,
        stop_timeout_seconds=10.0,
        env=launch.env,
    )
    began = time.monotonic()
    process.start()
    try:
        yield _Running(process, port, time.monotonic() - began)
    finally:
        process.stop()


def _rows(n_features: int) -> NDArray[np.float32]:
    """Rows for any model, some of their values undefined."""
    random = np.random.default_rng(1)
    rows = random.normal(size=(max(ROWS), n_features)).astype("<f4")
    rows[random.random(rows.shape) < 0.05] = np.nan
    return rows


def _runtimes(archive: Path) -> Iterator[Timing]:
    metadata, weights = metadata_and_weights(archive)
    rows = _rows(len(metadata["feature_names"]))
    network = metadata["network"]
    margins = network_margins(weights, network) if network else champion_margins(weights, rows.shape[1])
    expected = _probabilities(next(iter(margins.values()))(rows))
    for name, margin in margins.items():
        difference = float(np.abs(_probabilities(margin(rows)) - expected).max())
        for count in ROWS:
            seconds = _median_seconds(partial(margin, rows[:count].copy()))
            yield Timing(name, count, 1e6 * seconds, 1e6 * seconds / count, difference)


def _probabilities(margins: NDArray[np.float32]) -> NDArray[np.float64]:
    probabilities: NDArray[np.float64] = 1 / (1 + np.exp(-margins.astype(np.float64)))
    return probabilities


def _median_seconds(call: Callable[[], object]) -> float:
    _seconds(call, _TIMED // 10)
    return statistics.median(_seconds(call, _TIMED))


def _seconds(call: Callable[[], object], times: int) -> list[float]:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return taken


def _served(launch: _Launch, archives: Mapping[str, Path]) -> Iterator[Timing]:
    """Calls of every model and number of rows, in turn."""
    with ExitStack() as opened:
        calls: dict[tuple[str, int], Callable[[], object]] = {}
        for model, archive in archives.items():
            metadata, _ = metadata_and_weights(archive)
            rows = _rows(len(metadata["feature_names"]))
            running = opened.enter_context(launch(archive, Variant("ours")))
            _warm_up(running, _request(model, rows[:1]))
            channel = opened.enter_context(grpc.insecure_channel(torchserve.address(running.port)))
            predict = InferenceAPIsServiceStub(channel).Predictions
            name = f"{model} ({metadata['kind']})"
            calls |= {(name, n): partial(predict, _request(model, rows[:n]), timeout=10.0) for n in ROWS}
        taken: dict[tuple[str, int], list[float]] = {point: [] for point in calls}
        for _ in range(_TURNS):
            for point, call in calls.items():
                taken[point] += _seconds(call, _TIMED // _TURNS)
    for (name, count), seconds in taken.items():
        median = statistics.median(seconds)
        yield Timing(name, count, 1e6 * median, 1e6 * median / count, 0.0)


def _request(model: str, rows: NDArray[np.float32]) -> PredictionsRequest:
    return wire.request(model, [rows.tobytes()])


def _one_row(archive: Path) -> PredictionsRequest:
    metadata, _ = metadata_and_weights(archive)
    return _request(archive.stem, _rows(len(metadata["feature_names"]))[:1])


def _configured(launch: _Launch, archive: Path, ours: _Running, variant: Variant, rounds: int) -> Configured:
    request = _one_row(archive)
    with launch(archive, variant) as running:
        _warm_up(running, request)
        turns = []
        for number in range(rounds):
            for callers in (1, _CALLERS):
                order = (ours, running) if number % 2 else (running, ours)
                loads = {one.port: _load(one, request, callers, _TURN_SECONDS) for one in order}
                turns.append((loads[ours.port], loads[running.port]))
        memory = running.process.memory_bytes() / 2**20
    return Configured(variant.name, running.start_seconds, memory, turns)


def _warm_up(running: _Running, request: PredictionsRequest) -> None:
    with grpc.insecure_channel(torchserve.address(running.port)) as channel:
        _seconds(partial(InferenceAPIsServiceStub(channel).Predictions, request, timeout=10.0), _WARM_UP_CALLS)


def _load(running: _Running, request: PredictionsRequest, callers: int, seconds: float) -> Load:
    """Callers in threads, each with a channel of its own and one call after another."""
    until = time.perf_counter() + seconds
    latencies: list[list[float]] = [[] for _ in range(callers)]
    refused = [0] * callers

    def call(caller: int) -> None:
        options = (("grpc.use_local_subchannel_pool", 1),)
        with grpc.insecure_channel(torchserve.address(running.port), options) as channel:
            stub = InferenceAPIsServiceStub(channel)
            while (started := time.perf_counter()) < until:
                try:
                    stub.Predictions(request, timeout=10.0)
                except grpc.RpcError:
                    refused[caller] += 1
                latencies[caller].append(time.perf_counter() - started)

    cpu, began = running.cpu_seconds(), time.perf_counter()
    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took, cpu = time.perf_counter() - began, running.cpu_seconds() - cpu
    sorted_ms = np.sort([1e3 * latency for one in latencies for latency in one])
    p50, p99 = np.quantile(sorted_ms, (0.5, 0.99))
    calls = len(sorted_ms)
    return Load(callers, calls / took, float(p50), float(p99), sum(refused), 1e6 * cpu / calls)


def _timings(timings: list[Timing], title: str) -> Table:
    table = Table(title=title, caption="µs a call, and a row of it; medians", box=SIMPLE)
    table.add_column("")
    for rows in ROWS:
        table.add_column(f"{rows} rows" if rows > 1 else "1 row", justify="right")
    table.add_column("largest difference of a score", justify="right", max_width=18)
    for name in dict.fromkeys(timing.name for timing in timings):
        own = {timing.rows: timing for timing in timings if timing.name == name}
        cells = (f"{own[rows].call_us:,.0f} / {own[rows].row_us:,.1f}" for rows in ROWS)
        difference = own[1].largest_difference
        table.add_row(name, *cells, f"{difference:.0e}" if difference else "")
    return table


def _configurations(configured: list[Configured]) -> Table:
    table = Table(
        title="TorchServe with one thing changed, over ours",
        caption=f"ratios: median (lowest to highest turn); CPU of all its processes; one caller, and {_CALLERS}",
        box=SIMPLE,
    )
    headings = (
        "",
        "up after s",
        "MiB",
        "calls/s, 1",
        "CPU a call, 1",
        f"calls/s, {_CALLERS}",
        f"CPU a call, {_CALLERS}",
    )
    for heading in (*headings, "p99", "refused"):
        table.add_column(heading, justify="right" if heading else "left")
    figures = ((1, "calls_per_second"), (1, "cpu_us"), (_CALLERS, "calls_per_second"), (_CALLERS, "cpu_us"))
    for each in configured:
        cells = (_spread(each.ratios(callers, figure)) for callers, figure in (*figures, (_CALLERS, "p99_ms")))
        refused = sum(variant.refused for _, variant in each.turns)
        table.add_row(each.name, f"{each.start_seconds:.1f}", f"{each.memory_mebibytes:,.0f}", *cells, str(refused))
    return table


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
