"""What tells a server process to stop: a signal, or the end of its standard input, which its supervisor holds open."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable


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


class Leash:
    """Ends this process with its supervisor, which holds the other end of our standard input.

    It is held from the first moment on. As long as nothing was started, the end of the input ends the process at once.
    From `drain` on it stops the server, which then has its time to drain; after that the kernel ends the process,
    whatever it hangs in: a supervisor that was killed does not.
    """

    def __init__(self) -> None:
        self._on_cut: Callable[[], None] = lambda: os._exit(0)
        threading.Thread(target=self._hold, name="leash", daemon=True).start()

    def drain(self, stop: asyncio.Future[None], within_seconds: float) -> None:
        """From now on, resolves `stop` when the leash is cut, and ends the process `within_seconds` after that."""
        loop = asyncio.get_running_loop()

        def end() -> None:
            if not stop.done():
                stop.set_result(None)

        def on_cut() -> None:
            signal.setitimer(signal.ITIMER_REAL, within_seconds)  # SIGALRM, which nothing here handles
            with contextlib.suppress(RuntimeError):  # the loop has ended before
                loop.call_soon_threadsafe(end)

        self._on_cut = on_cut

    def _hold(self) -> None:
        os.read(sys.stdin.fileno(), 1)
        self._on_cut()
