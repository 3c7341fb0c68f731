"""What `pretrade alerts` asks of Alertmanager: its API, version 2, with the standard library alone."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Self
from urllib.parse import quote, urlencode

_PATIENCE_SECONDS: Final = 5.0
_MATCHER: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(=~|!~|!=|=)(.*)", re.DOTALL)
_ALERT: Final = re.compile(r"[A-Za-z][A-Za-z0-9]*")
_SEVERITIES: Final = ("page", "ticket")
"""The most urgent first."""


class AlertmanagerError(Exception):
    """Alertmanager refused, and says why."""


class UnreachableError(AlertmanagerError):
    """Alertmanager did not answer, or something else did."""


@dataclass(frozen=True, slots=True)
class Matcher:
    """One condition on the labels of an alert."""

    name: str
    value: str
    is_regex: bool = False
    is_equal: bool = True

    @classmethod
    def parse(cls, text: str) -> Self:
        """The condition that a person wrote: `replica=primary`, with `=`, `!=`, `=~` or `!~`, or an alert's name.

        Raises:
            ValueError: It is none.
        """
        if _ALERT.fullmatch(text):
            return cls("alertname", text)
        found = _MATCHER.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is neither the name of an alert nor a condition like replica=primary")
        name, operator, value = found.groups()
        if operator.endswith("~"):
            _check_regex(value)
        return cls(name, value.strip('"'), is_regex=operator.endswith("~"), is_equal=operator.startswith("="))

    def __str__(self) -> str:
        operator = ("=" if self.is_equal else "!") + ("~" if self.is_regex else "=" if not self.is_equal else "")
        return f"{self.name}{operator}{self.value}"

    def as_json(self) -> Mapping[str, object]:
        """As the API takes it."""
        return {"name": self.name, "value": self.value, "isRegex": self.is_regex, "isEqual": self.is_equal}


class Alertmanager:
    """One Alertmanager.

    Args:
        url: Its base URL.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def alerts(self) -> list[dict[str, Any]]:
        """The alerts that fire, those that are silenced or inhibited included."""
        found: list[dict[str, Any]] = self._ask("GET", "alerts")
        return found

    def matched(self, matchers: Sequence[Matcher]) -> list[dict[str, Any]]:
        """The alerts that fire and fulfil every condition, by Alertmanager's own rules."""
        asked = urlencode([("filter", _quoted(each)) for each in matchers])
        found: list[dict[str, Any]] = self._ask("GET", f"alerts?{asked}")
        return found

    def silences(self) -> list[dict[str, Any]]:
        """The silences that are in force or will be."""
        return [one for one in self._ask("GET", "silences") if one["status"]["state"] != "expired"]

    def silence(self, matchers: Sequence[Matcher], *, begin: datetime, seconds: float, author: str, reason: str) -> str:
        """Silences all alerts that fulfil every condition, those to come included; returns the id of the silence."""
        wanted = {
            "matchers": [matcher.as_json() for matcher in matchers],
            "startsAt": begin.isoformat(),
            "endsAt": (begin + timedelta(seconds=seconds)).isoformat(),
            "createdBy": author,
            "comment": reason,
        }
        return str(self._ask("POST", "silences", wanted)["silenceID"])

    def unsilence(self, silence: str) -> None:
        """Ends a silence."""
        self._ask("DELETE", f"silence/{quote(silence, safe='')}")

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        request = urllib.request.Request(  # noqa: S310 - the address is the user's
            f"{self._url}/api/v2/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE_SECONDS) as response:  # noqa: S310
                answer = response.read()
            return json.loads(answer) if answer else None
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(500).decode(errors="replace").strip().strip('"')
            raise AlertmanagerError(f"{error.code}: {said or error.reason}") from None
        except (OSError, ValueError) as error:  # nobody, or somebody who speaks no JSON
            raise UnreachableError(f"{self._url} does not answer as an Alertmanager: {error}") from None


def by_urgency(alerts: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Alerts, the most urgent first; of those that are as urgent what explains others before these, and the oldest."""

    def urgency(alert: Mapping[str, Any]) -> tuple[int, bool, str]:
        severity = alert["labels"].get("severity", "")
        rank = _SEVERITIES.index(severity) if severity in _SEVERITIES else len(_SEVERITIES)
        return rank, bool(alert["status"]["inhibitedBy"]), alert["startsAt"]

    return sorted(alerts, key=urgency)


def told(alert: Mapping[str, Any]) -> str:
    """Whether people are told of an alert, and why not."""
    status = alert["status"]
    if status["silencedBy"]:
        return f"silenced by {', '.join(status['silencedBy'])}"
    return "no, another alert explains it" if status["inhibitedBy"] else "yes"


def matchers_of(silence: Mapping[str, Any]) -> list[Matcher]:
    """The conditions of a silence."""
    return [
        Matcher(each["name"], each["value"], each["isRegex"], each.get("isEqual", True)) for each in silence["matchers"]
    ]


def moment(text: str) -> str:
    """A time of Alertmanager's, in UTC, for people."""
    return text[:19].replace("T", " ")


def _quoted(matcher: Matcher) -> str:
    name, operator = matcher.name, str(matcher)[len(matcher.name) : -len(matcher.value) or None]
    return f"{name}{operator}{json.dumps(matcher.value)}"


def _check_regex(text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None
