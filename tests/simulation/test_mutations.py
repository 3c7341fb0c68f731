"""What `make simulate-mutations` takes out of the source is there."""

from __future__ import annotations

import pytest

from simulation.mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.bug.replace(" ", "-") for mutation in MUTATIONS])
def test_the_protection_that_a_mutation_takes_out_is_in_the_source(mutation: Mutation) -> None:
    text = (ROOT / mutation.path).read_text()
    for before in (mutation.before, *(before for before, _ in mutation.also)):
        assert before in text, "if you changed the code, state in `mutations.py` what the protection is now"
