"""Supervised processes and their guard, with small programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import pytest

from local.stack.errors import NotReadyError, PartFailedError, StartCancelledError
from local.stack.guard import Guard
from local.stack.ports import default_port, free_ports
from local.stack.process import Process

pytestmark = pytest.mark.stack

READY = "open('ready', 'w').close();"
FOREVER = "import threading; threading.Event().wait()"
IGNORE_TERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
GRANDCHILD = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {IGNORE_TERM + READY + FOREVER!r}]);"


@pytest.fixture
def guard() -> Iterator[Guard]:
    guard = Guard(grace_seconds=0.2)
    yield guard
    guard.close()


@pytest.fixture
def python(tmp_path: Path, guard: Guard) -> Iterator[Callable[..., Process]]:
    """Makes a process that runs Python code and is ready once the code has made the file `ready`."""
    made: list[Process] = []

    def file_exists() -> None:
        if not (tmp_path / "ready").exists():
            raise NotReadyError("there is no file")

    def make(
        code: str,
        *,
        ready: Callable[[], None] = file_exists,
        start_timeout_seconds: float = 20.0,
        stop_timeout_seconds: float = 20.0,
    ) -> Process:
        process = Process(
            "python",
            [sys.executable, "-c", code],
            directory=tmp_path,
            log_path=tmp_path / "log",
            guard=guard,
            ready=ready,
            start_timeout_seconds=start_timeout_seconds,
            stop_timeout_seconds=stop_timeout_seconds,
        )
        made.append(process)
        return process

    yield make
    for process in made:
        process.stop()


def lives(pid: int | None) -> bool:
    assert pid is not None
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_process_runs_from_start_to_stop(python: Callable[..., Process]) -> None:
    process = python(READY + FOREVER)
    assert process.pid is None
    process.start()
    assert (process.alive, process.ending) == (True, "")
    assert lives(process.pid)
    process.stop()
    assert (process.alive, process.ending) == (False, "was ended by SIGTERM")
    assert not lives(process.pid)
    process.stop()


def test_starting_a_running_process_changes_nothing(python: Callable[..., Process]) -> None:
    process = python(READY + FOREVER)
    process.start()
    pid = process.pid
    process.start()
    assert process.pid == pid
    process.restart()
    assert process.pid != pid


def test_a_process_that_ends_before_it_is_ready_has_failed_and_says_how(python: Callable[..., Process]) -> None:
    process = python("print('no such file: x'); raise SystemExit(3)")
    with pytest.raises(PartFailedError, match="ended with exit code 3 before it was ready") as failure:
        process.start()
    assert failure.value.log_tail == "no such file: x"
    assert failure.value.log_path == process.log_path


def test_a_process_that_has_ended_is_not_ready_whatever_answers_on_its_port(python: Callable[..., Process]) -> None:
    made: list[Process] = []

    def answer_after_its_end() -> None:
        assert made[0].wait(20)

    made.append(python("pass", ready=answer_after_its_end))
    with pytest.raises(PartFailedError, match="ended with exit code 0 before it was ready"):
        made[0].start()


def test_a_process_that_is_never_ready_is_stopped_and_the_probe_is_quoted(python: Callable[..., Process]) -> None:
    process = python(FOREVER, start_timeout_seconds=0.3)
    with pytest.raises(PartFailedError, match=r"was not ready \(there is no file\) after 0\.3 s"):
        process.start()
    assert not process.alive


def test_a_start_can_be_cancelled(python: Callable[..., Process]) -> None:
    process = python(FOREVER)
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(StartCancelledError):
        process.start(cancelled)
    assert not process.alive


def test_a_process_that_does_not_listen_is_killed_after_its_grace(python: Callable[..., Process]) -> None:
    process = python(IGNORE_TERM + READY + FOREVER, stop_timeout_seconds=0.2)
    process.start()
    process.stop()
    assert process.ending == "was ended by SIGKILL"


def test_stop_reaches_grandchildren_that_do_not_listen(python: Callable[..., Process]) -> None:
    process = python(GRANDCHILD + FOREVER)
    process.start()
    tree = process.tree()
    assert len(tree) == 2
    process.stop()
    assert not any(lives(member.pid) for member in tree)


def test_kill_reaches_grandchildren(python: Callable[..., Process]) -> None:
    process = python(GRANDCHILD + FOREVER)
    process.start()
    tree = process.tree()
    process.kill()
    assert not any(lives(member.pid) for member in tree)
    assert process.tree() == []


def test_a_start_ends_what_the_last_one_left(python: Callable[..., Process], tmp_path: Path) -> None:
    process = python(GRANDCHILD + FOREVER)
    process.start()
    program, grandchild = process.tree()
    program.kill()
    assert process.wait(20)
    assert lives(grandchild.pid)
    (tmp_path / "ready").unlink()
    process.start()
    assert not lives(grandchild.pid)
    assert process.pid != program.pid


def test_the_log_tail_is_of_the_last_start(python: Callable[..., Process], tmp_path: Path) -> None:
    process = python("import os; print(os.getpid(), flush=True);" + READY + FOREVER)
    process.start()
    first = process.log_tail()
    assert first == str(process.pid)
    process.stop()
    (tmp_path / "ready").unlink()
    process.start()
    assert process.log_tail() == str(process.pid)
    assert process.log_path.read_text().split() == [first, process.log_tail()]


def test_a_program_is_run_to_its_end(python: Callable[..., Process], tmp_path: Path) -> None:
    python("print('done')").run()
    assert (tmp_path / "log").read_text() == "done\n"
    with pytest.raises(PartFailedError, match="ended with exit code 1"):
        python("raise SystemExit(1)").run()
    with pytest.raises(PartFailedError, match=r"did not finish after 0\.2 s"):
        python(FOREVER, start_timeout_seconds=0.2).run()


def test_what_a_program_says_is_told(python: Callable[..., Process]) -> None:
    said = threading.Event()
    process = python("print('half', flush=True);" + FOREVER)

    def told(line: str) -> None:
        assert line == "half"
        said.set()

    with pytest.raises(StartCancelledError):
        process.run(said, told=told)


def test_a_child_is_in_a_session_of_its_own_and_does_not_hold_the_guards_pipe(python: Callable[..., Process]) -> None:
    process = python(READY + FOREVER)
    process.start()
    assert process.pid is not None
    assert os.getsid(process.pid) == process.pid
    if sys.platform == "linux":
        open_files = [str(entry.readlink()) for entry in Path(f"/proc/{process.pid}/fd").iterdir()]
        assert not any(name.startswith("pipe:") for name in open_files)


def test_closing_the_guard_ends_what_is_left(tmp_path: Path) -> None:
    guard = Guard(grace_seconds=0.2)
    process = Process(
        "python",
        [sys.executable, "-c", GRANDCHILD + FOREVER],
        directory=tmp_path,
        log_path=tmp_path / "log",
        guard=guard,
        start_timeout_seconds=20.0,
        stop_timeout_seconds=20.0,
    )
    process.start()
    deadline = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        process.wait(0.01)
    tree = process.tree()
    assert len(tree) == 2
    guard.close()
    guard.close()
    process.wait(20)
    assert not any(lives(member.pid) for member in tree)


WANDERERS = f"""
import subprocess, sys
code = {IGNORE_TERM + "open(sys.argv[1], 'w').close();" + FOREVER!r}
for name, options in (("group", dict(process_group=0)), ("session", dict(start_new_session=True))):
    subprocess.Popen([sys.executable, "-c", "import sys;" + code, name], **options)
