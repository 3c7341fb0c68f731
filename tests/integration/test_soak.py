"""The soak against real processes: one that is sound, and one that leaks memory and descriptors."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from loadtest.benchmark.echo import echo_server
from loadtest.studies.watched import DESCRIPTORS, MEMORY, PROCESSES, THREADS
from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = [pytest.mark.stack, pytest.mark.long]

RESPONSE: Final = pb.DecideResponse(decision=pb.Decision(action=pb.ACTION_TRADE, source=pb.SOURCE_PRIMARY))
IDLE: Final = "import time; print(flush=True); time.sleep(600)"
LEAKING: Final = """
import os, time
held = []
print(flush=True)
while True:
    held.append(bytearray(os.urandom(1 << 20)))
    held.append(open(os.devnull))
    time.sleep(0.1)
"""


async def soak_beside(program: str, path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Ten seconds of orders to a sound server, while a process that runs `program` is watched."""
    watched = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    try:
        assert watched.stdout
        await watched.stdout.readline()
        async with echo_server(RESPONSE) as target:
            soak = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "loadtest.studies.soak", "--target", target, "--instrument", "BTCUSDT.BINANCE"),
                *("--rate", "50", "--minutes", "0.2", "--every", "0.2", "--deadline-ms", "10000"),
                *("--process", f"watched={watched.pid}", "--json", str(path), *options),
            )
            code = await soak.wait()
        return code, json.loads(await asyncio.to_thread(path.read_text))
    finally:
        watched.kill()
        await watched.wait()


async def test_a_sound_process_is_flat_and_every_order_is_counted(tmp_path: Path) -> None:
    code, seen = await soak_beside(IDLE, tmp_path / "soak.json")
    assert seen["decisions"] == 600
    assert seen["errors"] == 0
    held = {(one["what"], one["flat"]) for one in seen["trends"] if one["who"].startswith("watched")}
    assert held == {(MEMORY, True), (DESCRIPTORS, True), (THREADS, True), (PROCESSES, True)}
    assert code == (0 if seen["flat"] else 1)  # its p50 is this machine's


async def test_a_process_that_leaks_fails_the_soak_and_is_named(tmp_path: Path) -> None:
    code, seen = await soak_beside(LEAKING, tmp_path / "soak.json")
    assert code == 1
    grows = {one["what"] for one in seen["trends"] if one["who"].startswith("watched") and not one["flat"]}
    assert grows == {MEMORY, DESCRIPTORS}


async def test_orders_that_nobody_answers_fail_the_soak(tmp_path: Path) -> None:
    code, seen = await soak_beside(IDLE, tmp_path / "soak.json", "--deadline-ms", "1", "--rate", "2000")
    assert seen["errors"] > 0
    assert code == 1


async def test_a_soak_that_is_interrupted_is_judged_by_what_it_saw(tmp_path: Path) -> None:
    path = tmp_path / "soak.json"
    async with echo_server(RESPONSE) as target:
        soak = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loadtest.studies.soak", "--target", target, "--instrument", "BTCUSDT.BINANCE"),
            *("--rate", "50", "--minutes", "0.5", "--warm-up", "0", "--every", "0.2", "--json", str(path)),
            stdout=asyncio.subprocess.PIPE,
        )
        assert soak.stdout
        for _ in range(8):  # slices of a second
            await soak.stdout.readline()
        soak.terminate()
        output, _ = await soak.communicate()
    assert soak.returncode in {0, 1}, output
    seen = json.loads(await asyncio.to_thread(path.read_text))
    assert 300 < seen["decisions"] + seen["errors"] < 1_500
    assert 6 < seen["seconds"] < 30
