"""What is said of a model in one line: how it does against the baselines, and whether its inputs have drifted."""

from __future__ import annotations

import datetime as dt
from typing import Final

from rich.markup import escape

from pretrade.admin.v1 import admin_pb2

_SOON_DAYS: Final = 3.0
"""Before a model expires, from which on the alert ModelExpiring tells of it."""


def drift_line(drift: admin_pb2.DriftStatus) -> str:
    """Whether the champion's inputs still are what it learnt from; markup of rich."""
    if drift.problem:
        return f"[dim]drift: {escape(drift.problem)}[/]"
    inputs = f"{drift.rows:,} input{'s' if drift.rows != 1 else ''} of model {drift.model_version[:8]}"
    judged = [one for one in drift.features if not one.not_judged]
    drifted = [f"{one.name} {one.psi:.2f} (limit {one.limit:.2f})" for one in judged if one.drifted]
    unknown = [one.name for one in judged if not one.HasField("limit")]
    if drifted:
        return f"[red]drift[/] in {inputs}: {', '.join(drifted)}"
    if len(unknown) == len(judged):
        return f"[dim]drift: too few to say: {inputs}[/]"
    line = f"drift: none in {inputs}"
    return f"[dim]{line}, {len(unknown)} of {len(judged)} features: too few to say[/]" if unknown else f"[dim]{line}[/]"


def champion_line(champion: admin_pb2.ChampionStatus) -> str:
    """Which version decides, and how good it is known to be; markup of rich."""
    line = standing_line(champion.model_version, champion.standing, champion.card)
    return line + (f"; {expiry_text(champion.expires_in.ToTimedelta())}" if champion.HasField("expires_in") else "")


def expiry_text(left: dt.timedelta) -> str:
    """How long it may still decide; markup of rich."""
    days = left / dt.timedelta(days=1)
    if days <= 0:
        return f"[red]expired {-days:.1f} days ago: its answers are ABSTAIN[/]"
    said = f"expires in {days:.1f} days"
    return f"[yellow]{said}[/]" if days < _SOON_DAYS else said


def standing_line(version: str, standing: str, card: str) -> str:
    """The champion's version with what its card says of it, and where the card is; markup of rich."""
    where = f"; card: {escape(card)}" if card else ""
    return f"champion {version[:8]}: {escape(standing)}{where}"
