"""Two or three faults at once, drawn from a seed: a minute of open-loop load, a heal, and the invariants."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import pytest
from support.open_loop import summary
from support.rig import OpenRig, Rig, heal
from support.tcp_proxy import BLACK_HOLE, HALF_OPEN, Fault

from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = [pytest.mark.stack, pytest.mark.long]

RATE: Final = 50.0
SECONDS: Final = 60.0

Seen = Callable[[str], None]
Act = Callable[[Rig], None]


@dataclass(frozen=True)
class Step:
    at: float
    """Seconds from the start."""
    name: str
    act: Act


def faults_of(replica: str) -> dict[str, tuple[Act, Act]]:
    """What can be done to a champion, and undone."""

    def network(fault: Fault) -> Act:
        return lambda rig: rig.proxies[replica].apply(fault)

    def mend(rig: Rig) -> None:
        rig.proxies[replica].heal()

    return {
        f"{replica} killed": (lambda rig: rig.stack[replica].kill(), lambda rig: rig.stack.restart(replica)),
        f"{replica} hung": (lambda rig: rig.stack[replica].pause(), lambda rig: rig.stack[replica].resume()),
        f"{replica} slow": (network(Fault(latency_seconds=0.6)), mend),
        f"{replica} in a black hole": (network(BLACK_HOLE), mend),
        f"{replica}'s replies lost": (network(HALF_OPEN), mend),
        f"{replica}'s replies reset": (network(Fault(reset_replies_after=5_000)), mend),
        f"{replica} without SYNs": (lambda rig: rig.proxies[replica].drop_syns(), mend),
    }


def schedule(seed: int) -> list[Step]:
    """Rounds of two or three faults that overlap, each undone before the next round begins."""
    chance = random.Random(seed)
    known = {**faults_of("primary"), **faults_of("secondary")}
    known["market paused"] = (lambda rig: rig.market.pause(), lambda rig: rig.market.resume())
    steps: list[Step] = []
    length = SECONDS / 3
    for began in (0.0, length, 2 * length):
        # One fault a target: undoing a proxy's fault undoes all of it.
        targets = chance.sample(["primary", "secondary", "market"], chance.choice((2, 3)))
        for target in targets:
            name = chance.choice([name for name in known if name.startswith(target)])
            breaks, mends = known[name]
            start = began + chance.uniform(1.0, 0.3 * length)
            steps.append(Step(start, name, breaks))
            steps.append(Step(start + chance.uniform(1.0, 0.4 * length), f"{name}: undone", mends))
    return sorted(steps, key=lambda step: step.at)


@pytest.mark.timeout(300)
@pytest.mark.fault(
    "Z1",
    "Two or three faults at once on replicas, network and features, drawn from a seed",
    "All invariants hold, and no call fails.",
)
def test_the_invariants_hold_through_any_combination_of_faults(open_rig: OpenRig, seed: int, seen: Seen) -> None:
    seen(f"seed {seed}")
    rig = open_rig(proxied=("primary", "secondary"))
    with rig.load(RATE) as load:
        began = time.monotonic()
        for step in schedule(seed):
            load.run_for(max(0.0, began + step.at - time.monotonic()))
            print(f"{time.monotonic() - began:5.1f} s: {step.name}")
            step.act(rig)
        load.run_for(max(0.0, began + SECONDS - time.monotonic()))
        for proxy in rig.proxies.values():
            proxy.heal()
        rig.market.resume()
        heal(rig.stack)
        rig.server.wait_until_well("primary", "secondary")
        healed = len(load.calls())
        load.run_for(2.0)
    calls = load.calls()
    seen(", ".join(step.name for step in schedule(seed) if not step.name.endswith("undone")))
    seen(summary(calls))
    seen(rig.check())
    assert {call.status for call in calls} == {"OK"}
    assert pb.SOURCE_PRIMARY in {call.decision.source for call in calls[healed:] if call.decision}
