"""Makes a failing plan shorter: leaves steps out as long as what remains fails in the same way."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from simulation.plan import Plan
from simulation.run import run

_MOST_RUNS: Final = 200


def shortest(seed: int, plan: Plan, kinds: set[str]) -> Plan:
    """A plan as short as can be found in a few hundred runs.

    Args:
        seed: Whose chances it keeps; a step's own do not depend on the others.
        plan: Fails.
        kinds: Names of the checks that find something; one of them must go on doing so.
    """
    runs = 0
    size = max(1, len(plan.steps) // 2)
    while runs < _MOST_RUNS:
        start, shorter = 0, False
        while start < len(plan.steps) and runs < _MOST_RUNS:
            steps = plan.steps[:start] + plan.steps[start + size :]
            runs += 1
            if steps and run(seed, replace(plan, steps=steps)).kinds & kinds:
                plan = replace(plan, steps=steps)
                shorter = True
            else:
                start += size
        if size == 1 and not shorter:
            break
        size = max(1, size // 2)
    return plan
