"""One supervised child process: started, waited for, signalled, restarted and stopped with everything it started."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Final

import psutil

from local.stack.errors import NotReadyError, PartFailedError, StartCancelledError
from local.stack.guard import Family, Guard, signal_group

_PROBE_INTERVAL_SECONDS: Final = 0.05
_KILL_SECONDS: Final = 10.0
_NEVER: Final = threading.Event()


class Process:
    """A program, its log file and everything it starts.

    The program leads a session of its own, so that a Ctrl-C in the terminal reaches only us. Its standard output and
    error are appended to the log. All methods block and may be called from any thread, but one at a time; `stop` may be
    called whatever happened before.

    Args:
        name: The part's name, for messages.
        argv: Program and arguments. The same at every start, so a restart serves the same port.
        directory: Its working directory; made when missing.
        log_path: Its log; made with its directory when missing.
        guard: Who ends it when we cannot.
        ready: Returns when the program does its real work, raises `NotReadyError` as long as it does not. It has its
            own short timeout. None: it is ready when it runs.
        start_timeout_seconds: Time from start to ready.
        stop_timeout_seconds: Time from the stop signal to SIGKILL.
        env: Its whole environment; None for ours.
        user: The user to become, when we are root; None to stay who we are.
        stop_signal: What asks it to end.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        directory: Path,
        log_path: Path,
        guard: Guard,
        ready: Callable[[], None] | None = None,
        start_timeout_seconds: float,
        stop_timeout_seconds: float,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._directory = directory
        self._guard = guard
        self._ready = ready
        self._start_timeout = start_timeout_seconds
        self._stop_timeout = stop_timeout_seconds
        self._env = env
        self._stop_signal = stop_signal
        self._argv = [*guard.launcher(stop_signal, user), *argv]
        self._child: subprocess.Popen[bytes] | None = None
        self._family: Family | None = None  # None when nothing of it is left: its number may mean another by then
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """Process id of the program, also after its end; None before the first start."""
        return self._child.pid if self._child else None

    @property
    def alive(self) -> bool:
        """Whether the program itself runs; a stopped (SIGSTOP) one does."""
        return self._child is not None and self._child.poll() is None

    @property
    def ending(self) -> str:
        """How the program ended, for people; empty while it runs or before it was started."""
        code = self._child.poll() if self._child else None
        if code is None:
            return ""
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def start(self, cancelled: threading.Event = _NEVER) -> None:
        """Starts the program and blocks until it is ready; does nothing when it runs.

        Raises:
            PartFailedError: It ended, or was not ready in time; it has been stopped.
            StartCancelledError: `cancelled` was set meanwhile; it has been stopped.
        """
        if self.alive:
            return
        self.stop()  # what the program may have left when it ended by itself
        self._spawn()
        try:
            self._wait_ready(cancelled)
        except BaseException:
            self.stop()
            raise

    def run(self, cancelled: threading.Event = _NEVER, told: Callable[[str], None] = lambda line: None) -> None:
        """Runs a program that ends by itself and blocks until it has, at most the start timeout.

        Args:
            cancelled: Gives it up when set.
            told: Called with the last line that the program wrote, whenever it changes.

        Raises:
            PartFailedError: Its exit code is not 0, or it took too long and was stopped.
            StartCancelledError: `cancelled` was set meanwhile; it has been stopped.
        """
        child = self._spawn()
        deadline = time.monotonic() + self._start_timeout
        last_line = ""
        try:
            while child.poll() is None:
                self._give_up_if(cancelled, deadline, "did not finish")
                if (line := self.log_tail(1)) != last_line:
                    last_line = line
                    told(line)
                self._wait_exit(_PROBE_INTERVAL_SECONDS)
        finally:
            self.stop()
        if child.returncode != 0:
            raise self.failure(self.ending)

    def restart(self) -> None:
        """Stops the process and starts it again on the same port; blocks until ready. Raises what `start` does."""
        self.stop()
        self.start()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the whole group; does nothing when none of it is left."""
        if self._family is not None:
            signal_group(self._family.leader, number)

    def kill(self) -> None:
        """Ends the program and everything it started with SIGKILL, and blocks until it is gone."""
        if self._family is not None:
            self._family.signal(signal.SIGKILL)
        self._wait_gone(_KILL_SECONDS)

    def pause(self) -> None:
        """Stops the whole group with SIGSTOP: it keeps its connections and answers nothing."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a paused group go on."""
        self.signal(signal.SIGCONT)

    def stop(self) -> None:
        """Asks the program to end, gives it its grace, then kills what is left of it and of what it started.

        Safe to call twice.
        """
        if self.alive and self._family is not None:
            self._family.signal(0)  # who is who, before their parents end
            self.signal(self._stop_signal)
            self.resume()  # a paused program would not hear of it
            self._wait_exit(self._stop_timeout)
        if not self._wait_gone(0.0):
            self.kill()

    def wait(self, timeout_seconds: float) -> bool:
        """Waits until the program has ended; False when it still runs after the timeout."""
        return self._wait_exit(timeout_seconds)

    def log_tail(self, lines: int = 15) -> str:
        """The last lines the program wrote since its last start."""
        try:
            with self.log_path.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, end - 65536))
                text = log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def failure(self, reason: str) -> PartFailedError:
        """The error that says that, and why, this part failed, with the end of its log."""
        return PartFailedError(self.name, reason, self.log_path, self.log_tail())

    def tree(self) -> list[psutil.Process]:
        """The program and everything it started, as of now."""
        if not self.alive or self.pid is None:
            return []
        try:
            top = psutil.Process(self.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def memory_bytes(self) -> int:
        """Memory of the whole tree: proportional set size, or resident where the system does not tell it."""
        return sum(map(_memory_bytes, self.tree()))

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._directory.mkdir(parents=True, exist_ok=True)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._child = self._popen(log)
        self._family = Family(self._child.pid)
        return self._child

    def _popen(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - programs from wheels, arguments of our own
            self._argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=self._directory,
            env=self._env,
            pass_fds=(self._guard.pipe,),
            start_new_session=True,
        )

    def _wait_ready(self, cancelled: threading.Event) -> None:
        deadline = time.monotonic() + self._start_timeout
        while True:
            try:
                if self._ready:
                    self._ready()
                missing = ""
            except NotReadyError as error:
                missing = str(error)
            # Whatever answered on its port, it is not this program if this program has ended.
            if not self.alive:
                raise self.failure(f"{self.ending} before it was ready")
            if not missing:
                return
            self._give_up_if(cancelled, deadline, f"was not ready ({missing})")
            self._wait_exit(_PROBE_INTERVAL_SECONDS)

    def _give_up_if(self, cancelled: threading.Event, deadline: float, reason: str) -> None:
        if cancelled.is_set():
            raise StartCancelledError(self.name)
        if time.monotonic() >= deadline:
            raise self.failure(f"{reason} after {self._start_timeout:g} s")

    def _wait_exit(self, timeout_seconds: float) -> bool:
        """Waits for the program itself; True when it has ended."""
        assert self._child is not None
        try:
            self._child.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _wait_gone(self, timeout_seconds: float) -> bool:
        """Waits for everything it started and tells the guard of its end; True when nothing is left."""
        if self._child is None or self._family is None:
            return True
        deadline = time.monotonic() + timeout_seconds
        while self._family.signal(0):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)  # the end of a grandchild is announced to nobody but its parent
        self._child.wait()
        self._guard.forget(self._family.leader)
        self._family = None
        return True


def _memory_bytes(process: psutil.Process) -> int:
    try:
        memory = process.memory_full_info()
    except psutil.Error:  # it has just ended
        return 0
    return getattr(memory, "pss", 0) or memory.rss
