"""Sequential tests: their result may be read after every observation without more false alarms."""

from __future__ import annotations

from typing import Final

_STAKES: Final = (0.9, 0.5, 0.25, 0.1, 0.03)
"""Parts of the largest stake that cannot ruin its gambler. Small ones find small differences, large ones find large
differences soon; the mean of their wealths loses a factor of their number at most, 2.3 doublings."""


class _Wealth:
    """What gamblers own who bet, at fixed stakes, that the mean of the payoffs is above 0.

    A gambler begins with 1 and owns `1 + stake * payoff` times as much after each payoff. While the mean of the payoffs
    given all before is at most 0, that is a supermartingale, and so is the mean over the gamblers: the probability that
    it ever reaches 1 / a is at most a (Ville's inequality), however often one looks.

    Args:
        worst: The lowest payoff, < 0.
    """

    __slots__ = ("_stakes", "_wealths", "total")

    def __init__(self, worst: float) -> None:
        self._stakes = tuple(part / -worst for part in _STAKES)
        self.restart()

    def restart(self) -> None:
        """Every bet starts again."""
        self._wealths = [1.0] * len(_STAKES)
        self.total = 1.0
        """Mean of what they own."""

    def add(self, payoff: float) -> None:
        """One payoff, at least `worst`."""
        # Bounded, so that a fortune stays a number.
        self._wealths = [
            min(wealth * (1.0 + stake * payoff), 1e200)
            for wealth, stake in zip(self._wealths, self._stakes, strict=True)
        ]
        self.total = sum(self._wealths) / len(self._wealths)


class SequentialTest:
    """Tests whether the mean of differences in [-1, 1] lies above a tolerance or below it, or cannot be told yet.

    Two bets on the same differences d, each an anytime-valid test of a bounded mean (Source: Waudby-Smith and Ramdas,
    "Estimating means of bounded random variables by betting", J. R. Stat. Soc. B 86, 2024):

    * *exceeded*: against E[d | past] <= tolerance. The bet starts again every `window` differences, so that a change
      for the worse is found soon after it happened, however much wealth was lost while all was well. The j-th bet may
      err with probability a / (j (j + 1)), all of them together with a. Once exceeded it stays so.
    * *kept*: against E[d | past] >= tolerance, since the last `restart`, with error probability b.

    Args:
        tolerance: In (-1, 1).
        false_alarm_probability: a, of ever saying `exceeded` while the mean never is above the tolerance.
        false_proof_probability: b, of ever saying `kept` between two restarts while the mean never is below it.
        window: Differences in one bet.
    """

    def __init__(
        self, tolerance: float, false_alarm_probability: float, false_proof_probability: float, window: int
    ) -> None:
        self.tolerance = tolerance
        self._a = false_alarm_probability
        self._b = false_proof_probability
        self._window = window
        self._against = _Wealth(-1.0 - tolerance)
        self._for = _Wealth(tolerance - 1.0)
        self._bet = 1
        self._in_window = 0
        self.exceeded = False
        """True once the mean has been shown to lie above the tolerance."""
        self.kept = False
        """True once the mean since the last restart has been shown to lie below the tolerance."""

    def add(self, difference: float) -> None:
        """One difference, in [-1, 1]."""
        self._against.add(difference - self.tolerance)
        self._for.add(self.tolerance - difference)
        self.exceeded = self.exceeded or self._against.total >= self._bet * (self._bet + 1) / self._a
        self.kept = self.kept or self._for.total >= 1.0 / self._b
        self._in_window += 1
        if self._in_window == self._window:
            self._in_window = 0
            self._bet += 1
            self._against.restart()

    def restart(self) -> None:
        """Forgets what spoke for it; what speaks against it stays."""
        self._for.restart()
        self.kept = False
