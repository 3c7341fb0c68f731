"""How often a canary is rolled back, promoted, or neither, by simulation: `python -m server.canary.study`.

It prints the tables of `docs/canary.md`. Two models see a market that has states: what they see, what they make of it,
and what becomes of an order last for a while, and all rows of that while share them. The champion's score is
P(eligible) by a signal x with noise of its own, s = sigmoid(1 + 1.5 (x + noise)); the canary's is the same with other
noise. Rows of one instrument within the horizon are gathered as a server does (`GatheredCheck`), and the tests are
those of `SequentialTest`, for many runs at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from server.canary.evidence import NEW_BET, Evidence
from server.canary.sequential import STAKES
from server.canary.settings import CanarySettings

Values = NDArray[np.float64]
NEVER: Final = 1 << 40
"""An observation that is never reached."""
ROWS: Final = 10
"""Rows of an instrument within the horizon, where nothing else is said."""
_SETTINGS: Final = CanarySettings()
_THRESHOLD: Final = 0.7


# The tests of `SequentialTest`, for many runs at once. ----------------------------------------------------------------


def exceeded_at(differences: Values, tolerance: float, probability: float) -> NDArray[np.int64]:
    """int64[runs]: the observation after which each run says `exceeded`; `NEVER` where it never does.

    Args:
        differences: float64[runs, observations] in [-1, 1].
        tolerance: See `SequentialTest`.
        probability: Of a false alarm.
    """
    money = np.zeros(differences.shape[1])
    bets = np.arange(1, (len(money) - 1) // NEW_BET + 2)
    money[::NEW_BET] = 1 / (bets * (bets + 1))
    return _reached_at(differences - tolerance, money, 1 + tolerance, 1 / probability)


def kept_at(differences: Values, tolerance: float, probability: float) -> NDArray[np.int64]:
    """int64[runs]: the same for `kept`, without a restart."""
    money = np.zeros(differences.shape[1])
    money[0] = 1
    return _reached_at(tolerance - differences, money, 1 - tolerance, 1 / probability)


def _reached_at(payoffs: Values, money: Values, worst: float, goal: float) -> NDArray[np.int64]:
    stakes = np.array(STAKES) / worst
    wealths = np.zeros((len(payoffs), len(stakes)))
    found = np.full(len(payoffs), NEVER)
    for number, (payoff, more) in enumerate(zip(payoffs.T, money, strict=True), 1):
        wealths = np.minimum((wealths + more) * (1 + stakes * payoff[:, None]), 1e200)
        found[(found == NEVER) & (wealths.mean(axis=1) >= goal)] = number
    return found


# The market. ----------------------------------------------------------------------------------------------------------


def lasting(random: np.random.Generator, states: Values, memory: float) -> Values:
    """float64[runs, rows]: states that each last for a random number of rows, on average `memory`, whatever the clock.

    Args:
        random: Chance.
        states: float64[runs, rows], of which those are taken at which a state begins.
        memory: In rows; up to 1, every row is a state of its own.
    """
    begins = random.random(states.shape) < 1 / max(memory, 1.0)
    begins[:, 0] = True
    return np.take_along_axis(states, np.maximum.accumulate(np.where(begins, np.arange(states.shape[1]), 0), 1), 1)


def gathered(rows: Values, each: int = ROWS) -> Values:
    """float64[runs, observations]: the means of so many rows in a row."""
    means: Values = rows.reshape(len(rows), -1, each).mean(axis=2)
    return means


@dataclass(frozen=True)
class Trial:
    """Rows of many runs that two models scored: float64 or bool [runs, rows]."""

    canary: Values
    champion: Values
    canary_trades: NDArray[np.bool_]
    champion_trades: NDArray[np.bool_]
    eligible: NDArray[np.bool_]

    def differences(self) -> dict[str, Values]:
        """By check, canary less champion, row by row; without `rank`."""
        brier = (self.canary - self.eligible) ** 2 - (self.champion - self.eligible) ** 2
        more = self.canary_trades.astype(float) - self.champion_trades
        return {
            "disagreement": np.abs(more),
            "score_shift": np.abs(self.canary - self.champion),
            "brier": brier,
            "better": brier,
            "bad_trades": more * ~self.eligible,
            "missed_trades": -more * self.eligible,
        }


@dataclass(frozen=True)
class Market:
    """What there is to see, and what becomes of it: float64[runs, rows]."""

    signal: Values
    luck: Values
    memory: float
    """Rows that a state of the market, of a model's noise, and an outcome last on average."""

    @classmethod
    def of(cls, random: np.random.Generator, runs: int, observations: int, memory: float = ROWS) -> Market:
        """A market in which so many observations of `ROWS` rows are made."""
        shape = runs, observations * ROWS
        signal = lasting(random, random.normal(size=shape), memory)
        return cls(signal, lasting(random, random.random(shape), memory), memory)

    def trial(
        self, random: np.random.Generator, noise: tuple[float, float] = (0.5, 0.5), added_bad: float = 0.0
    ) -> Trial:
        """Two models on one instrument of it.

        Args:
            random: Chance.
            noise: Of canary and champion, beside a signal of variance 1.
            added_bad: Share of all rows that the canary trades besides, all of them bad.
        """
        shape, memory = self.signal.shape, self.memory
        seen = [self.signal + one * lasting(random, random.normal(size=shape), memory) for one in noise]
        scores = [_eligible(one / (1 + size**2)) for one, size in zip(seen, noise, strict=True)]
        eligible = self.luck < _eligible(self.signal)
        canary_trades, champion_trades = (one >= _THRESHOLD for one in scores)
        if added_bad:
            room = ~eligible & ~canary_trades
            chosen = lasting(random, random.random(shape), memory) < added_bad / room.mean()
            canary_trades = canary_trades | (room & chosen)
        return Trial(scores[0], scores[1], canary_trades, champion_trades, eligible)


