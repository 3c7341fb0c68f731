"""Who is admitted, and how the limit follows latency."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Clock
from support.modelled_server import ALLOWED_SECONDS, CAPACITY, ModelledServer
from support.virtual_time import VirtualTimeLoop

from server.decision.admission import PATIENCE_SECONDS, WAITING_BATCHES, Admission, AdmissionSettings
from server.errors import DrainingError, OverloadedError

TARGET = 0.015
ALLOWED = 1.0
"""So much that the target is `TARGET`, and not a share of it."""


def new_admission(
    max_in_flight: int = 100, min_in_flight: int = 4, reserved_share: float = 0
) -> tuple[Admission, Clock]:
    clock = Clock()
    settings = AdmissionSettings(
        max_in_flight=max_in_flight,
        min_in_flight=min_in_flight,
        target_seconds=TARGET,
        reserved_share=reserved_share,
    )
    return Admission(settings, clock), clock


@contextmanager
def placed(admission: Admission) -> Iterator[None]:
    admission.admit(False)
    yield
    admission.leave()


def pass_window(admission: Admission, clock: Clock, seconds: float | None) -> None:
    """A window of calls that all took so long, or were all dropped."""
    for _ in range(20):
        clock.now += 0.01
        if seconds is None:
            admission.dropped(0.025)
        else:
            admission.answered([(seconds, ALLOWED)])


def test_calls_beyond_the_limit_are_shed_and_counted() -> None:
    admission, _ = new_admission(max_in_flight=2, min_in_flight=1)
    with placed(admission), placed(admission):
        with pytest.raises(OverloadedError) as caught:
            admission.admit(False)
        assert caught.value.reason == "TOO_MANY_IN_FLIGHT"
        assert (admission.in_flight, admission.shed) == (2, 1)
    assert admission.in_flight == 0
    with placed(admission):
        assert admission.in_flight == 1


def test_a_draining_server_admits_nothing_new_and_lets_the_rest_finish() -> None:
    admission, _ = new_admission()
    with placed(admission):
        admission.draining = True
        with pytest.raises(DrainingError):
            admission.admit(True)
        assert (admission.in_flight, admission.shed) == (1, 0)
    assert admission.in_flight == 0


def test_the_reserved_lane_is_for_orders_that_only_reduce() -> None:
    admission, _ = new_admission(max_in_flight=10, reserved_share=0.2)
    for _ in range(8):
        admission.admit(False)
    with pytest.raises(OverloadedError):
        admission.admit(False)
    admission.admit(True)
    admission.admit(True)
    with pytest.raises(OverloadedError):
        admission.admit(True)
    assert (admission.in_flight, admission.shed) == (10, 2)


def test_even_a_limit_of_one_admits_an_ordinary_order() -> None:
    admission, _ = new_admission(max_in_flight=1, min_in_flight=1, reserved_share=0.9)
    with placed(admission):
        assert admission.in_flight == 1


def test_the_limit_starts_at_its_maximum_and_stays_there_while_calls_are_quick() -> None:
    admission, clock = new_admission()
    assert admission.limit == 100
    pass_window(admission, clock, TARGET)
    assert admission.limit == 100


def filled_window(admission: Admission, clock: Clock, seconds: float, share: float) -> None:
    """The same of a window in which this share of the limit was under way at once."""
    orders = int(share * admission.limit)
    assert admission.admit_together(orders)
    admission.leave(orders)
    pass_window(admission, clock, seconds)


def test_the_limit_rises_above_512_quickly_where_more_are_needed_and_in_time_with_ease() -> None:
    admission, clock = new_admission(max_in_flight=2_048)
    assert admission.limit == 512
    found = []
    for _ in range(5):
        filled_window(admission, clock, TARGET / 2, 0.5)
        found.append(admission.limit)
    assert found == [768, 1_152, 1_728, 2_048, 2_048]


def test_it_rises_by_its_root_where_they_are_only_just_in_time() -> None:
    admission, clock = new_admission(max_in_flight=2_048)
    filled_window(admission, clock, TARGET, 0.9)
    assert admission.limit == 534


def test_places_above_512_that_nobody_needs_are_given_back() -> None:
    admission, clock = new_admission(max_in_flight=2_048)
    pass_window(admission, clock, 0.001)
    assert admission.limit == 512, "nobody needed more"
    filled_window(admission, clock, 0.001, 1.0)
    assert admission.limit == 768
    limits = []
    while admission.limit > 512:
        filled_window(admission, clock, 0.001, 0.4)
        limits.append(admission.limit)
    assert limits[0] == 740
    assert len(limits) == 11
    pass_window(admission, clock, 0.001)
    assert admission.limit == 512


def test_what_is_under_way_when_a_window_begins_counts_in_it() -> None:
    admission, clock = new_admission(max_in_flight=2_048)
    assert admission.admit_together(400)
    for expected in (768, 1_152, 1_118):  # which is no half of 1,152
        pass_window(admission, clock, 0.001)
        assert admission.limit == expected


def test_slow_calls_lower_the_limit_in_proportion_but_never_by_more_than_a_third() -> None:
    admission, clock = new_admission()
    pass_window(admission, clock, TARGET * 1.25)
    assert admission.limit == 80
    pass_window(admission, clock, TARGET * 100)
    assert admission.limit == 56
    pass_window(admission, clock, None)
    assert admission.limit == 39


def test_one_call_in_ten_may_be_slow() -> None:
    admission, clock = new_admission()
    for number in range(20):
        clock.now += 0.01
        admission.answered([(1.0 if number in (3, 4) else 0.001, ALLOWED)])
    assert admission.limit == 100
    for number in range(20):
        clock.now += 0.01
        admission.answered([(1.0 if number in (3, 4, 5) else 0.001, ALLOWED)])
    assert admission.limit == 70


def test_quick_calls_raise_the_limit_again_by_its_root() -> None:
    admission, clock = new_admission()
    for _ in range(10):
        pass_window(admission, clock, None)
    assert admission.limit == 4
    pass_window(admission, clock, 0.001)
    assert admission.limit == 6
    windows = 0
    while admission.limit < 100:
        pass_window(admission, clock, 0.001)
        windows += 1
    assert windows < 20


def test_a_window_needs_time_and_calls() -> None:
    admission, clock = new_admission()
    for _ in range(1_000):
        admission.answered([(1.0, ALLOWED)])
    assert admission.limit == 100, "no time has passed"
    clock.now += 0.2
    admission.answered([(1.0, ALLOWED)])
    assert admission.limit == 70
    clock.now += 10
    for _ in range(19):
        admission.answered([(1.0, ALLOWED)])
    assert admission.limit == 70, "too few calls"


def test_a_call_granted_hardly_any_time_says_nothing() -> None:
    admission, clock = new_admission()
    for _ in range(100):
        clock.now += 0.01
        admission.dropped(TARGET / 4)
    assert admission.limit == 100


@given(
    bounds=st.tuples(st.integers(1, 500), st.integers(1, 500)).map(sorted),
    windows=st.lists(st.one_of(st.none(), st.floats(0, 10)), max_size=40),
)
def test_the_limit_keeps_its_bounds(bounds: list[int], windows: list[float | None]) -> None:
    admission, clock = new_admission(max_in_flight=bounds[1], min_in_flight=bounds[0])
    for seconds in windows:
        before = admission.limit
        pass_window(admission, clock, seconds)
        assert bounds[0] <= admission.limit <= bounds[1]
        if seconds is not None and seconds <= TARGET:
            assert admission.limit >= before
        else:
            assert admission.limit <= before


@pytest.mark.parametrize(
    ("target_seconds", "allowed_seconds", "seconds", "limit"),
    [
        (None, 0.2, 0.12, 100),
        (None, 0.2, 0.15, 80),
        (None, 0.02, 0.015, 80),
        (0.04, 0.2, 0.05, 80),
        (0.5, 0.2, 0.15, 80),
    ],
)
def test_an_answer_is_slow_by_what_its_caller_allowed(
    target_seconds: float | None, allowed_seconds: float, seconds: float, limit: int
) -> None:
    clock = Clock()
    admission = Admission(AdmissionSettings(max_in_flight=100, min_in_flight=4, target_seconds=target_seconds), clock)
    for _ in range(20):
        clock.now += 0.01
        admission.answered([(seconds, allowed_seconds)])
    assert (admission.limit, admission.keeps_up) == (limit, limit == 100)


def test_an_answer_that_was_allowed_hardly_any_time_says_nothing() -> None:
    admission, clock = new_admission()
    for _ in range(100):
        clock.now += 0.01
        admission.answered([(1.0, 0.005)])
    assert admission.limit == 100


@pytest.fixture
def loop() -> Iterator[VirtualTimeLoop]:
    loop = VirtualTimeLoop()
    yield loop
    loop.close()


class Patient:
    """Orders without a deadline, four places of which three are for them, and six orders under way or waiting at most.

    Args:
        loop: Has the time.
    """

    def __init__(self, loop: VirtualTimeLoop) -> None:
        self.loop = loop
        settings = AdmissionSettings(max_in_flight=6, min_in_flight=4, reserved_share=0)
        self.admission = Admission(settings, loop.time)
        self.admission._limit = 4.0
        self.heard: list[str] = []

    def send(self, name: str) -> asyncio.Task[None]:
        return self.loop.create_task(self._send(name))

    async def _send(self, name: str) -> None:
        await self.admission.place()
        try:
            self.admission.admit(False)
        except OverloadedError:
            self.heard.append(f"{name} refused")
        else:
            self.heard.append(f"{name} admitted")

    def leave(self) -> None:
        self.admission.leave()


def test_an_order_without_a_deadline_waits_for_a_place_behind_those_that_came_before(loop: VirtualTimeLoop) -> None:
    async def scenario() -> None:
        orders = Patient(loop)
        for name in "abcde":
            orders.send(name)
            await asyncio.sleep(0)
        assert orders.heard == ["a admitted", "b admitted", "c admitted"]
        assert (orders.admission.in_flight, orders.admission.waiting) == (3, 2)
        orders.leave()
        orders.send("f")
        await asyncio.sleep(0.01)
        assert orders.heard[3:] == ["d admitted"]
        orders.leave()
        orders.leave()
        await asyncio.sleep(0.01)
        assert orders.heard[4:] == ["e admitted", "f admitted"]
        assert orders.admission.waiting == orders.admission.shed == 0

    loop.run_until_complete(scenario())


def test_an_order_with_a_deadline_is_admitted_before_those_that_wait(loop: VirtualTimeLoop) -> None:
    async def scenario() -> None:
        orders = Patient(loop)
        for name in "abcd":
            orders.send(name)
        await asyncio.sleep(0.01)
        orders.admission.admit(False)
        assert (orders.admission.in_flight, orders.admission.waiting) == (4, 1)
        with pytest.raises(OverloadedError):
            orders.admission.admit(False)
        orders.leave()
        await asyncio.sleep(0.01)
        assert orders.admission.waiting == 1, "three of the four places are taken again"

    loop.run_until_complete(scenario())


def test_an_order_that_has_waited_long_enough_takes_any_place_there_is_or_is_refused(loop: VirtualTimeLoop) -> None:
    async def scenario() -> None:
        orders = Patient(loop)
        for name in "abcde":
            orders.send(name)
        await asyncio.sleep(PATIENCE_SECONDS / 2)
        assert len(orders.heard) == 3
        await asyncio.sleep(PATIENCE_SECONDS)
        assert orders.heard[3:] == ["d admitted", "e refused"]
        assert orders.admission.waiting == 0

    loop.run_until_complete(scenario())


def test_no_more_orders_wait_than_may_be_under_way(loop: VirtualTimeLoop) -> None:
    async def scenario() -> None:
        orders = Patient(loop)
        orders.admission.admit(False)
        for name in "abcdef":
            orders.send(name)
        await asyncio.sleep(0.01)
        assert (orders.admission.in_flight, orders.admission.waiting) == (4, 3)
        assert orders.heard[2:] == ["f admitted"], "the last one was not let wait, and took the fourth place"
        orders.send("g")
        await asyncio.sleep(0.01)
        assert orders.heard[3:] == ["g refused"]

    loop.run_until_complete(scenario())


def test_who_leaves_while_its_turn_comes_lets_the_next_one_in(loop: VirtualTimeLoop) -> None:
    async def scenario() -> None:
        orders = Patient(loop)
        tasks = [orders.send(name) for name in "abcde"]
        await asyncio.sleep(0.01)
        orders.leave()
        tasks[3].cancel()
        await asyncio.sleep(0.01)
        assert orders.heard[3:] == ["e admitted"]
        assert orders.admission.waiting == 0

    loop.run_until_complete(scenario())


def test_nobody_waits_for_a_server_that_drains(loop: VirtualTimeLoop) -> None:
    async def scenario() -> None:
        orders = Patient(loop)
        for _ in range(3):
            orders.admission.admit(False)
        orders.admission.draining = True
        began = loop.time()
        await orders.admission.place()
        assert loop.time() == began

    loop.run_until_complete(scenario())


def test_orders_that_come_together_get_their_places_all_or_none() -> None:
    admission, _ = new_admission(max_in_flight=10, min_in_flight=10, reserved_share=0.0)
    assert admission.admit_together(8)
    assert not admission.admit_together(3)
    assert (admission.in_flight, admission.shed) == (8, 0), "each is asked about alone next"
    assert admission.admit_together(2)
    admission.leave(10)
    admission.draining = True
    assert not admission.admit_together(1)
    assert admission.in_flight == 0


def test_a_batch_gets_the_places_there_are_and_waits_where_there_are_none(loop: VirtualTimeLoop) -> None:
    async def scenario() -> None:
        admission = Patient(loop).admission
        assert await admission.places(64, 60.0, has_begun=False) == 3, "three of the four are for those who wait"
        assert admission.admit_together(3)
        waiting = loop.create_task(admission.places(64, 60.0, has_begun=False))
        await asyncio.sleep(0.01)
        assert (waiting.done(), admission.waiting, admission.waiting_orders) == (False, 1, 0)
        admission.leave(2)
        assert await waiting == 2

    loop.run_until_complete(scenario())


def test_a_batch_that_has_waited_long_enough_hears_that_there_is_no_place(loop: VirtualTimeLoop) -> None:
    async def scenario() -> None:
        admission = Patient(loop).admission
        for _ in range(4):
            admission.admit(False)
        began = loop.time()
        assert await admission.places(64, 0.1, has_begun=False) == 0
        assert loop.time() - began == pytest.approx(0.1)
        assert await admission.places(64, 60.0, has_begun=False) == 0
        assert loop.time() - began == pytest.approx(0.1 + PATIENCE_SECONDS)
        assert isinstance(admission.refused(64), OverloadedError)
        assert admission.shed == 64

    loop.run_until_complete(scenario())


def test_a_batch_that_has_begun_comes_before_those_that_have_not(loop: VirtualTimeLoop) -> None:
    async def scenario() -> None:
        admission, heard = Patient(loop).admission, list[str]()
        assert admission.admit_together(3)

        async def wait(name: str, *, has_begun: bool) -> None:
            assert admission.admit_together(await admission.places(3, 60.0, has_begun=has_begun))
            heard.append(name)

        for name, has_begun in (("new", False), ("other new", False), ("begun", True)):
            loop.create_task(wait(name, has_begun=has_begun))
            await asyncio.sleep(0)
        for expected in (["begun"], ["begun", "new"], ["begun", "new", "other new"]):
            admission.leave(3)
            await asyncio.sleep(0.01)
            assert heard == expected

    loop.run_until_complete(scenario())


def test_only_so_many_batches_wait(loop: VirtualTimeLoop) -> None:
    async def scenario() -> None:
        admission = Admission(AdmissionSettings(max_in_flight=512, reserved_share=0), loop.time)
        admission._limit = 96.0
        assert admission.admit_together(96)
        waiting = [loop.create_task(admission.places(64, 60.0, has_begun=False)) for _ in range(WAITING_BATCHES)]
        await asyncio.sleep(0)
        assert admission.waiting == WAITING_BATCHES
        began = loop.time()
        assert await admission.places(64, 60.0, has_begun=False) == 0
        assert loop.time() == began, "it was not let wait"
        await asyncio.gather(*waiting)

    loop.run_until_complete(scenario())


@pytest.mark.parametrize("callers", [4, 16])
def test_batches_are_decided_however_far_the_limit_has_fallen(loop: VirtualTimeLoop, callers: int) -> None:
    settings = AdmissionSettings()
    server = ModelledServer(loop, settings)
    server.admission._limit = float(settings.min_in_flight)

    rate = loop.run_until_complete(server.run(callers, 256, seconds=1.0))

    assert rate >= 0.8 * CAPACITY
    assert server.refused_orders == 0


def test_what_a_slow_time_has_cost_comes_back_by_itself(loop: VirtualTimeLoop) -> None:
    server = ModelledServer(loop, AdmissionSettings())
    server.slowness = 8.0
    loop.run_until_complete(server.run(8, 256, seconds=2.0))
    assert server.admission.limit < 4 * 64, "less than the callers have in their first slices"
    server.slowness, server.refused_orders = 1.0, 0

    rate = loop.run_until_complete(server.run(8, 256, seconds=1.0))

    assert rate >= 0.8 * CAPACITY
    assert server.refused_orders == 0


def test_batches_with_deadlines_come_to_their_ends_before_others_begin(loop: VirtualTimeLoop) -> None:
    server = ModelledServer(loop, AdmissionSettings())
    server.admission._limit = 96.0
    rate = loop.run_until_complete(server.run(16, 256, seconds=1.0, deadline_seconds=ALLOWED_SECONDS))
    assert rate >= 0.5 * CAPACITY, "a fifth of each batch would be worth nothing"
