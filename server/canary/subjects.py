"""The canary and the champion as subjects of the control state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from server.canary.plan import Canary
from server.control.subjects import Subject
from server.inference.model_names import DEFAULT
from server.models.registry import is_version

if TYPE_CHECKING:
    from server.canary.rollout import Rollout
    from server.models.deployment import Deployment


def canary_subject(model: str) -> str:
    """The subject of a model's canary. Its value is a `Canary` as JSON; empty when there never was one."""
    return "canary" if model == DEFAULT else f"canary/{model}"


def champion_subject(model: str) -> str:
    """The subject of a model's champion. Its value is the version that decides; empty for what the replicas serve."""
    return "model/champion" if model == DEFAULT else f"model/{model}/champion"


def canary_subjects(
    rollout: Rollout, deployment: Deployment, champion_version: str | None, model: str = DEFAULT
) -> dict[str, Subject]:
    """What the control state says about a model.

    Args:
        rollout: Applies the canary's value.
        deployment: Applies the champion's value.
        champion_version: The champion's version while none was promoted; None for what the replicas serve.
        model: Its name.
    """

    def check_canary(value: str) -> str:
        try:
            _canary(value)
        except ValidationError:
            return "must be a canary"
        return ""

    def check_version(value: str) -> str:
        return "" if not value or is_version(value) else "must be 16 hexadecimal digits"

    return {
        canary_subject(model): Subject(
            "", check_canary, lambda value, _seconds: rollout.apply_canary(_canary(value)), _in_words
        ),
        champion_subject(model): Subject(
            champion_version or "",
            check_version,
            lambda value, _seconds: deployment.apply(value),
            lambda version: version or "what the replicas serve",
        ),
    }


def _in_words(value: str) -> str:
    canary = _canary(value)
    if canary is None:
        return "none"
    if not canary.running:
        return f"{canary.model_version} {canary.state.replace('_', ' ')}"
    covered = f" of {canary.instrument or '*'} {canary.strategy or '*'}" if canary.is_partial else ""
    return f"{canary.model_version} at {canary.weight:.0%} of the flows{covered}{' (held)' if canary.held else ''}"


def _canary(value: str) -> Canary | None:
    return Canary.model_validate_json(value) if value else None
