"""How benchmarks tell the threads of a server apart."""

from __future__ import annotations

import io
import os
import threading

import pytest
from rich.console import Console

from loadtest.benchmark.targets import EVENT_LOOP
from local.bench.cpu import Share, by_part, by_role, share_table, thread_names


def test_every_thread_of_a_process_has_a_name() -> None:
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait, name="waiting")
    thread.start()
    try:
        names = thread_names(os.getpid())
        assert names.keys() >= {thread.native_id, threading.get_native_id()}
        assert all(names.values())
    finally:
        ended.set()
        thread.join()


def test_the_busiest_thread_that_has_no_other_use_is_the_event_loop() -> None:
    names = {1: "envoy", 2: "Dummy-2", 3: "wrk:worker_0", 4: "audit-journal", 5: "event_engine", 6: "grpc_global_tim"}
    used = {1: 0.1, 2: 2.0, 3: 3.0, 4: 0.5, 5: 0.2, 6: 0.1, 7: 0.05}
    assert by_role(used, names) == {
        "Envoy worker": 3.0,
        "journal": 0.5,
        "gRPC": pytest.approx(0.3),
        "other threads": pytest.approx(0.15),
        EVENT_LOOP: 2.0,
    }


def test_threads_are_parts_of_the_process_that_decides_and_not_added_to_all() -> None:
    shares = [Share("deciding", 80.0, 0.8), Share("primary", 40.0, 0.4), Share(EVENT_LOOP, 50.0, 0.5, thread=True)]
    assert by_part(shares) == {"all": 120.0, "deciding": 80.0, "primary": 40.0, EVENT_LOOP: 50.0}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(share_table(shares, "Envoy"))
    rows = [line.split() for line in console.export_text().splitlines()]
    assert rows.index(["event", "loop", "50.0", "0.50"]) == rows.index(["deciding", "80.0", "0.80"]) + 1
    assert ["all", "120.0"] in rows
