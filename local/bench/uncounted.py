"""Makes a decision server without metrics, logs and traces: the `unobserved` one of `pretrade bench-costs`.

It is imported before the server, by a `sitecustomize` that only the benchmark puts on the path, inside Envoy as well.
"""

from __future__ import annotations

from typing import Any

from server.decision.metrics import DecisionMetrics
from server.decision.reports import DecisionReports
from server.timing.histogram import Histogram


def _nothing(*_: Any) -> None:
    pass


for owner, names in (
    (Histogram, ("observe",)),
    (DecisionMetrics, ("observe",)),
    (DecisionReports, ("decided", "failed")),
):
    for name in names:
        assert callable(getattr(owner, name))
        setattr(owner, name, _nothing)
