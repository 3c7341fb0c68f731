"""How the benchmark of costs tells threads apart."""

from __future__ import annotations

import os
import threading

from local.bench.costs import thread_names


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
