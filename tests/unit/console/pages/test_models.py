"""A canary's evidence and drift, as the page has them."""

from __future__ import annotations

import time

import pytest

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.client.credentials import ClientCredentials
from pretrade.console.calls import ServerCalls
from pretrade.console.pages.models import drift_bar
from pretrade.console.rendering import Pages
from pretrade.console.sessions import Session


@pytest.mark.parametrize(
    ("psi", "limit", "full"), [(0.1, 0.2, 25.0), (0.2, 0.2, 50.0), (9.0, 0.2, 100.0), (9.0, None, 0.0)]
)
def test_a_bar_is_half_full_at_its_limit(psi: float, limit: float | None, full: float) -> None:
    assert drift_bar(pb.FeatureDrift(psi=psi, limit=limit))[1] == pytest.approx(full)


async def test_a_canary_is_shown_with_each_check_and_what_may_be_done_with_it() -> None:
    canary = pb.Canary(
        model_version="ab" * 8,
        champion_version="cd" * 8,
        state=pb.CANARY_STATE_RUNNING,
        weight=0.05,
        steps=[0.05, 0.25, 1.0],
        verdict=pb.CANARY_VERDICT_NO_EVIDENCE,
        verdict_reason="too few rows",
    )
    canary.checks.add(name="rank", verdict=pb.CANARY_VERDICT_WORSE, samples=120, minimum_samples=500, canary=0.5)
    drift = pb.DriftStatus(model_version="cd" * 8, rows=1_000)
    drift.features.add(name="spread_bps", psi=0.5, limit=0.2, drifted=True)
    calls = ServerCalls("127.0.0.1:1", ClientCredentials(token="t"))

    def shown(*methods: str) -> str:
        may = pb.GetCallerResponse(methods=[f"/pretrade.admin.v1.AdminService/{name}" for name in methods])
        return Pages().page(
            "_models",
            session=Session(calls, may, "ann", time.monotonic),
            missing="",
            versions=[pb.ModelVersion(model_version="ab" * 8, problem="<b>broken</b>")],
            canaries={"scalper": canary},
            drifts={"default": (drift, [drift_bar(one) for one in drift.features])},
        )

    page = shown("AbortCanary")
    for text in ("[5 %]", "25 %", "no evidence", "worse", "120 of 500", "too few rows", "drifted", "&lt;b&gt;broken"):
        assert text in page, text
    assert "/act/canary_abort?model=scalper" in page
    assert "/act/canary_promote" not in page
    assert "/act/" not in shown()
    await calls.close()
