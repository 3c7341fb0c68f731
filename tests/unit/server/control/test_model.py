"""The control state as data: merging in any order, what a change makes of it, and what is forgotten."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from server.control.model import (
    STRICTNESS,
    TRADING_STATE,
    UNDECIDED,
    Change,
    Control,
    Kept,
    Timed,
    Trading,
    is_stricter,
)

SUBJECTS = ("flag/shadow", "breaker/primary")


def over(_: Timed) -> bool:
    return True


def not_over(_: Timed) -> bool:
    return False


def halt(change_id: str, level: str = "HALTED", **more: object) -> Change:
    said = {"id": change_id, "subject": TRADING_STATE, "value": level, "author": "ann", "reason": "test"}
    return Change.model_validate(said | more)


def relax(change_id: str, lifts: Iterable[str], level: str = "ACTIVE", **more: object) -> Change:
    return halt(change_id, level, lifts=tuple(lifts), **more)


class Server:
    """A copy of the control state, and what was changed on it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.control = Control()
        self._numbers = itertools.count()

    def change(self, subject: str, value: str, random_: random.Random) -> None:
        change_id = f"{self.name}-{next(self._numbers)}"
        if subject != TRADING_STATE:
            change = Change(id=change_id, subject=subject, value=value, author="ann", reason="test")
        else:
            standing = sorted(self.control.trading.restrictions)
            lifts = random_.sample(standing, random_.randrange(len(standing) + 1)) if value == "ACTIVE" else []
            change = relax(change_id, lifts, value)
        self.control = self.control.with_change(change)


@st.composite
def histories(draw: st.DrawFn) -> list[Control]:
    """Copies of one control state that were changed and met now and then, in any order; also older copies."""
    servers = [Server(name) for name in "abc"]
    copies = [Control()]
    for _ in range(draw(st.integers(1, 25))):
        server = draw(st.sampled_from(servers))
        if draw(st.booleans()):
            subject = draw(st.sampled_from((TRADING_STATE, *SUBJECTS)))
            values = STRICTNESS if subject == TRADING_STATE else ("on", "off", "forced_open")
            server.change(subject, draw(st.sampled_from(values)), draw(st.randoms(use_true_random=False)))
        else:
            server.control = server.control.merged(draw(st.sampled_from(copies)))
        copies.append(server.control)
    return copies


@settings(max_examples=100, deadline=None)
@given(histories(), st.data())
def test_merging_is_commutative_associative_and_idempotent(copies: list[Control], data: st.DataObject) -> None:
    a, b, c = (data.draw(st.sampled_from(copies)) for _ in range(3))
    assert a.merged(b) == b.merged(a)
    assert a.merged(b).merged(c) == a.merged(b.merged(c))
    assert a.merged(a) == a
    assert a.merged(b).merged(b) == a.merged(b)


@settings(max_examples=100, deadline=None)
@given(histories(), st.randoms(use_true_random=False))
def test_in_any_order_of_reconnects_all_end_with_every_restriction_that_nobody_lifted(
    copies: list[Control], random_: random.Random
) -> None:
    lifted = {one for copy in copies for one in copy.trading.lifted}
    standing = {one for copy in copies for one in copy.trading.restrictions} - lifted
    ends = []
    for _ in range(3):
        order = random_.sample(copies, len(copies))
        state = order[0]
        for copy in order[1:]:
            state = state.merged(copy)
        ends.append(state)
    assert ends[0] == ends[1] == ends[2]
    assert set(ends[0].trading.restrictions) == standing


@settings(max_examples=100, deadline=None)
@given(histories(), st.data())
def test_meeting_another_copy_relaxes_nothing_but_what_that_one_names(
    copies: list[Control], data: st.DataObject
) -> None:
    mine, other = (data.draw(st.sampled_from(copies)) for _ in range(2))
    lost = set(mine.trading.restrictions) - set(mine.merged(other).trading.restrictions)
    assert lost <= set(other.trading.lifted)


