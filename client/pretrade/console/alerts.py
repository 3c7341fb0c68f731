"""What Alertmanager knows, read for all who look; and the conditions of a silence as a form has them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from pretrade.client.cli.alertmanager import Alertmanager, AlertmanagerError, Matcher, by_urgency, moment, told
from pretrade.console.forms import Form, FormError
from pretrade.console.runbook import section

_FRESH_SECONDS: Final = 2.0
"""For how long what was read is shown to whoever else looks."""
_MOST_CONDITIONS: Final = 20
_LONGEST_CONDITION: Final = 500


@dataclass(frozen=True, slots=True)
class OpenAlert:
    """An alert that fires."""

    name: str
    severity: str
    since: str
    what: str
    runbook: str
    """Where the console shows what to do; empty where the alert does not say."""
    told: str
    """Whether people are told of it, and why not."""
    labels: Mapping[str, str]
    """All of them, the name and the severity too."""

    @classmethod
    def of(cls, alert: Mapping[str, Any]) -> Self:
        """One as Alertmanager has it; rules of a user's own may lack what ours have."""
        labels, annotations = alert["labels"], alert["annotations"]
        return cls(
            name=labels.get("alertname", "?"),
            severity=labels.get("severity", ""),
            since=moment(alert["startsAt"]),
            what=annotations.get("summary", annotations.get("description", "")),
            runbook=section(annotations.get("runbook_url", "")),
            told=told(alert),
            labels=labels,
        )

    @property
    def others(self) -> list[str]:
        """Its labels besides name and severity."""
        return [f"{name}={value}" for name, value in self.labels.items() if name not in ("alertname", "severity")]

    @property
    def conditions(self) -> str:
        """Conditions that it fulfils and, as a rule, no other, one a line."""
        return "\n".join(str(Matcher(name, value)) for name, value in sorted(self.labels.items()))


@dataclass(frozen=True, slots=True)
class Seen:
    """What Alertmanager said last."""

    alerts: list[OpenAlert]
    """Those that fire, the most urgent first."""
    silences: list[dict[str, Any]]
    """Those in force or to come, the first to end first."""
    problem: str = ""
    """Why it said nothing; empty when all is well."""


class AlertWatch:
    """Asks Alertmanager, once for all who look at the same time.

    Args:
        alertmanager: Whom to ask.
        monotonic: Seconds on a clock that never jumps.
    """

    def __init__(self, alertmanager: Alertmanager, monotonic: Callable[[], float]) -> None:
        self._alertmanager = alertmanager
        self._monotonic = monotonic
        self._lock = asyncio.Lock()
        self._seen = Seen([], [])
        self._until = -1.0

    async def look(self) -> Seen:
        """What it says now, or said a moment ago."""
        async with self._lock:
            if self._monotonic() >= self._until:
                try:
                    alerts = await asyncio.to_thread(self._alertmanager.alerts)
                    silences = await asyncio.to_thread(self._alertmanager.silences)
                    self._seen = Seen(
                        [OpenAlert.of(one) for one in by_urgency(alerts)],
                        sorted(silences, key=lambda one: one["endsAt"]),
                    )
                except AlertmanagerError as error:
                    self._seen = Seen([], [], str(error))
                self._until = self._monotonic() + _FRESH_SECONDS
            return self._seen

    def forget(self) -> None:
        """What is known has been changed."""
        self._until = -1.0


def conditions_of(form: Form) -> list[Matcher]:
    """The conditions that a form has, one a line.

    Raises:
        FormError: There are none, or one cannot be understood.
    """
    lines = [line.strip() for line in form.get("conditions", "").splitlines() if line.strip()]
    if not lines:
        raise FormError("Conditions: at least one is needed, like ReplicaDown or replica=primary.")
    if len(lines) > _MOST_CONDITIONS or max(map(len, lines)) > _LONGEST_CONDITION:
        raise FormError(f"Conditions: at most {_MOST_CONDITIONS}, of at most {_LONGEST_CONDITION} characters.")
    try:
        return [Matcher.parse(line) for line in lines]
    except ValueError as error:
        raise FormError(f"Conditions: {error}.") from None
