"""Measures what stops the cores of this machine: `python -m loadtest.studies.standstills` (Linux; as root).

A process on each core sleeps for half a millisecond, again and again, at a real-time priority, so that no other process
can delay it. If it wakes up late, the core stood still: the host of a virtual machine had given it to another guest
(*stolen*, which the kernel counts in steps of 10 ms), or the kernel itself was busy. Without the right to a real-time
priority it also waits behind other processes, and the output says so.

It takes 3 % of a core. Start it beside a program that is late at times, and compare.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing as mp
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SLEEP_SECONDS: Final = 0.0005
_LOOK_SECONDS: Final = 0.05
"""How often the count of stolen time is read while nothing happens: what a standstill adds to it is then its own."""
_ACCOUNTED_SECONDS: Final = 0.012
"""After which the kernel has counted what was stolen: it does so at its next tick, of which there are 100 a second or
more."""
_REAL_TIME_PRIORITY: Final = 50
_STEAL: Final = 8
"""Its place in a core's line of /proc/stat."""


@dataclass(frozen=True, slots=True)
class Standstill:
    """A time in which a core ran nothing of this machine, or only its kernel."""

    began: float
    """Monotonic seconds."""
    seconds: float
    stolen_seconds: float
    """What the host took of it, in steps of 10 ms."""


@dataclass(frozen=True, slots=True)
class Core:
    """What was seen on one core."""

    number: int
    real_time: bool
    stolen_seconds: float
    standstills: Sequence[Standstill]

    def row(self, long_seconds: float) -> str:
        """A line of the table."""
        found = self.standstills
        long = [one for one in found if one.seconds >= long_seconds]
        stolen = sum(one.stolen_seconds > 0 for one in long)
        longest = max((one.seconds for one in found), default=0.0)
        return (
            f"{self.number:>4} {1e3 * self.stolen_seconds:>9.0f} {len(found):>11} "
            f"{1e3 * sum(one.seconds for one in found):>9.0f} {1e3 * longest:>11.1f} {len(long):>11} {stolen:>11}"
        )


def stolen_seconds(stat: str, core: int, ticks_per_second: int) -> float:
    """What the host has taken of a core since the start, from the text of /proc/stat."""
    for line in stat.splitlines():
        name, *counts = line.split()
        if name == f"cpu{core}":
            return int(counts[_STEAL - 1]) / ticks_per_second
    raise ValueError(f"/proc/stat has no core {core}")


def together(cores: Sequence[Core], least_seconds: float) -> list[tuple[float, float]]:
    """(begin, seconds) of the times in which every core stood still at once for that long."""
    spans = [(-math.inf, math.inf)]
    for core in cores:
        others = [(one.began, one.began + one.seconds) for one in core.standstills]
        spans = [(max(a, c), min(b, d)) for a, b in spans for c, d in others if min(b, d) - max(a, c) >= least_seconds]
    return [(began, ended - began) for began, ended in spans]


def watch(core: int, seconds: float, over_seconds: float) -> Core:
    """Watches one core from now on; the calling process stays on it."""
    ticks_per_second = os.sysconf("SC_CLK_TCK")
    stat = Path("/proc/stat")

    def stolen() -> float:
        return stolen_seconds(stat.read_text(), core, ticks_per_second)

    os.sched_setaffinity(0, {core})
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_REAL_TIME_PRIORITY))
        real_time = True
    except PermissionError:
        real_time = False
    found: list[Standstill] = []
    at_first = before = stolen()
    looked = was = time.monotonic()
    until = was + seconds
    while was < until:
        time.sleep(_SLEEP_SECONDS)
        now = time.monotonic()
        if now - was >= over_seconds:
            time.sleep(_ACCOUNTED_SECONDS)
            after = stolen()
            found.append(Standstill(was, now - was, after - before))
            before, looked = after, now
        elif now - looked >= _LOOK_SECONDS:
            before, looked = stolen(), now
        was = time.monotonic()
    return Core(core, real_time, stolen() - at_first, found)


def report(cores: Sequence[Core], long_seconds: float) -> Iterable[str]:
    """The table, and what it means."""
    yield "core stolen ms standstills  total ms  longest ms  long ones  of them stolen"
    for core in cores:
        yield core.row(long_seconds)
    both = together(cores, long_seconds)
    yield f"{len(both)} times all cores stood still together for {1e3 * long_seconds:.0f} ms or more"
    if not all(core.real_time for core in cores):
        yield "no real-time priority: the time that others ran on a core counts as a standstill, too"


def main(arguments: Sequence[str] | None = None) -> None:
    """Watches every core and prints what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to measure")
    parser.add_argument("--over", type=float, default=3.0, metavar="MS", help="shortest standstill that counts")
    parser.add_argument(
        "--long",
        type=float,
        default=10.0,
        metavar="MS",
        help="standstills from this length on are counted apart, with how many of them the host stole",
    )
    given = parser.parse_args(arguments)
    numbers = sorted(os.sched_getaffinity(0))
    with mp.get_context("spawn").Pool(len(numbers)) as pool:
        cores = pool.starmap(watch, [(number, given.seconds, given.over / 1e3) for number in numbers], chunksize=1)
    for line in report(cores, given.long / 1e3):
        print(line)


if __name__ == "__main__":
    main()