def _eligible(signal: Values) -> Values:
    """The probability."""
    return 1 / (1 + np.exp(-1 - 1.5 * signal))


# What comes of it. ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """Shares of the runs by what became of them at one step, and how soon."""

    promoted: float
    rolled_back: float
    observations: float
    """Median until either; NaN when most had neither."""


def judged(rows: Trial) -> End:
    """What the checks of rows and outcomes say of each run; batches and orders are taken to be well."""
    checks = Evidence(_SETTINGS, lambda: 0.0).checks
    found = {name: gathered(one) for name, one in rows.differences().items()}
    worse = np.full(len(rows.canary), NEVER)
    proven = {}
    for name, one in found.items():
        terms = checks[name].terms
        kept = np.maximum(kept_at(one, terms.tolerance, terms.false_proof_probability), terms.minimum)
        beyond = exceeded_at(one, terms.tolerance, terms.false_alarm_probability)
        proven[name] = np.where(beyond < kept, NEVER, kept)
        if terms.objects:
            worse = np.minimum(worse, beyond)
    alike = np.maximum(proven["disagreement"], proven["score_shift"])
    wanted = [proven[name] for name in ("brier", "bad_trades", "missed_trades")]
    good = np.maximum(np.minimum(alike, proven["better"]), np.max(wanted, axis=0))
    end = np.minimum(worse, good).astype(float)
    end[end == NEVER] = np.inf
    median = float(np.median(end))
    return End(
        float((good < worse).mean()),
        float((worse <= good).mean() - ((worse == NEVER) & (good == NEVER)).mean()),
        median if np.isfinite(median) else float("nan"),
    )


def false_rollbacks(differences: Values, check: str) -> float:
    """Share of the runs in which one check rolls back."""
    terms = Evidence(_SETTINGS, lambda: 0.0).checks[check].terms
    return float((exceeded_at(differences, terms.tolerance, terms.false_alarm_probability) < NEVER).mean())


def found_within(differences: Values, good: int) -> tuple[float, float]:
    """(median observations, share within 500) until `bad_trades` says WORSE, counted from after `good` observations.

    A run in which it says so before has neither.
    """
    terms = Evidence(_SETTINGS, lambda: 0.0).checks["bad_trades"].terms
    after = exceeded_at(differences, terms.tolerance, terms.false_alarm_probability) - good
    after[after <= 0] = NEVER
    return float(np.median(after)), float((after <= 500).mean())


