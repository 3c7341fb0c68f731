"""An explanation for people."""

from __future__ import annotations

from typing import Final

from rich.console import RenderableType
from rich.table import Table

from pretrade.decision.v1 import decision_pb2 as pb

_BAR_WIDTH: Final = 20


def explanation_table(explanation: pb.Explanation) -> RenderableType:
    """The features that moved the score most come first; a sentence where there is no explanation."""
    if explanation.status != pb.EXPLANATION_STATUS_READY:
        status = pb.ExplanationStatus.Name(explanation.status).removeprefix("EXPLANATION_STATUS_")
        return f"explanation: {status}: {explanation.message}"
    parts = sorted(explanation.contributions, key=lambda part: -abs(part.contribution))
    largest = max((abs(part.contribution) for part in parts), default=0.0) or 1.0
    table = Table(
        title=f"why model {explanation.model_version} scored so ({explanation.method}), in log odds before calibration",
        caption=f"base {explanation.base:+.4f}, in all {explanation.margin:+.4f}; decision {explanation.decision_id}",
        title_justify="left",
    )
    table.add_column("feature")
    table.add_column("value", justify="right")
    table.add_column("contribution", justify="right")
    table.add_column("")
    for part in parts:
        width = round(_BAR_WIDTH * abs(part.contribution) / largest)
        value = f"{part.value:.6g}" if part.HasField("value") else "undefined"
        colour = "green" if part.contribution > 0 else "red"
        table.add_row(part.feature, value, f"{part.contribution:+.4f}", f"[{colour}]{'█' * width}[/{colour}]")
    return table
