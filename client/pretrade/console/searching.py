"""Which decisions a person looks for: the filter of the audit, as the fields of a form say it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlencode

from google.protobuf.timestamp_pb2 import Timestamp

from pretrade.audit.v1 import audit_pb2 as pb
from pretrade.client.cli.options import span_seconds
from pretrade.client.enum_names import enum_choices
from pretrade.console.forms import FormError
from pretrade.decision.v1 import decision_pb2

HEARD: Final[Mapping[str, int]] = enum_choices(pb.HeardAction)
DECIDED: Final[Mapping[str, int]] = enum_choices(decision_pb2.Action)
SOURCES: Final[Mapping[str, int]] = enum_choices(decision_pb2.Source)
_FIELDS: Final = ("instrument", "strategy", "heard", "decided", "source", "model")
_LONGEST: Final = 200


def filter_of(form: Mapping[str, str]) -> pb.DecisionFilter:
    """The filter that the fields of a form make; an empty field does not restrict.

    Args:
        form: `last` is a span of time before now; `since`, in nanoseconds since the Unix epoch, is what became of it on
            the first page, so that all pages have one filter.

    Raises:
        FormError: A field cannot be understood.
    """
    found = pb.DecisionFilter(model=_text(form, "model"))
    if since := form.get("since", ""):
        found.since.CopyFrom(_instant(since))
    elif last := _text(form, "last"):
        seconds = span_seconds(last)
        if not seconds:
            raise FormError("Last: a span of time like 10m, 2h or 1d; empty for any time.")
        found.since.FromNanoseconds(time.time_ns() - int(seconds * 1e9))
    found.instruments.extend(_texts(form, "instrument"))
    found.strategies.extend(_texts(form, "strategy"))
    _choose(found.heard_actions, form, "heard", HEARD)
    _choose(found.decided_actions, form, "decided", DECIDED)
    _choose(found.sources, form, "source", SOURCES)
    return found


def next_page(form: Mapping[str, str], used: pb.DecisionFilter, token: str) -> str:
    """The query of the page after; empty at the end."""
    if not token:
        return ""
    kept = {name: value for name in (*_FIELDS, "last") if (value := form.get(name, ""))}
    since = {"since": str(used.since.ToNanoseconds())} if used.HasField("since") else {}
    return urlencode({**kept, **since, "page": token})


def live(form: Mapping[str, str]) -> str:
    """The query of the live tail with this filter, which begins now."""
    return urlencode({name: value for name in _FIELDS if (value := form.get(name, ""))})


def _instant(text: str) -> Timestamp:
    found = Timestamp()
    try:
        found.FromNanoseconds(int(text))
    except ValueError as error:
        raise FormError("Since: nanoseconds since the Unix epoch.") from error
    return found


def _text(form: Mapping[str, str], field: str) -> str:
    value = form.get(field, "").strip()
    if len(value) > _LONGEST:
        raise FormError(f"{field.capitalize()}: at most {_LONGEST} characters.")
    return value


def _texts(form: Mapping[str, str], field: str) -> list[str]:
    """One or several with commas between them."""
    return [one.strip() for one in _text(form, field).split(",") if one.strip()]


def _choose(chosen: Any, form: Mapping[str, str], field: str, choices: Mapping[str, int]) -> None:
    value = form.get(field, "")
    if value and value not in choices:
        raise FormError(f"{field.capitalize()}: one of {', '.join(choices)}; empty for any.")
    if value:
        chosen.append(choices[value])
