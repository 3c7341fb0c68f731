"""Sequential tests: their result may be read after every observation without more false alarms."""

from __future__ import annotations

from typing import Final

STAKES: Final = (0.95, 0.5, 0.2, 0.06)
"""Parts of the largest stake that cannot ruin its gambler. Small ones find small differences, large ones find large
differences soon; the mean of their wealths loses a factor of their number at most, two doublings."""
_FORTUNE: Final = 1e200
"""Nobody owns more, so that a fortune stays a number."""


class _Wealth:
    """What gamblers own who bet, at fixed stakes, that the mean of the payoffs is above 0.

    A gambler owns `1 + stake * payoff` times as much after each payoff. While the mean of the payoffs given all before
    is at most 0, that is a supermartingale, and so are the mean over the gamblers, and what comes of money that was
    kept back and is put in later: the probability that all of it ever reaches 1 / a is at most a, if 1 was put in
    altogether (Ville's inequality), however often one looks.

    Args:
        worst: The lowest payoff, < 0.
    """

    __slots__ = ("_stakes", "_wealths", "total")

    def __init__(self, worst: float) -> None:
        self._stakes = tuple(part / -worst for part in STAKES)
        self._wealths = [0.0] * len(STAKES)
        self.total = 0.0
        """Mean of what they own."""

    def put_in(self, money: float) -> None:
        """Every gambler gets so much more."""
        self._wealths = [min(wealth + money, _FORTUNE) for wealth in self._wealths]
        self.total = sum(self._wealths) / len(self._wealths)

    def add(self, payoff: float) -> None:
        """One payoff, at least `worst`."""
        self._wealths = [
            min(wealth * (1.0 + stake * payoff), _FORTUNE)
            for wealth, stake in zip(self._wealths, self._stakes, strict=True)
        ]
        self.total = sum(self._wealths) / len(self._wealths)


class SequentialTest:
    """Tests whether the mean of differences in [-1, 1] lies above a tolerance or below it, or cannot be told yet.

    Two bets on the same differences d, each an anytime-valid test of a bounded mean (Source: Waudby-Smith and Ramdas,
    "Estimating means of bounded random variables by betting", J. R. Stat. Soc. B 86, 2024):

    * *exceeded*: against E[d | past] <= tolerance. Another bet begins every `interval` differences, so that a change
      for the worse is found soon after it happened, however much wealth was lost while all was well. The j-th begins
      with 1 / (j (j + 1)), all of them together with 1, and none ends: old bets see what is slow, new ones what has
      just begun (Source: Shin, Ramdas and Rinaldo, "E-detectors", New England J. Stat. Data Sci. 2, 2024, of which
      this is the form with a bounded probability of any false alarm). Once exceeded it stays so.
    * *kept*: against E[d | past] >= tolerance, since the last `restart`, with error probability b.

    Args:
        tolerance: In (-1, 1).
        false_alarm_probability: a, of ever saying `exceeded` while the mean never is above the tolerance.
        false_proof_probability: b, of ever saying `kept` between two restarts while the mean never is below it.
        interval: Differences after which another bet begins.
    """

    def __init__(
        self, tolerance: float, false_alarm_probability: float, false_proof_probability: float, interval: int
    ) -> None:
        self.tolerance = tolerance
        self._alarm = 1.0 / false_alarm_probability
        self._proof = 1.0 / false_proof_probability
        self._interval = interval
        self._against = _Wealth(-1.0 - tolerance)
        self._count = 0
        self.exceeded = False
        """True once the mean has been shown to lie above the tolerance."""
        self.kept = False
        """True once the mean since the last restart has been shown to lie below the tolerance."""
        self.restart()

    def add(self, difference: float) -> None:
        """One difference, in [-1, 1]."""
        if self._count % self._interval == 0:
            bet = self._count // self._interval + 1
            self._against.put_in(1.0 / (bet * (bet + 1)))
        self._count += 1
        self._against.add(difference - self.tolerance)
        self._for.add(self.tolerance - difference)
        self.exceeded = self.exceeded or self._against.total >= self._alarm
        self.kept = self.kept or self._for.total >= self._proof

    def restart(self) -> None:
        """Forgets what spoke for it; what speaks against it stays."""
        self._for = _Wealth(self.tolerance - 1.0)
        self._for.put_in(1.0)
        self.kept = False
