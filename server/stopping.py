"""What tells a server process to stop: a signal, or the end of its standard input, which its supervisor holds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading


def stop_on_signal(alone: bool) -> asyncio.Future[None]:
    """A future that the first SIGTERM or SIGINT resolves; alone, the second ends the process at once.

    A process under a supervisor gets the signals of its group besides what the supervisor tells it.
    """
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def on_signal(number: signal.Signals) -> None:
        if not stop.done():
            stop.set_result(None)
        elif alone:
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    if not alone:
        # To the supervisor it means a replacement; it must not end us when the whole group gets it.
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
    return stop


def stop_at_end_of_input(stop: asyncio.Future[None]) -> None:
    """Resolves the future when the supervisor closes our standard input, or is gone."""
    loop = asyncio.get_running_loop()

    def end() -> None:
        if not stop.done():
            stop.set_result(None)

    def read() -> None:
        os.read(sys.stdin.fileno(), 1)
        with contextlib.suppress(RuntimeError):  # the loop has ended before
            loop.call_soon_threadsafe(end)

    threading.Thread(target=read, name="leash", daemon=True).start()