def shared_outcomes(random: np.random.Generator, runs: int, observations: int, apart: float = 0.1) -> Values:
    """float64[runs, observations]: bad trades of two equal models that decide otherwise in this share of all states."""
    return random.choice([-1.0, 0.0, 1.0], (runs, observations), p=[apart / 2, 1 - apart, apart / 2])


def worse_by(random: np.random.Generator, runs: int, points: float, good: int, bad: int) -> Values:
    """float64[runs, good + bad]: no difference at first; then bad trades of the canary's own, each of its own state."""
    return np.concatenate([np.zeros((runs, good)), (random.random((runs, bad)) < points).astype(float)], axis=1)


def _size(random: np.random.Generator, runs: int) -> Iterator[Sequence[str]]:
    yield "equal models", "check", "each row an observation", "gathered"
    count = 1_000

    def line(what: str, check: str, rows: Values, observations: Values) -> Sequence[str]:
        return what, f"`{check}`", *(f"{false_rollbacks(one, check):.1%}" for one in (rows, observations))

    for shared in (1, 5, 20, 50):
        one = shared_outcomes(random, runs, count)
        yield line(f"{shared} rows share state and outcome", "bad_trades", np.repeat(one, shared, axis=1), one)
    for memory in (5, 10, 50, 100):
        found = Market.of(random, runs, count, memory).trial(random).differences()
        for check in ("bad_trades", "brier"):
            what = f"states and outcomes last {memory / ROWS:g} horizons"
            yield line(what, check, found[check], gathered(found[check]))
    for memory in (10, 40, 120):
        apart = (lasting(random, random.random((runs, count * ROWS)), memory) < 0.1).astype(float)
        what = f"10 % of the states are decided otherwise, each lasts {memory / ROWS:g} horizons"
        yield line(what, "disagreement", apart, gathered(apart))
    for check in ("bad_trades", "brier"):
        rows, observations = instruments(random, runs, count // 10, 10, check)
        yield line("10 instruments with one market and the same outcomes", check, rows, observations)


def instruments(
    random: np.random.Generator, runs: int, observations: int, count: int, check: str
) -> tuple[Values, Values]:
    """(rows, observations) of equal models on instruments that all have the same signal and the same outcomes."""
    market = Market.of(random, runs, observations)
    rows = np.stack([market.trial(random).differences()[check] for _ in range(count)], axis=2)
    means = np.stack([gathered(rows[:, :, one]) for one in range(count)], axis=2)
    return rows.reshape(runs, -1), means.reshape(runs, -1)


def _power(random: np.random.Generator, runs: int) -> Iterator[Sequence[str]]:
    yield "bad trades more", "good observations before", "median observations", "within 500"
    for points in (0.1, 0.2, 0.4):
        for good in (0, 2_000, 2_500):
            median, within = found_within(worse_by(random, runs, points, good, 2_000), good)
            yield f"+{100 * points:g} points", f"{good:,}", f"{median:,.0f}", f"{within:.1%}"


def _ends(random: np.random.Generator, runs: int) -> Iterator[Sequence[str]]:
    yield "canary", "proven at one step", "rolled back", "neither", "median observations"
    kinds: dict[str, dict[str, Any]] = {
        "retrained: equal, with noise of its own": {},
        "retrained, and hardly different": {"noise": (0.1, 0.0)},
        "different and better": {"noise": (0.1, 2.0)},
        "different and worse": {"noise": (2.0, 0.1)},
        "11.5 % of bad trades added": {"noise": (0.1, 0.0), "added_bad": 0.115},
    }
    for name, changes in kinds.items():
        end = judged(Market.of(random, runs, 1_500).trial(random, **changes))
        neither = 1 - end.promoted - end.rolled_back
        yield name, f"{end.promoted:.1%}", f"{end.rolled_back:.1%}", f"{neither:.1%}", f"{end.observations:,.0f}"


def tables(runs: int) -> Iterator[Iterator[Sequence[str]]]:
    """Size, power, and ends: each its head and its lines."""
    for seed, table in enumerate((_size, _power, _ends)):
        yield table(np.random.default_rng(seed), runs)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000, help="of each line; the default takes a minute of a core")
    for head, *lines in tables(parser.parse_args().runs):
        print(*(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)), "", sep="\n")


if __name__ == "__main__":
    main()
