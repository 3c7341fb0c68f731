"""Costs of a machine that is made up, for tests of the capacity model: round numbers, no part of them 0."""

from __future__ import annotations

from typing import Final

from loadtest.costs import Costs, Cpu, Database, Features, Measured, Replica, Stage

COSTS: Final = Costs(
    measured=Measured(rate=100_000),
    replica=Replica(batch_ms=1.2, gap_ms=1.0, row_us=1.2, sigma=0.5),
    journal=Stage(batch_ms=1.0, row_us=5.0, sigma=0.6),
    rest=Stage(batch_ms=1.0, row_us=0.0, sigma=0.5),
    loop=Cpu(base_cores=0.02, batch_us=100, row_us=130),
    server=Cpu(base_cores=0.05, batch_us=200, row_us=250),
    primary=Cpu(base_cores=0.03, batch_us=600, row_us=3),
    shadow=Cpu(base_cores=0.03, batch_us=600, row_us=3),
    standby=Cpu(base_cores=0.03, batch_us=1, row_us=1),
    stores=Cpu(base_cores=0.02, batch_us=1, row_us=60),
    features=Features(event_us=13),
    database=Database(
        rows_per_second=18_600,
        rows_per_decision=1.0,
        bytes_per_decision=3_000,
        journal_bytes_per_decision=1_500,
        cold_bytes_per_decision=167,
    ),
)