def test_a_halt_that_one_copy_lost_comes_back_from_another_whatever_their_versions_are() -> None:
    shared = Control().with_change(relax("begin", [UNDECIDED.id]))
    with_halt = shared.with_change(halt("halt"))
    without = shared
    for number in range(5):
        without = without.with_change(
            Change(id=f"z{number}", subject="flag/shadow", value="off", author="ben", reason="test")
        )
    assert without.version > with_halt.version
    assert with_halt.merged(without).trading.state(not_over) == "HALTED"
    lifted = with_halt.merged(without).with_change(relax("over", ["halt"]))
    assert lifted.merged(with_halt).merged(without).trading.state(not_over) == "ACTIVE"


def test_nothing_is_as_strict_as_a_state_that_nobody_has_ever_set() -> None:
    assert Control().trading.state(not_over) == "HALTED"
    assert Control().with_change(relax("a", [UNDECIDED.id], "REDUCING")).trading.state(not_over) == "REDUCING"
    assert Control().with_change(relax("a", [UNDECIDED.id])).trading.state(not_over) == "ACTIVE"


def test_a_change_of_which_only_one_end_is_known_happens_once() -> None:
    control = Control().with_change(relax("begin", [UNDECIDED.id]))
    halted = control.with_change(halt("halt"))
    assert halted.with_change(halt("halt")) is halted
    flag = Change(id="flag", subject="flag/shadow", value="off", author="ann", reason="test")
    assert halted.with_change(flag).merged(control.with_change(flag)).with_change(flag).settings.keys() == {
        "flag/shadow"
    }


def test_of_other_subjects_the_one_that_was_changed_at_the_higher_version_wins_each_by_itself() -> None:
    def flag(change_id: str, subject: str, value: str) -> Change:
        return Change(id=change_id, subject=subject, value=value, author="ann", reason="test")

    one = Control().with_change(flag("1", "flag/shadow", "off")).with_change(flag("2", "breaker/primary", "open"))
    two = Control().with_change(flag("3", "breaker/primary", "closed")).with_change(flag("4", "flag/shadow", "on"))
    merged = one.merged(two)
    assert merged.value("flag/shadow", not_over) == "on"
    assert merged.value("breaker/primary", not_over) == "open"


def test_what_was_reset_is_not_set_again_by_an_older_copy() -> None:
    set_ = Control().with_change(Change(id="1", subject="chain", value="rules", author="ann", reason="test"))
    reset = set_.with_change(Change(id="2", subject="chain", value=None, author="ann", reason="test"))
    assert set_.merged(reset).value("chain", not_over) is None


def test_two_states_that_say_different_things_never_have_one_version_once_they_have_met() -> None:
    begun = Control().with_change(relax("begin", [UNDECIDED.id]))
    found = begun.with_change(Change(id="1", subject="flag/shadow", value="off", author="ann", reason="test"))
    mine = begun.with_change(halt("halt"))
    assert mine.version == found.version
    assert found.merged(mine).following(found).version == found.version + 1
    assert found.merged(begun).following(found) == found
    noted = found.with_record("1", "{}")
    assert noted.following(found).version == found.version, "what is noted of records steers nobody"


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_what_is_forgotten_of_very_many_lifted_restrictions_halts_once_too_often_never_once_too_seldom(
    seed: int, random_: random.Random
) -> None:
    exact, bounded = Trading(), Trading()
    copies, lifted = [bounded], set[str]()
    restrictions = {UNDECIDED.id}
    for version in range(1, 700):
        added, ended = f"halt-{version}", random_.choice(sorted(restrictions))
        restrictions.add(added)
        lifted.add(ended)
        change = relax(added, [ended], "HALTED")
        bounded, exact = bounded.with_change(change, version), exact.with_change(change, version)
        copies.append(bounded)
    assert len(bounded.lifted) <= 256
    for copy in random_.sample(copies, 50):
        bounded = bounded.merged(copy)
    assert set(bounded.restrictions) >= restrictions - lifted


