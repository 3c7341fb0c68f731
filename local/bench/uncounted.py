"""Makes a decision server that counts nothing and tells of nothing: the `unobserved` one of `pretrade bench-costs`.

Imported before the server, by a `sitecustomize` that only the benchmark puts in the way, inside Envoy as well.
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
