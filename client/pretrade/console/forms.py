"""A form that a person sent: its fields, and what is said of one that cannot be understood."""

from __future__ import annotations

from collections.abc import Mapping

from pretrade.client.cli.options import span_seconds

Form = Mapping[str, str]


class FormError(Exception):
    """A form cannot be understood; says which field, and what is expected."""


def needed(form: Form, field: str) -> str:
    """The value of a field that may not be empty. Raises `FormError`."""
    if not (value := form.get(field, "").strip()):
        raise FormError(f"{field.replace('_', ' ').capitalize()}: one must be chosen.")
    return value


def choice(form: Form, field: str, choices: Mapping[str, int]) -> int:
    """What was chosen, by its name. Raises `FormError`."""
    value = form.get(field, "")
    if value not in choices:
        raise FormError(f"{field.capitalize()}: one of {', '.join(choices)}.")
    return choices[value]


def seconds(form: Form, field: str, label: str) -> float:
    """A span of time with its unit; 0 for an empty field. Raises `FormError`."""
    text = form.get(field, "").strip()
    found = span_seconds(text) if text else 0.0
    if found is None:
        raise FormError(f"{label}: a number with its unit, like 90s, 10m, 2h or 1d.")
    return found
