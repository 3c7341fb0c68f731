"""How often the comparison with the training data calls drift where there is none, and whether it sees what there is.

`PYTHONPATH=tests python -m support.drift_alarms [--runs 150]` prints the table of `docs/audit.md`. A feature follows a
Gaussian AR(1) process whose correlation dies out exponentially in τ. Twenty minutes of it are learnt from as training
does, on its grid of 0.2 s; the decisions of another time are sampled as `AuditQuery.spread` does at 1,000 orders a
second: 120 times in the window, 16 decisions of a few milliseconds each. One feature is compared, so that the limit is
what one comparison in a hundred exceeds by chance.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from server.drift.psi import Reference
from server.drift.summary import FALSE_ALARMS, Column
from torchserve.dataset import STEP_NS, Samples
from torchserve.reference import reference_histogram

NAME: Final = "BTCUSDT.SIM"
LEARNT_SECONDS: Final = 1_200.0
_STEP_SECONDS: Final = STEP_NS / 1e9
_PARTS, _EACH = 120, 16


@dataclass(frozen=True)
class Rates:
    """Shares of the comparisons."""

    judged: float
    """In which there were enough independent values to say anything."""
    false_alarms: float
    """That called drift, where there was none."""
    found: float
    """That called drift, where the mean had moved by a standard deviation."""
    independent: float
    """Median of the independent values of a sample."""


def rates(random: np.random.Generator, runs: int, memory_seconds: float, window_seconds: float) -> Rates:
    """What comes of so many comparisons.

    Args:
        random: Chance.
        runs: Comparisons.
        memory_seconds: τ of the feature.
        window_seconds: Time whose decisions are compared.
    """
    learnt = autoregressive(random, runs, round(LEARNT_SECONDS / _STEP_SECONDS), memory_seconds)
    now = autoregressive(random, runs, round(window_seconds / _STEP_SECONDS), memory_seconds)
    every = now.shape[1] // _PARTS
    at = np.arange(_PARTS) * every + every - 1
    seconds = np.repeat(at * _STEP_SECONDS, _EACH) + np.tile(np.arange(_EACH) * 1e-3, _PARTS)
    names = np.array([NAME] * len(seconds))
    found = []
    for before, after in zip(learnt, now, strict=True):
        reference = Reference.of(asdict(reference_histogram(before, _samples(len(before)))))
        values = np.repeat(after[at], _EACH)
        found.append([Column("f", reference, values + moved, names).drift(seconds, FALSE_ALARMS) for moved in (0, 1)])
    return Rates(
        judged=float(np.mean([not same.too_few for same, _ in found])),
        false_alarms=float(np.mean([same.drifted for same, _ in found])),
        found=float(np.mean([moved.drifted for _, moved in found])),
        independent=float(np.median([same.independent for same, _ in found])),
    )


def autoregressive(random: np.random.Generator, runs: int, count: int, memory_seconds: float) -> NDArray[np.float64]:
    """float64[runs, count]: stationary series of unit variance on the grid, with the autocorrelation exp(-lag / τ)."""
    decay = np.exp(-_STEP_SECONDS / memory_seconds)
    series = random.normal(size=(count, runs))
    for number in range(1, count):
        series[number] = decay * series[number - 1] + np.sqrt(1 - decay**2) * series[number]
    return series.T


def _samples(count: int) -> Samples:
    """Buys of one instrument, one a step of the grid."""
    return Samples(
        rows=np.zeros((count, 0), np.float32),
        eligible=np.zeros(count, np.bool_),
        markout_bps=np.zeros(count),
        time_ns=np.arange(count, dtype=np.int64) * STEP_NS,
        sell=np.zeros(count, np.bool_),
        instrument=np.zeros(count, np.int16),
        instruments=(NAME,),
        source="test",
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=150, help="comparisons a line")
    runs = parser.parse_args().runs
    print("| τ | window | independent values | judged | false alarms | one standard deviation found |")
    print("|---|---|---|---|---|---|")
    for window in (900.0, 3_600.0):
        for memory in (0.5, 2.0, 5.0, 10.0, 30.0):
            one = rates(np.random.default_rng(int(memory * 10)), runs, memory, window)
            shares = " | ".join(f"{share:.1%}" for share in (one.judged, one.false_alarms, one.found))
            print(f"| {memory:g} s | {window:,.0f} s | {one.independent:.0f} | {shares} |")


if __name__ == "__main__":
    main()
