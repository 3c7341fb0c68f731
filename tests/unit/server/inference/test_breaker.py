"""The breaker: a state machine against a plain model of it, and its rules one by one."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule
from support.cases import Clock

from server.inference.breaker import Breaker, BreakerSettings, Mode, State
from server.inference.outcome import Outcome

SETTINGS = BreakerSettings(
    consecutive_failures=3,
    failure_rate=0.5,
    slow_rate=0.8,
    slow_seconds=0.025,
    window_seconds=10,
    minimum_calls=6,
    open_seconds=0.5,
    max_open_seconds=3.0,
    half_open_probes=2,
)
FAILURES = (Outcome.MODEL_ERROR, Outcome.BAD_ANSWER, Outcome.TRANSPORT, Outcome.TIMEOUT)
NEUTRAL = (Outcome.OVERLOAD, Outcome.IGNORED)
QUICK, SLOW = 0.001, 0.025
LEGAL = {
    (State.CLOSED, State.OPEN),
    (State.OPEN, State.HALF_OPEN),
    (State.HALF_OPEN, State.OPEN),
    (State.HALF_OPEN, State.CLOSED),
}


class BreakerMachine(RuleBasedStateMachine):
    """Drives a breaker and a model of it that keeps every call instead of counting."""

    calls = Bundle("calls")
    probes = Bundle("probes")

    @initialize()
    def start(self) -> None:
        self.now = 5_000.0
        self.jitter = 0.0
        self.transitions: list[tuple[State, State]] = []
        self.breaker = Breaker(
            "primary",
            SETTINGS,
            lambda: self.now,
            lambda: self.jitter,
            lambda previous, state: self.transitions.append((previous, state)),
        )
        # The model.
        self.state = State.CLOSED
        self.generation = 0
        self.closed_at = -math.inf
        self.history: list[tuple[float, bool, bool]] = []
        self.bad_in_a_row = 0
        self.openings = 0
        self.half_open_at = 0.0
        self.probing = 0
        self.probe_successes = 0
        self.mode = Mode.AUTOMATIC
        self.mode_ends = math.inf

    @rule(seconds=st.sampled_from((0.01, 0.3, 0.6, 1.0, 3.0, 9.0, 10.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(jitter=st.floats(0, 1, exclude_max=True))
    def jitter_changes(self, jitter: float) -> None:
        self.jitter = jitter

    @rule(target=calls)
    def a_call_begins(self) -> int:
        return self.breaker.generation

    @rule(
        generation=calls,
        outcome=st.sampled_from((Outcome.SUCCESS, Outcome.SUCCESS, *FAILURES, *NEUTRAL)),
        seconds=st.sampled_from((QUICK, SLOW)),
    )
    def a_call_ends(self, generation: int, outcome: Outcome, seconds: float) -> None:
        self.breaker.record(outcome, seconds, generation)
        if self.state is not State.CLOSED or generation != self.generation or outcome in NEUTRAL:
            return
        failed = outcome in FAILURES
        self.bad_in_a_row = self.bad_in_a_row + 1 if failed or seconds >= SLOW else 0
        self.history.append((self.now, failed, seconds >= SLOW))
        # The window moves in tenths of its length, here whole seconds.
        window = [call for call in self.history if int(call[0]) > int(self.now) - 10]
        enough = len(window) >= 6
        if (
            self.bad_in_a_row >= 3
            or (enough and sum(call[1] for call in window) >= 0.5 * len(window))
            or (enough and sum(call[2] for call in window) >= 0.8 * len(window))
        ):
            self.opens()

    @rule(target=probes)
    def a_probe_is_asked_for(self) -> int | None:
        granted = self.breaker.try_probe()
        if self.state is State.OPEN and self.now >= self.half_open_at:
            self.moves_to(State.HALF_OPEN)
            self.probing = self.probe_successes = 0
        if self.state is not State.HALF_OPEN or self.probing >= 2:
            assert granted is None
        else:
            assert granted == self.generation
            self.probing += 1
        return granted

    @rule(
        generation=consumes(probes),
        outcome=st.sampled_from((Outcome.SUCCESS, Outcome.SUCCESS, Outcome.SUCCESS, *FAILURES, *NEUTRAL)),
        seconds=st.sampled_from((QUICK, QUICK, SLOW)),
    )
    def a_probe_ends(self, generation: int | None, outcome: Outcome, seconds: float) -> None:
        if generation is None:
            return
        self.breaker.record_probe(outcome, seconds, generation)
        if generation != self.generation:
            return
        self.probing -= 1
        if outcome in NEUTRAL:
            return
        if outcome in FAILURES or seconds >= SLOW:
            self.opens()
            return
        self.probe_successes += 1
        if self.probe_successes == 2:
            self.history = []
            self.bad_in_a_row = 0
            self.closed_at = self.now
            self.moves_to(State.CLOSED)

    @rule(mode=st.sampled_from(Mode), expires=st.sampled_from((None, 0.5, 5.0)))
    def somebody_forces_it(self, mode: Mode, expires: float | None) -> None:
        self.breaker.force(mode, expires)
        self.mode = mode
        self.mode_ends = math.inf if expires is None else self.now + expires

    @precondition(lambda self: self.state is State.OPEN)
    @rule()
    def time_passes_to_just_before_half_open(self) -> None:
        self.now = max(self.now, self.half_open_at - 1e-6)

    def opens(self) -> None:
        if self.state is State.CLOSED and self.now - self.closed_at >= 10:
            self.openings = 0
        self.openings += 1
        self.moves_to(State.OPEN)
        base = min(3.0, 0.5 * 2 ** (self.openings - 1))
        seconds = self.breaker.seconds_to_half_open
        assert 0.8 * base - 1e-9 <= seconds <= base + 1e-9
        self.half_open_at = self.now + seconds

    def moves_to(self, state: State) -> None:
        self.state = state
        self.generation += 1

    @invariant()
    def the_state_is_the_models(self) -> None:
        assert self.breaker.state is self.state
        assert self.breaker.generation == self.generation == len(self.transitions)

    @invariant()
    def every_transition_is_legal(self) -> None:
        assert set(self.transitions) <= LEGAL

    @invariant()
    def orders_pass_only_where_they_may(self) -> None:
        mode = Mode.AUTOMATIC if self.now >= self.mode_ends else self.mode
        expected = {
            Mode.AUTOMATIC: self.state is State.CLOSED,
            Mode.FORCED_OPEN: False,
            Mode.FORCED_CLOSED: True,
            Mode.METRICS_ONLY: True,
        }[mode]
        assert self.breaker.passes is expected
        assert self.breaker.mode is mode


BreakerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50)
TestBreaker = BreakerMachine.TestCase


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker("primary", SETTINGS, clock, lambda: 0.5, lambda _previous, _state: None)


def state(breaker: Breaker) -> State:
    """The state now: a call, because a type checker takes a property for a constant."""
    return breaker.state


def suspicious(breaker: Breaker) -> bool:
    return breaker.suspicious


def passes(breaker: Breaker) -> bool:
    return breaker.passes


def fail(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        breaker.record(Outcome.TRANSPORT, QUICK, breaker.generation)


def half_open(breaker: Breaker, clock: Clock) -> int:
    fail(breaker, 3)
    clock.now += breaker.seconds_to_half_open
    generation = breaker.try_probe()
    assert generation is not None
    return generation


def test_failures_in_a_row_open_it(breaker: Breaker) -> None:
    fail(breaker, 2)
    assert passes(breaker)
    fail(breaker, 1)
    assert state(breaker) is State.OPEN
    assert not passes(breaker)


def test_a_success_ends_a_row_of_failures(breaker: Breaker) -> None:
    fail(breaker, 2)
    breaker.record(Outcome.SUCCESS, QUICK, breaker.generation)
    fail(breaker, 2)
    assert state(breaker) is State.CLOSED


@pytest.mark.parametrize("outcome", NEUTRAL)
def test_overload_and_ignored_count_for_nothing(breaker: Breaker, outcome: Outcome) -> None:
    fail(breaker, 2)
    for _ in range(100):
        breaker.record(outcome, SLOW, breaker.generation)
    assert state(breaker) is State.CLOSED
    fail(breaker, 1)
    assert state(breaker) is State.OPEN, "nor do they end a row of failures"


def test_the_failure_rate_opens_it_only_from_the_minimum_of_calls(breaker: Breaker) -> None:
    for outcome in (Outcome.TIMEOUT, Outcome.SUCCESS, Outcome.TIMEOUT, Outcome.SUCCESS, Outcome.TIMEOUT):
        breaker.record(outcome, QUICK, breaker.generation)
    assert state(breaker) is State.CLOSED
    breaker.record(Outcome.SUCCESS, QUICK, breaker.generation)
    assert state(breaker) is State.OPEN


def test_slow_successes_in_a_row_open_it(breaker: Breaker) -> None:
    for _ in range(3):
        assert state(breaker) is State.CLOSED
        breaker.record(Outcome.SUCCESS, SLOW, breaker.generation)
    assert state(breaker) is State.OPEN


def test_one_bad_call_makes_it_suspicious_until_a_sound_one(breaker: Breaker) -> None:
    breaker.record(Outcome.SUCCESS, SLOW, breaker.generation)
    assert suspicious(breaker)
    breaker.record(Outcome.SUCCESS, QUICK, breaker.generation)
    assert not suspicious(breaker)
    fail(breaker, 3)
    assert state(breaker) is State.OPEN
    assert not suspicious(breaker), "an open one is past suspicion"


def test_a_rate_of_slow_successes_opens_it_though_quick_ones_come_between(clock: Clock) -> None:
    patient = SETTINGS.model_copy(update={"consecutive_failures": 100})
    breaker = Breaker("primary", patient, clock, lambda: 0.5, lambda _previous, _state: None)
    for seconds in (SLOW, QUICK, SLOW, SLOW, SLOW):
        breaker.record(Outcome.SUCCESS, seconds, breaker.generation)
    assert state(breaker) is State.CLOSED, "too few calls to tell"
    breaker.record(Outcome.SUCCESS, SLOW, breaker.generation)
    assert state(breaker) is State.OPEN


def test_calls_older_than_the_window_are_forgotten(breaker: Breaker, clock: Clock) -> None:
    for outcome in (Outcome.TIMEOUT, Outcome.SUCCESS, Outcome.TIMEOUT, Outcome.SUCCESS, Outcome.TIMEOUT):
        breaker.record(outcome, QUICK, breaker.generation)
    clock.now += SETTINGS.window_seconds
    breaker.record(Outcome.SUCCESS, QUICK, breaker.generation)
    assert state(breaker) is State.CLOSED


def test_closing_forgets_what_opened_it(breaker: Breaker, clock: Clock) -> None:
    for _ in range(5):
        breaker.record(Outcome.SUCCESS, SLOW, breaker.generation)
    generation = half_open(breaker, clock)
    assert breaker.try_probe() == generation
    breaker.record_probe(Outcome.SUCCESS, QUICK, generation)
    breaker.record_probe(Outcome.SUCCESS, QUICK, generation)
    breaker.record(Outcome.SUCCESS, SLOW, breaker.generation)
    assert state(breaker) is State.CLOSED


def test_half_open_permits_a_bounded_number_of_probes_and_no_order(breaker: Breaker, clock: Clock) -> None:
    half_open(breaker, clock)
    granted = [breaker.try_probe() for _ in range(200)]
    assert len([generation for generation in granted if generation is not None]) == SETTINGS.half_open_probes - 1
    assert not passes(breaker)


def test_a_slow_probe_opens_it_again(breaker: Breaker, clock: Clock) -> None:
    breaker.record_probe(Outcome.SUCCESS, SLOW, half_open(breaker, clock))
    assert state(breaker) is State.OPEN


def test_a_probe_that_says_nothing_leaves_room_for_another(breaker: Breaker, clock: Clock) -> None:
    generation = half_open(breaker, clock)
    breaker.record_probe(Outcome.OVERLOAD, QUICK, generation)
    assert state(breaker) is State.HALF_OPEN
    assert [breaker.try_probe() for _ in range(3)] == [generation, generation, None]


def test_a_late_result_of_an_older_generation_changes_nothing(breaker: Breaker, clock: Clock) -> None:
    closed = breaker.generation
    generation = half_open(breaker, clock)
    second = breaker.try_probe()
    breaker.record_probe(Outcome.SUCCESS, QUICK, generation)
    breaker.record_probe(Outcome.SUCCESS, QUICK, generation)
    assert second == generation
    assert state(breaker) is State.CLOSED
    for late in (closed, generation):
        for _ in range(10):
            breaker.record(Outcome.TRANSPORT, QUICK, late)
        breaker.record_probe(Outcome.TRANSPORT, QUICK, late)
    assert state(breaker) is State.CLOSED


def test_the_open_time_doubles_up_to_its_cap_and_starts_over_after_a_calm_window(
    breaker: Breaker, clock: Clock
) -> None:
    def open_seconds() -> float:
        return breaker.seconds_to_half_open / 0.9  # the jitter of this breaker

    def reopen() -> float:
        clock.now += breaker.seconds_to_half_open
        generation = breaker.try_probe()
        assert generation is not None
        breaker.record_probe(Outcome.TIMEOUT, QUICK, generation)
        return open_seconds()

    def close() -> None:
        clock.now += breaker.seconds_to_half_open
        for _ in range(SETTINGS.half_open_probes):
            generation = breaker.try_probe()
            assert generation is not None
            breaker.record_probe(Outcome.SUCCESS, QUICK, generation)

    fail(breaker, 3)
    assert [open_seconds(), *(reopen() for _ in range(4))] == pytest.approx([0.5, 1.0, 2.0, 3.0, 3.0])
    close()
    clock.now += SETTINGS.window_seconds - 1
    fail(breaker, 3)
    assert open_seconds() == pytest.approx(3.0), "it was not closed for long: still in a row"
    close()
    clock.now += SETTINGS.window_seconds + 1
    fail(breaker, 3)
    assert open_seconds() == pytest.approx(0.5)


def test_a_forced_mode_ends_by_itself_and_leaves_the_state_the_outcomes_led_to(breaker: Breaker, clock: Clock) -> None:
    breaker.force(Mode.FORCED_CLOSED, expires_in_seconds=5)
    fail(breaker, 3)
    assert passes(breaker)
    assert state(breaker) is State.OPEN
    clock.now += 5
    assert not passes(breaker)
    assert breaker.mode is Mode.AUTOMATIC


def test_forced_open_holds_without_an_expiry(breaker: Breaker, clock: Clock) -> None:
    breaker.force(Mode.FORCED_OPEN)
    clock.now += 1e9
    assert not passes(breaker)
    assert state(breaker) is State.CLOSED


def test_metrics_only_counts_transitions_and_lets_everything_pass(clock: Clock) -> None:
    transitions = []
    breaker = Breaker("primary", SETTINGS, clock, lambda: 0.5, lambda *change: transitions.append(change))
    breaker.force(Mode.METRICS_ONLY)
    fail(breaker, 3)
    assert passes(breaker)
    assert transitions == [(State.CLOSED, State.OPEN)]
