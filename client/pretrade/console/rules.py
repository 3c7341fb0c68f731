"""Alert rules that users set, as a form has them."""

from __future__ import annotations

from typing import Final

from google.protobuf.duration_pb2 import Duration

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.console.forms import Form, FormError, needed, seconds

FEATURE: Final = "feature"
CONDITIONS: Final = {
    "TRADE": "the share of TRADE among decisions",
    "NO_TRADE": "the share of NO_TRADE among decisions",
    "ABSTAIN": "the share of ABSTAIN among decisions",
    FEATURE: "the value of a feature",
}
"""What a rule may be about: the share of an action, or a feature."""
CROSSES: Final = ("above", "below")
SEVERITIES: Final = ("ticket", "page")
_OF_SHARES: Final = {"feature": "Feature", "instrument": "Instrument"}
_OF_FEATURES: Final = {"strategy": "Strategy"}
_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "m"), (1, "s"))


def set_request(form: Form) -> pb.SetAlertRuleRequest:
    """The request that sets the rule of a form; the server checks what it says. Raises `FormError`."""
    rule = pb.AlertRule(name=_name(form), severity=form.get("severity", ""))
    about = form.get("condition", "")
    if about not in CONDITIONS:
        raise FormError("While: one of the share of an action and the value of a feature.")
    for field, label in (_OF_FEATURES if about == FEATURE else _OF_SHARES).items():
        if form.get(field, "").strip():
            raise FormError(f"{label}: belongs to a rule on {'decisions' if about == FEATURE else 'a feature'}.")
    if about == FEATURE:
        instrument = form.get("instrument", "").strip()
        rule.feature.CopyFrom(pb.FeatureValue(name=needed(form, "feature"), instrument=instrument))
    else:
        rule.share.CopyFrom(pb.DecisionShare(action=about, strategy=form.get("strategy", "").strip()))
        _put(rule.share.window, seconds(form, "window", "Over"))
    try:
        threshold = float(form.get("threshold", ""))
    except ValueError:
        raise FormError("Threshold: a number; of a share, 0 to 1.") from None
    if form.get("crosses") == "below":
        rule.below = threshold
    else:
        rule.above = threshold
    for field, label, into in (("lasting", "For at least", "lasting"), ("cooldown", "Goes on for", "cooldown")):
        if given := seconds(form, field, label):
            _put(getattr(rule, into), given)
    return pb.SetAlertRuleRequest(rule=rule)


def delete_request(form: Form) -> pb.DeleteAlertRuleRequest:
    """The request that deletes the rule that a form names. Raises `FormError`."""
    return pb.DeleteAlertRuleRequest(name=_name(form))


def as_form(rule: pb.AlertRule) -> dict[str, str]:
    """The fields of the form that sets a rule as it is."""
    about = {
        "condition": rule.share.action if rule.HasField("share") else FEATURE,
        "strategy": rule.share.strategy,
        "window": _written(rule.share.window),
        "feature": rule.feature.name,
        "instrument": rule.feature.instrument,
        "crosses": "above" if rule.HasField("above") else "below",
        "threshold": repr(rule.above if rule.HasField("above") else rule.below),
        "lasting": _written(rule.lasting),
        "cooldown": _written(rule.cooldown),
    }
    return {"name": rule.name, "severity": rule.severity} | {name: value for name, value in about.items() if value}


def _name(form: Form) -> str:
    if not (name := form.get("name", "").strip()):
        raise FormError("Name: every rule has one, like twap-trades.")
    return name


def _put(into: Duration, given: float) -> None:
    if given:
        into.FromNanoseconds(int(given * 1e9))


def _written(value: Duration) -> str:
    """A span of time in its largest unit that leaves no rest, like `5m`; empty for none."""
    size, unit = next((size, unit) for size, unit in _UNITS if value.seconds % size == 0)
    return f"{value.seconds // size}{unit}" if value.seconds else ""