"""
"""Starts one process in a group of its own, as a supervisor does with Envoy, and one in a session of its own."""


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.01)


def wait_for(*paths: Path) -> None:
    wait_until(lambda: all(path.exists() for path in paths), f"not all of {paths}")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing that we start leaves its group")
@pytest.mark.parametrize("end", [Process.stop, Process.kill])
def test_what_left_its_group_or_session_ends_as_well(
    python: Callable[..., Process], tmp_path: Path, end: Callable[[Process], None]
) -> None:
    process = python(WANDERERS + READY + FOREVER, stop_timeout_seconds=0.2)
    process.start()
    wait_for(tmp_path / "group", tmp_path / "session")
    tree = process.tree()
    assert len(tree) == 3
    with killed_in_the_end(tree):
        end(process)
        assert not any(lives(member.pid) for member in tree)


@contextmanager
def killed_in_the_end(processes: list[psutil.Process]) -> Iterator[None]:
    """A test that fails leaves nothing behind either."""
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()


class KilledStack:
    """A process that starts programs under a guard as the stack does, to be killed."""

    CODE = """
import json, os, signal, subprocess, sys
from pathlib import Path
from local.stack.guard import Guard

guard = Guard(grace_seconds=float(sys.argv[1]))
guard.remove_at_end(Path("folder/in-use"))
for code, stopped in json.loads(sys.argv[2]):
    argv = [*guard.launcher(), sys.executable, "-c", code]
    if stopped:  # before it registers
        argv = ["sh", "-c", 'kill -STOP $$; exec "$@"', "sh", *argv]
    child = subprocess.Popen(argv, pass_fds=(guard.pipe,), start_new_session=True)
    print(child.pid, flush=True)
