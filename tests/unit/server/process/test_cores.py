"""A server stays on the cores that were chosen for it, and what it starts beside itself stays off them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pydantic import BaseModel, ValidationError

from server.process import child, cores
from server.settings import Settings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has cores to choose")

ALLOWED = os.sched_getaffinity(0)
FIRST, *OTHERS = sorted(ALLOWED)
needs_two = pytest.mark.skipif(not OTHERS, reason="needs two cores")


class Nothing(BaseModel):
    """A task."""


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cores, "_chosen", set())
    yield
    os.sched_setaffinity(0, ALLOWED)


@contextmanager
def another() -> Iterator[int]:
    """A process that runs until its input ends."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as one:
        yield one.pid


def test_a_server_stays_on_its_cores_with_the_threads_that_it_starts() -> None:
    found: list[set[int]] = []
    cores.pin({FIRST})
    thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    assert [os.sched_getaffinity(0), *found] == [{FIRST}, {FIRST}]


@needs_two
async def test_what_a_server_starts_beside_itself_stays_off_its_cores() -> None:
    cores.pin({FIRST})
    process = await child.start("code", Nothing())  # it reads its input to the end
    try:
        assert FIRST not in os.sched_getaffinity(process.pid)
        assert os.sched_getaffinity(process.pid) >= set(OTHERS)
    finally:
        await child.end(process)


def test_without_a_choice_nothing_is_pinned() -> None:
    cores.pin(None)
    with another() as pid:
        cores.keep_off(pid)
        assert (os.sched_getaffinity(0), os.sched_getaffinity(pid)) == (ALLOWED, ALLOWED)


def test_where_a_server_has_every_core_its_children_run_there_too() -> None:
    cores.pin(range(os.cpu_count() or 1))
    with another() as pid:
        before = os.sched_getaffinity(pid)
        cores.keep_off(pid)
        assert os.sched_getaffinity(pid) == before


def test_cores_that_are_not_there_are_refused_by_the_name_of_the_setting() -> None:
    with pytest.raises(OSError, match=r"cannot run on the cores \[1023\] of PRETRADE_CORES"):
        cores.pin({1023})


def test_the_setting_is_a_list_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRADE_CORES", "[0, 2]")
    assert Settings().cores == (0, 2)
    for wrong in ("[]", "[-1]"):
        monkeypatch.setenv("PRETRADE_CORES", wrong)
        with pytest.raises(ValidationError):
            Settings()
