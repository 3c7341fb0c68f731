"""The comparison of servers by the durability of their audit, on real servers that answer at once."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from loadtest.benchmark.echo import echo_server
from pretrade.decision.v1 import decision_pb2 as pb


@pytest.mark.long
async def test_every_server_is_measured_in_every_round_and_held_to_the_last(tmp_path: Path) -> None:
    response = pb.DecideResponse(decision=pb.Decision(action=pb.ACTION_TRADE, source=pb.SOURCE_RULES))
    async with echo_server(response) as first, echo_server(response) as second:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loadtest.studies.durability", "--instrument", "BTCUSDT.SIM"),
            *("--server", f"fsync={first}", "--server", f"off={second}"),
            *("--rounds", "2", "--seconds", "0.1", "--deadline-ms", "10000", "--json", str(tmp_path / "costs.json")),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert [(cost["server"], cost["callers"]) for cost in costs] == [
        (server, callers) for callers in (1, 16, 64) for server in ("fsync", "off")
    ]
    assert all(cost["decisions"] > 0 and not cost["errors"] for cost in costs)
    assert "+0.0%" in output.decode()  # the last against itself
