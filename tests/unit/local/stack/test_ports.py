"""Ports that are free stay free for whoever picked them."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from local.stack.ports import LOOPBACK, free_ports, free_run, is_free

TAKES_ALL = """
from local.stack import ports
for _ in range(ports._COUNT // ports._BLOCK):
    ports._own_ports()
    ports._own_ports.cache_clear()
print(*ports.free_ports(5), ports.free_run(4))
"""
PICKS = "from local.stack.ports import free_ports; print(*free_ports(100), flush=True); input()"


def test_ports_are_free_different_and_not_picked_twice_in_a_row() -> None:
    first, second = free_ports(20), free_ports(20)
    assert len({*first, *second}) == 40
    assert all(map(is_free, first))


def test_ports_in_a_row_are_all_free_and_nobodys() -> None:
    before = free_ports(1)[0]
    with socket.socket() as taken:
        taken.bind((LOOPBACK, before + 2))
        runs = [free_run(4), free_run(4)]
        after = free_ports(1)[0]
        ports = {port for first in runs for port in range(first, first + 4)}
        assert len(ports) == 8
        assert not ports & {before, before + 2, after}
        assert all(map(is_free, ports))


def test_processes_that_pick_at_the_same_time_never_pick_the_same() -> None:
    command = [sys.executable, "-c", PICKS]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    picked: list[str] = []
    for process in started:
        assert process.stdout is not None
        picked += process.stdout.readline().split()
    for process in started:
        process.communicate("\n", timeout=30)
    assert len(set(picked)) == len(picked) == 300


def test_where_every_block_is_taken_ports_are_picked_from_all(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TAKES_ALL], env={"TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert len(set(done.stdout.split())) == 6
