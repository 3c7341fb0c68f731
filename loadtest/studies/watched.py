"""The resources that processes use under load: memory, descriptors, threads, and what their metrics report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final
from urllib.request import urlopen

import psutil
from prometheus_client.parser import text_string_to_metric_families

MEMORY: Final = "memory MiB"
DESCRIPTORS: Final = "descriptors"
THREADS: Final = "threads"
PROCESSES: Final = "processes"
KINDS: Final = (MEMORY, DESCRIPTORS, THREADS)
TASKS: Final = "pretrade_event_loop_tasks"
UNSHIPPED: Final = "pretrade_shipper_unshipped"
GAUGES: Final = (TASKS, UNSHIPPED)
"""Metrics that grow without end only where something leaks, or is not kept up with."""

_PATIENCE_SECONDS: Final = 5.0

Key = tuple[str, str]
"""Who holds, and what: a process or a metrics URL, and one of `KINDS`, `PROCESSES` or `GAUGES`."""


def sample(roots: Mapping[str, int], metrics: Sequence[str]) -> dict[Key, float]:
    """The resources in use now; blocks for as long as a scrape takes.

    Each process of a tree is listed by its id: a total would hide one that leaks behind one that shrinks.

    Args:
        roots: Process ids by name; their children are watched too.
        metrics: URLs of metrics to be scraped. One that does not answer is missing from this sample.
    """
    found: dict[Key, float] = {}
    for name, pid in roots.items():
        tree = _tree(pid)
        found[name, PROCESSES] = len(tree)
        for process in tree:
            try:
                with process.oneshot():
                    who = f"{name}: {_program(process)} {process.pid}"
                    held = (process.memory_info().rss / 2**20, process.num_fds(), process.num_threads())
            except psutil.Error:  # it has just ended
                continue
            found |= {(who, kind): value for kind, value in zip(KINDS, held, strict=True)}
    for url in metrics:
        found |= {(url, gauge): value for gauge, value in _gauges(url).items()}
    return found


def _tree(pid: int) -> list[psutil.Process]:
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _program(process: psutil.Process) -> str:
    """What runs there, for people: a Python module, or the program."""
    words = process.cmdline()
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    return process.name()


def _gauges(url: str) -> dict[str, float]:
    """The gauges, summed over their labels; none if the server does not answer."""
    try:
        with urlopen(url, timeout=_PATIENCE_SECONDS) as response:  # noqa: S310 - the user's own
            text = response.read().decode()
    except OSError:
        return {}
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if one.name in GAUGES:
                found[one.name] = found.get(one.name, 0.0) + one.value
    return found
