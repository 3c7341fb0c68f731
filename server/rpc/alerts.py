"""`AdminService` for alert rules that users set: converts messages; knows no call and no status."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.duration_pb2 import Duration

from pretrade.admin.v1 import admin_pb2 as pb
from server.control.alert_rules import MOST_RULES, AlertRule, AlertRules, UserAlerts, read_rule, rules_file, write_rules
from server.control.subjects import ALERT_RULES
from server.errors import InvalidChangeError, UnknownSubjectError
from server.rpc.steering import change_of, duration

if TYPE_CHECKING:
    from server.control.state import ControlState


class AlertSteering:
    """The part of `AdminService` that is about alert rules.

    Args:
        control: What is steered.
        alerts: The rules in force.
    """

    def __init__(self, control: ControlState, alerts: UserAlerts) -> None:
        self._control = control
        self._alerts = alerts

    def list(self) -> pb.ListAlertRulesResponse:
        """The rules in force, and the file that Prometheus reads."""
        rules = self._alerts.rules
        return pb.ListAlertRulesResponse(
            rules=map(_message, rules), rules_file=rules_file(rules), control_version=self._control.version
        )

    async def set(self, request: pb.SetAlertRuleRequest, author: str) -> pb.SetAlertRuleResponse:
        """Adds a rule, or replaces the one of its name."""
        rule = _rule(request.rule)
        others = tuple(one for one in self._alerts.rules if one.name != rule.name)
        if len(others) >= MOST_RULES:
            raise InvalidChangeError(f"rule: there are {MOST_RULES} already, which is the most")
        change = await self._change(request, author, (*others, rule))
        return pb.SetAlertRuleResponse(rules=map(_message, self._alerts.rules), change=change)

    async def delete(self, request: pb.DeleteAlertRuleRequest, author: str) -> pb.DeleteAlertRuleResponse:
        """Deletes a rule."""
        left = tuple(one for one in self._alerts.rules if one.name != request.name)
        if len(left) == len(self._alerts.rules):
            raise UnknownSubjectError(f"name: there is no alert rule {request.name!r}")
        change = await self._change(request, author, left)
        return pb.DeleteAlertRuleResponse(rules=map(_message, self._alerts.rules), change=change)

    async def _change(
        self, request: pb.SetAlertRuleRequest | pb.DeleteAlertRuleRequest, author: str, rules: AlertRules
    ) -> pb.Change:
        """Sets all rules. The request is bound to what was read: another server may set a rule at the same time."""
        if not request.HasField("expected_control_version"):
            request.expected_control_version = self._control.version
        before = self._alerts.rules
        detail = (
            *(f"- {one}" for one in before if one not in rules),
            *(f"+ {one}" for one in rules if one not in before),
        )
        value = write_rules(rules) or None
        return await change_of(self._control, request, author, ALERT_RULES, value, detail=detail)


def _rule(message: pb.AlertRule) -> AlertRule:
    """The rule of a message.

    Raises:
        InvalidChangeError: It breaks a rule, which the message names with its field.
    """
    parts: dict[str, Any] = {"name": message.name, "severity": message.severity or "ticket"}
    if message.HasField("share"):
        parts |= {"action": message.share.action, "strategy": message.share.strategy}
        if message.share.HasField("window"):
            parts["window_seconds"] = _whole("share.window", message.share.window)
    if message.HasField("feature"):
        parts |= {"feature": message.feature.name, "instrument": message.feature.instrument}
    if message.HasField("above"):
        parts["above"] = message.above
    if message.HasField("below"):
        parts["below"] = message.below
    parts["for_seconds"] = _whole("lasting", message.lasting)
    parts["cooldown_seconds"] = _whole("cooldown", message.cooldown)
    try:
        return read_rule(parts)
    except ValueError as error:
        raise InvalidChangeError(f"rule.{error}") from None


def _whole(field: str, value: Duration) -> int:
    if value.nanos:
        raise InvalidChangeError(f"rule.{field}: must be whole seconds")
    return int(value.seconds)


def _message(rule: AlertRule) -> pb.AlertRule:
    message = pb.AlertRule(name=rule.name, severity=rule.severity)
    if rule.above is not None:
        message.above = rule.above
    if rule.below is not None:
        message.below = rule.below
    if rule.action:
        window = duration(rule.window_seconds)
        message.share.CopyFrom(pb.DecisionShare(action=rule.action, strategy=rule.strategy, window=window))
    else:
        message.feature.CopyFrom(pb.FeatureValue(name=rule.feature, instrument=rule.instrument))
    if rule.for_seconds:
        message.lasting.CopyFrom(duration(rule.for_seconds))
    if rule.cooldown_seconds:
        message.cooldown.CopyFrom(duration(rule.cooldown_seconds))
    return message