def test_that_a_new_installation_was_begun_is_never_forgotten() -> None:
    trading = Trading().with_change(relax("begin", [UNDECIDED.id]), 1)
    for version in range(2, 400):
        trading = trading.with_change(halt(f"halt-{version}"), version)
        trading = trading.with_change(relax(f"over-{version}", [f"halt-{version}"]), version)
    assert trading.merged(Trading()).state(not_over) == "ACTIVE"


def test_changes_that_wait_are_made_in_the_order_in_which_they_were_made_whatever_their_ids_say() -> None:
    def flag(change_id: str, value: str, sequence: int) -> Change:
        return Change(id=change_id, subject="flag/shadow", value=value, sequence=sequence, author="ann", reason="test")

    # The wall clock went back an hour between them, and with it the time in their ids.
    kept = Kept(pending=(flag("9", "off", 1),)).merged(Kept(pending=(flag("1", "on", 2),)))
    assert kept.control.with_changes(kept.pending).value("flag/shadow", not_over) == "on"
    stricter = Kept(pending=(halt("9", "REDUCING", sequence=1), halt("1", "HALTED", sequence=2)))
    for pending in itertools.permutations(stricter.pending):
        assert Control().with_changes(pending).trading.state(not_over) == "HALTED"


def test_what_waits_and_is_known_to_be_shared_waits_no_more() -> None:
    change = halt("halt")
    kept = Kept(pending=(change,)).merged(Kept(control=Control().with_change(change)))
    assert kept.pending == ()
    assert kept.merged(Kept(pending=(change,))).pending == ()


def test_what_one_process_has_recorded_is_recorded() -> None:
    unrecorded = Control().with_change(halt("halt")).with_record("halt", "{}")
    recorded = unrecorded.with_record("halt", None)
    assert unrecorded.merged(recorded) == recorded.merged(unrecorded) == recorded
    pending, noted = Kept(pending=(halt("1", record="{}"),)), Kept(pending=(halt("1"),))
    assert pending.merged(noted) == noted.merged(pending) == noted
    written = Kept(control=Control().with_change(halt("1", record="{}")))  # by a write whose answer was lost
    for kept in (noted.merged(written), written.merged(noted)):
        assert kept.control.changes["1"].record is None


def test_a_restriction_with_an_end_counts_until_then_and_one_with_a_beginning_from_then_on() -> None:
    begun = Control().with_change(relax("begin", [UNDECIDED.id])).with_change(halt("halt"))
    until = begun.with_change(relax("lift", ["halt"])).with_change(halt("1", seconds=60, expires_at=60.0))
    assert (until.trading.state(not_over), until.trading.state(over)) == ("HALTED", "ACTIVE")
    again = begun.with_change(relax("lift", ["halt"], seconds=60, expires_at=60.0, again="HALTED"))
    assert (again.trading.state(not_over), again.trading.state(over)) == ("ACTIVE", "HALTED")
    (coming,) = again.trading.restrictions.values()
    end = Change(id="end", subject=TRADING_STATE, value="HALTED", ends=coming.id, author="expiry", reason="test")
    for_good = again.with_change(end)
    assert (for_good.trading.state(not_over), for_good.trading.state(over)) == ("HALTED", "HALTED")
    assert for_good.with_change(end.model_copy(update={"id": "end-2"})) is for_good, "it ends once"


def test_what_a_change_relaxes_depends_on_what_it_puts_in_its_place() -> None:
    trading = Control().with_change(halt("halt")).with_change(halt("reduce", "REDUCING")).trading
    assert trading.relaxes(relax("1", ["halt"], "REDUCING"))
    assert not trading.relaxes(relax("1", ["reduce"], "REDUCING"))
    assert not trading.relaxes(relax("1", ["halt"], "HALTED"))
    assert trading.relaxes(relax("1", ["halt"], "HALTED", seconds=60, expires_at=60.0)), "for a time only"
    assert not trading.relaxes(relax("1", ["unknown"]))
    assert is_stricter("HALTED", "REDUCING")
