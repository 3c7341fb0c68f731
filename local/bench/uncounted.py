"""Makes a decision server without metrics, logs and traces: the `unobserved` one of `pretrade bench-costs`.

It is imported before the server, by a `sitecustomize` that only the benchmark puts on the path, inside Envoy as well.
"""

from __future__ import annotations

from typing import Any, Final

from server.decision.metrics import DecisionMetrics
from server.decision.reports import DecisionReports
from server.timing.histogram import Histogram


def _nothing(*_: Any) -> None:
    pass


_COUNT: Final = ("observe", "add", "decided", "failed")
"""How the methods begin that count or report decisions, alone and in columns."""
for owner in (Histogram, DecisionMetrics, DecisionReports):
    names = [name for name in vars(owner) if name.startswith(_COUNT)]
    assert names
    for name in names:
        setattr(owner, name, _nothing)