print(guard.pid, flush=True)
signal.pause()
"""

    def __init__(self, directory: Path, grace_seconds: float, *programs: tuple[str, bool]) -> None:
        (directory / "folder" / "below").mkdir(parents=True)
        argv = [sys.executable, "-c", self.CODE, str(grace_seconds), json.dumps(programs)]
        self._stack = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=directory)
        assert self._stack.stdout is not None
        with self._stack.stdout as told:
            self.programs = [psutil.Process(int(told.readline())) for _ in programs]
            self.guard = psutil.Process(int(told.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        self._stack.kill()
        self._stack.wait()

    def wait_until_the_guard_is_done(self) -> None:
        _, alive = psutil.wait_procs([self.guard], timeout=20)
        assert not alive


HOLDS_OUT = """
import signal
signal.signal(signal.SIGTERM, lambda *_: open('told', 'w').close())
open('ready', 'w').close()
while True:
    signal.pause()
"""
"""Says when it is told to end, and does not."""


def test_a_child_that_was_just_being_started_when_the_stack_was_killed_never_becomes_its_program(
    tmp_path: Path,
) -> None:
    programs = ((HOLDS_OUT, False), ("open('late', 'w').close();" + FOREVER, True))
    with KilledStack(tmp_path, 1.0, *programs) as stack, killed_in_the_end(stack.programs):
        late = stack.programs[1]
        wait_until(lambda: late.status() == psutil.STATUS_STOPPED, "it was not stopped")
        assert "launch.py" in " ".join(late.cmdline())
        wait_for(tmp_path / "ready")
        stack.kill()
        wait_for(tmp_path / "told")  # the guard has read what there was to read
        late.resume()
        stack.wait_until_the_guard_is_done()
        psutil.wait_procs([late], timeout=5)
        assert not any(lives(program.pid) for program in stack.programs)
        assert not (tmp_path / "late").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing that we start leaves its group")
def test_a_killed_stack_leaves_neither_processes_of_other_groups_nor_folders(tmp_path: Path) -> None:
    with KilledStack(tmp_path, 0.2, (WANDERERS + HOLDS_OUT, False)) as stack:
        wait_for(tmp_path / "ready", tmp_path / "group", tmp_path / "session")
        family = [*stack.programs, *stack.programs[0].children()]
        assert len(family) == 3
        with killed_in_the_end(family):
            stack.kill()
            stack.wait_until_the_guard_is_done()
            assert not any(lives(member.pid) for member in family)
            assert not (tmp_path / "folder").exists()


def test_a_guard_ignores_what_ends_other_processes(guard: Guard, python: Callable[..., Process]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(guard.pid, number)
    process = python(READY + FOREVER)
    process.start()
    assert lives(guard.pid)


def test_nothing_is_started_without_its_guard(guard: Guard, python: Callable[..., Process]) -> None:
    os.kill(guard.pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(guard.pid)], timeout=20)
    process = python(READY + FOREVER)
    with pytest.raises(PartFailedError, match="ended with exit code 1 before it was ready") as failure:
        process.start()
    assert "BrokenPipeError" in failure.value.log_tail


def test_free_ports_are_different_and_can_be_listened_on() -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert all(20_000 <= port < 32_000 for port in ports)


def test_a_default_port_is_one_stacks_until_it_has_ended() -> None:
    (port,) = free_ports(1)
    with ExitStack() as one, ExitStack() as other:
        assert default_port(port, one) == port
        assert default_port(port, other) is None
        one.close()
        assert default_port(port, other) == port
