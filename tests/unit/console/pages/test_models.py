"""A canary's evidence and drift, as the page has them."""

from __future__ import annotations

import time

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.client.credentials import ClientCredentials
from pretrade.console.calls import ServerCalls
from pretrade.console.curves import HEIGHT, WIDTH, growths
from pretrade.console.pages.models import by_urgency
from pretrade.console.rendering import Pages
from pretrade.console.sessions import Session


def test_what_is_the_farthest_beyond_its_limit_comes_first_and_every_part_has_its_shade() -> None:
    drift = pb.DriftStatus()
    for name, psi, limit in (("calm", 0.1, 0.2), ("unjudged", 9.0, None), ("wild", 0.9, 0.2), ("close", 0.19, 0.2)):
        drift.features.add(name=name, psi=psi, limit=limit)
    drift.windows.add(rows=100, psi=[0.01, 9.0, 1.0, 0.05])
    drift.windows.add(rows=120, psi=[0.1, 9.0, 0.4, 0.2])
    found = [(one.name, parts) for one, parts in by_urgency(drift)]
    assert found == [
        ("wild", [(1.0, 6), (0.4, 5)]),
        ("close", [(0.05, 2), (0.2, 4)]),
        ("calm", [(0.01, 1), (0.1, 3)]),
        ("unjudged", [(9.0, 0), (9.0, 0)]),
    ]


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
    drift.windows.add(rows=100, psi=[0.9])
    history = pb.CanaryHistory(at_ns=[0, 60_000_000_000], weight=[0.05, 0.05])
    history.checks.add(name="rank", samples=[0, 120], canary=[0.4, 0.5], champion=[0.5, 0.5])
    calls = ServerCalls("127.0.0.1:1", ClientCredentials(token="t"))

    def shown(*methods: str) -> str:
        may = pb.GetCallerResponse(methods=[f"/pretrade.admin.v1.AdminService/{name}" for name in methods])
        return Pages().page(
            "_models",
            session=Session(calls, may, "ann", time.monotonic),
            missing="",
            versions=[pb.ModelVersion(model_version="ab" * 8, problem="<b>broken</b>")],
            canaries={"scalper": canary},
            growths={"scalper": growths(history)},
            width=WIDTH,
            height=HEIGHT,
            drifts={"default": (drift, by_urgency(drift))},
        )

    page = shown("AbortCanary")
    for text in ("[5 %]", "25 %", "no evidence", "worse", "120 of 500", "too few rows", "drifted", "&lt;b&gt;broken"):
        assert text in page, text
    assert '<polyline class="champion" points="0.0,' in page
    assert 'aria-label="over 1 m 0 s, between 0.4 and 0.5"' in page
    assert '<td class="number heat6">0.90</td>' in page
    assert f'<a href="/models/{"ab" * 8}">' in page
    assert "/act/canary_abort?model=scalper" in page
    assert "/act/canary_promote" not in page
    assert "/act/" not in shown()
    await calls.close()
