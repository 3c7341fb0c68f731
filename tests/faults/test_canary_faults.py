"""A canary in trouble: nobody's order waits for it, and it is out within seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.figures import Figure
from support.harness import ROOMY, Product, eventually
from support.rig import OpenRig, Rig, wait_for_more
from support.server_group import Callers, beside, server_group
from support.tcp_proxy import Fault

from local.demo.variants import late, recalibrated
from local.stack.stack import Stack
from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.models.registry import Registry

pytestmark = [pytest.mark.stack, pytest.mark.long]

RATE = 60.0
ROLLED_BACK_SECONDS = 10.0
SETTINGS = ROOMY | {"CANARY__SLOW_SECONDS": "0.05", "SLO__OBJECTIVE": "0.5"}
"""Without the error budget: what is tested is that the canary's own evidence is enough. At this objective no burn rate
can reach that of a rule."""

Seen = Callable[[str], None]
FAULTS = {
    "hangs": Fault(hold_requests=True, hold_replies=True),
    "is 100 ms late": Fault(latency_seconds=0.1),
    "has its answers cut": Fault(reset_replies_after=0),
}


def open_canary(open_rig: OpenRig, stack: Stack) -> tuple[Rig, str]:
    """A rig whose challenger is behind a proxy and serves a canary that gets every order."""
    endpoints = stack.endpoints
    models = {
        "REPLAY__MODEL_STORE": str(endpoints.model_store),
        "REPLICAS__MANAGEMENT": json.dumps(endpoints.management),
    }
    rig = open_rig(SETTINGS | models, proxied=("challenger",))
    registry = Registry(Path(str(endpoints.model_store)))
    champion: str = json.loads((registry.root / "champion.json").read_text())["version"]
    version = recalibrated(registry, champion)
    request = admin_pb2.StartCanaryRequest(model_version=version, steps=(1.0,), author="test", reason="fault")
    rig.server.admin.StartCanary(request, timeout=120.0)
    rig.server.decide_until(pb.SOURCE_CANARY)
    return rig, version


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.fault(
    "A15",
    "A canary fails while it gets every order",
    "Every order is answered in time. The canary is rolled back within 10 s.",
)
def test_a_canary_in_trouble_is_rolled_back_and_no_order_is_late(
    fault: str, open_rig: OpenRig, replica_stack: Stack, seen: Seen, figure: Figure
) -> None:
    opened, version = open_canary(open_rig, replica_stack)
    with opened.load(RATE) as load:
        wait_for_more(load, 60)
        opened.proxies["challenger"].apply(FAULTS[fault])
        began = time.monotonic()

        def state() -> admin_pb2.Canary:
            return opened.server.admin.GetCanary(admin_pb2.GetCanaryRequest(), timeout=5.0).canary

        ended = eventually(state, lambda canary: canary.state == admin_pb2.CANARY_STATE_ROLLED_BACK)
        took = time.monotonic() - began
        wait_for_more(load, 60)
        opened.proxies["challenger"].heal()
        opened.server.wait_until_well("challenger")
    calls = load.calls()
    figure(took <= ROLLED_BACK_SECONDS, f"a canary that {fault} rolled back within {ROLLED_BACK_SECONDS:.0f} s")
    assert {call.status for call in calls} == {"OK"}
    sources = {call.decision.source for call in calls if call.decision}
    assert sources <= {pb.SOURCE_CANARY, pb.SOURCE_PRIMARY, pb.SOURCE_SECONDARY}
    assert {call.decision.source for call in calls[-30:] if call.decision} == {pb.SOURCE_PRIMARY}
    answered = sum(call.decision.source == pb.SOURCE_CANARY for call in calls if call.decision)
    seen(f"{fault}: rolled back after {took:.1f} s ({ended.verdict_reason}); {answered} of {len(calls)} answered by it")
    seen(opened.check())
    assert version == ended.model_version


@pytest.mark.fault(
    "A15",
    "A canary is slow on a server with two processes",
    "The first process that detects it rolls the canary back for both.",
)
def test_one_process_ends_a_canary_for_all(product: Product, tmp_path: Path, seen: Seen) -> None:
    endpoints = product.stack.endpoints
    registry = Registry(Path(str(endpoints.model_store)))
    champion: str = json.loads((registry.root / "champion.json").read_text())["version"]
    version = late(registry, champion, 0.15)
    changes = beside(product) | {
        "PRETRADE_REPLAY__MODEL_STORE": str(endpoints.model_store),
        "PRETRADE_REPLICAS__MANAGEMENT": json.dumps(endpoints.management),
        "PRETRADE_CANARY__SLOW_SECONDS": "0.1",
        "PRETRADE_SLO__OBJECTIVE": "0.5",
    }
    with server_group(tmp_path, 2, **changes) as group, Callers(group.decision) as callers:
        callers.wait_for_more(100)
        request = admin_pb2.StartCanaryRequest(model_version=version, steps=(1.0,), author="test", reason="fault")
        began = time.monotonic()
        with group.admin() as admin:
            admin.StartCanary(request, timeout=120.0)
            ended = eventually(
                lambda: admin.GetCanary(admin_pb2.GetCanaryRequest(), timeout=5.0).canary,
                lambda canary: canary.state == admin_pb2.CANARY_STATE_ROLLED_BACK,
            )
        took = time.monotonic() - began
        # Each process applies within a moment: its decisions are the champion's again.
        callers.wait_for_more(200)
        by_process = {decision.decision_id: decision.source for decision in callers.decisions[-100:]}
        assert set(by_process.values()) == {pb.SOURCE_PRIMARY}
        versions = {process.control_version for process in group.status().processes}
        assert len(versions) == 1
        seen(f"loaded, judged and rolled back in {took:.1f} s: {ended.verdict_reason}")
    assert callers.errors == []
