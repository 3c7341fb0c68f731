"""The embedded stage answers as the champion would, and says why where it does not."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.cases import Clock, new_case
from support.columns import Columns

from fallback.block import Block, View
from fallback.chain import Taken
from fallback.embedded import Embedded
from fallback.joint_case import JointCase
from fallback.order import CHAMPION_SOURCES, MODEL_SOURCES, Answer, Case, Order, Part
from feature_cache import features
from feature_cache.feature_set import FeatureSet
from pretrade.decision.v1 import decision_pb2 as pb


@dataclass
class Model:
    """Scores what the test says."""

    scripted: float | None = 0.75
    name: str = "champion"
    version: str = "aa" * 8
    threshold: float = 0.5
    expires_at: int = 1_900_000_000
    feature_set: FeatureSet = features.MF1
    rows: list[bytes] = field(default_factory=list)
    parts: tuple[Part, ...] = ()

    def scores_and_parts(self, rows: bytes) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        if self.scripted is None:
            raise ValueError("no score")
        self.rows.append(rows)
        return np.full(len(rows) // features.MF1.row_bytes, self.scripted, dtype=np.float32), None


class ByRow(Model):
    """The score of a row is its first feature."""

    def scores_and_parts(self, rows: bytes) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        scores = np.frombuffer(rows, dtype=features.ROW).reshape(-1, features.N_FEATURES)[:, 0].astype(np.float32)
        return scores, np.stack([scores / 2, scores / 4], axis=1) if self.parts else None


@dataclass
class Held:
    scorer: Model | None
    lack: pb.Degradation.ValueType = pb.DEGRADATION_UNSPECIFIED


def stage(model: Model | None, lack: pb.Degradation.ValueType = pb.DEGRADATION_UNSPECIFIED) -> Embedded:
    return Embedded(Held(model, lack), Clock())


@pytest.mark.parametrize(
    ("score", "action", "reason"),
    [
        (0.75, pb.ACTION_TRADE, pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD),
        (0.5, pb.ACTION_TRADE, pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD),
        (0.25, pb.ACTION_NO_TRADE, pb.REASON_CODE_SCORE_BELOW_THRESHOLD),
    ],
)
async def test_the_score_is_held_against_the_models_own_threshold(
    score: float, action: pb.Action.ValueType, reason: pb.ReasonCode.ValueType
) -> None:
    case, model = new_case(), Model(score)
    answer = await stage(model).answer(case)
    assert answer == Answer(action, pb.SOURCE_EMBEDDED, reason, score, 0.5, "champion", "aa" * 8, 1_900_000_000)
    assert model.rows == [case.row()]


def test_its_answer_counts_as_the_champions() -> None:
    assert pb.SOURCE_EMBEDDED in CHAMPION_SOURCES
    assert pb.SOURCE_EMBEDDED in MODEL_SOURCES


async def test_an_answer_is_in_the_ledger_and_among_the_attempts() -> None:
    case = new_case()
    embedded = stage(Model())
    await embedded.answer(case)
    assert [use[0] for use in case.budget.uses] == [pb.STAGE_EMBEDDED]
    (attempt,) = case.attempts
    assert (attempt.replica, attempt.outcome, attempt.model_version) == ("embedded", "success", "aa" * 8)
    assert (attempt.batch_rows, attempt.batch_index) == (1, 0)
    assert (case.degradations, embedded.scored, embedded.failed) == ([], 1, 0)


async def passed_over(embedded: Embedded, case: Case, degradation: pb.Degradation.ValueType) -> bool:
    answer = await embedded.answer(case)
    (use,) = case.budget.uses
    return answer is None and case.degradations == [degradation] and use == (pb.STAGE_EMBEDDED, 0.0, 0.0, degradation)


@pytest.mark.parametrize("lack", [pb.DEGRADATION_EMBEDDED_NO_MODEL, pb.DEGRADATION_EMBEDDED_OTHER_VERSION])
async def test_without_the_champions_version_it_is_passed_over(lack: pb.Degradation.ValueType) -> None:
    assert await passed_over(stage(None, lack), new_case(), lack)


async def test_a_server_that_is_to_have_no_model_says_nothing_of_it() -> None:
    case = new_case()
    assert await stage(None).answer(case) is None
    assert (case.degradations, case.budget.uses) == ([], [])


async def test_switched_off_it_is_passed_over() -> None:
    model = Model()
    embedded = Embedded(Held(model), Clock(), enabled=lambda: False)
    assert await passed_over(embedded, new_case(), pb.DEGRADATION_EMBEDDED_OFF)
    assert model.rows == []


async def test_without_features_nothing_is_scored() -> None:
    case, model = new_case(problem=pb.REASON_CODE_FEATURES_STALE), Model()
    assert await stage(model).answer(case) is None
    assert (model.rows, case.degradations, case.budget.uses) == ([], [], [])


async def test_a_model_that_gives_no_score_is_passed_over_and_counted() -> None:
    case, embedded = new_case(), stage(Model(None))
    assert await embedded.answer(case) is None
    assert case.degradations == [pb.DEGRADATION_EMBEDDED_FAILED]
    assert (case.attempts, embedded.scored, embedded.failed) == ([], 0, 1)


async def test_rows_that_come_alone_in_one_turn_are_scored_in_one_call() -> None:
    model = Model()
    embedded = stage(model)
    cases = [new_case() for _ in range(300)]
    answered = await asyncio.gather(*(embedded.answer(case) for case in cases))
    assert all(answer is not None and answer.score == 0.75 for answer in answered)
    assert [len(rows) // features.MF1.row_bytes for rows in model.rows] == [256, 44]
    places = [(case.attempts[0].batch_rows, case.attempts[0].batch_index) for case in cases]
    assert places == [*((256, place) for place in range(256)), *((44, place) for place in range(44))]


class Picky(ByRow):
    """Scores no call with a row that begins with NaN; the test's own error for one with an infinite row."""

    def scores_and_parts(self, rows: bytes) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        scores, parts = super().scores_and_parts(rows)
        if np.isinf(scores).any():
            raise RuntimeError("a bug")
        if np.isnan(scores).any():
            raise ValueError("no score")
        return scores, parts


async def test_a_row_that_has_no_score_takes_it_from_none_that_came_with_it() -> None:
    embedded = stage(Picky())
    cases = [new_case(values=row_with(first)) for first in (0.25, math.nan, math.inf, 0.75)]
    low, none, broken, high = await asyncio.gather(*(embedded.answer(case) for case in cases), return_exceptions=True)
    assert isinstance(low, Answer)
    assert isinstance(high, Answer)
    assert (low.score, high.score) == (0.25, 0.75)
    assert none is None
    assert cases[1].degradations == [pb.DEGRADATION_EMBEDDED_FAILED]
    assert isinstance(broken, RuntimeError)


async def test_a_caller_who_leaves_meanwhile_has_nothing_scored() -> None:
    model = Model()
    embedded = stage(model)
    leaver, other = (asyncio.ensure_future(embedded.answer(new_case())) for _ in range(2))
    await asyncio.sleep(0)
    leaver.cancel()
    assert await other is not None
    assert [len(rows) for rows in model.rows] == [features.MF1.row_bytes]


class OnTrial:
    """A model that answers the orders of one strategy, one by one.

    Blocks of such orders are the business of `server/canary/routing.py`: see `tests/support/both_ways.py`.
    """

    def __init__(self, strategy: str, says: Answer | None = None) -> None:
        self._strategy = strategy
        self._says = says

        self.takes_all = False

    def is_busy(self, orders: int) -> bool:
        return True

    def wants(self, case: Case) -> bool:
        return case.order.strategy == self._strategy

    async def answer_on_trial(self, case: Case) -> Answer | None:
        return self._says if self.wants(case) else None

    def parted(self, chosen: str, orders: Sequence[Order], places: Sequence[int]) -> Iterable[Sequence[int]]:
        raise AssertionError

    def begin_on_trial(self, block: Block) -> Taken | None:
        raise AssertionError

    def was_asked(self, replica: str) -> bool:
        return False

    def settle_block(self, block: Block) -> bool:
        raise AssertionError

    def count_block(self, block: Block) -> None:
        raise AssertionError

    def settle(self, case: JointCase) -> Answer | None:
        raise AssertionError


async def test_a_model_on_trial_is_asked_for_its_orders_first() -> None:
    canary = Answer(pb.ACTION_TRADE, pb.SOURCE_CANARY, pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD, 0.9)
    model = Model()
    assert await Embedded(Held(model), Clock(), trial=OnTrial("alpha", canary)).answer(new_case()) is canary
    assert model.rows == []
    answer = await Embedded(Held(model), Clock(), trial=OnTrial("others", canary)).answer(new_case())
    assert answer is not None
    assert answer.source == pb.SOURCE_EMBEDDED


async def test_a_stage_that_is_switched_off_asks_no_model_on_trial_through_it() -> None:
    case = new_case()
    assert case.features is not None
    snapshot = new_case(sequence=1).snapshot
    assert snapshot is not None
    columns = Columns([case.order], [View(snapshot, 0.0, 100.0, case.features, case.row())], case.budget)
    off = Embedded(Held(Model()), Clock(), enabled=lambda: False, trial=OnTrial("alpha"))
    assert off.begin_block(columns) is Taken.PASSED_OVER
    assert columns.degradations == [pb.DEGRADATION_EMBEDDED_OFF]


@pytest.mark.parametrize("takes_all", [True, False])
async def test_it_answers_at_once_unless_a_model_on_trial_gets_all_orders(takes_all: bool) -> None:
    trial = OnTrial("alpha")
    trial.takes_all = takes_all
    embedded = Embedded(Held(Model()), Clock(), trial=trial)
    assert (embedded.answers_at_once, embedded.is_busy(1)) == (not takes_all, takes_all)
    assert Embedded(Held(Model()), Clock()).answers_at_once


def joint(value: float | None, told: list[JointCase]) -> JointCase:
    """A case with this first feature; None: without features."""
    alone = new_case() if value is None else new_case(values=row_with(value))
    case = JointCase(alone.order, alone.budget, asyncio.get_running_loop().create_future(), told.append)
    if value is not None:
        case.features = alone.features
    return case


def row_with(value: float) -> NDArray[np.float32]:
    values = np.zeros(features.N_FEATURES, dtype=np.float32)
    values[0] = value
    return values


def said(case: Case, answer: Answer | None) -> tuple[object, ...]:
    """What the stage made of a case, but for times and its place among others."""
    attempts = [(one.replica, one.outcome, one.model_version) for one in case.attempts]
    return answer, case.degradations, [(use[0], use[3]) for use in case.budget.uses], attempts


PARTS = (Part("bb" * 8, 0.25), Part("cc" * 8, 0.75))


async def test_what_each_part_of_an_ensemble_says_is_in_the_answer() -> None:
    answer = await stage(ByRow(parts=PARTS)).answer(new_case(values=row_with(0.5)))
    assert answer is not None
    assert (answer.score, answer.parts, answer.part_scores) == (0.5, PARTS, (0.25, 0.125))


@given(
    st.lists(st.none() | st.sampled_from((0.25, 0.5, 0.75, 0.0, 1.0, -0.1, 1.5, float("nan"))), max_size=9),
    st.sampled_from(((), PARTS)),
)
async def test_rows_that_are_scored_together_get_what_each_gets_alone(
    values: list[float | None], parts: tuple[Part, ...]
) -> None:
    together, alone = stage(ByRow(parts=parts)), stage(ByRow(parts=parts))
    told: list[JointCase] = []
    cases = [joint(value, told) for value in values]
    begun = together.begin(cases)
    assert list(begun) == told == [case for case in cases if case.features is not None]
    for case, value in zip(cases, values, strict=True):
        other = joint(value, [])
        answer = together.settle(case) if case in begun else await together.answer(case)
        if case in begun and answer is None:
            assert await together.go_on(case) is None
        assert said(case, answer) == said(other, await alone.answer(other))
    assert (together.scored, together.failed) == (alone.scored, alone.failed)
    assert [one.attempts[0].batch_rows for one in begun if one.attempts] == [len(begun)] * sum(
        bool(one.attempts) for one in begun
    )


async def test_many_rows_are_one_call_of_the_model() -> None:
    model, told = Model(), list[JointCase]()
    cases = [joint(0.75, told) for _ in range(300)]
    begun = stage(model).begin(cases)
    assert (len(begun), len(model.rows)) == (256, 1), "the others are asked alone"


@pytest.mark.parametrize("why", ["no model", "switched off", "it is a canary's", "the call fails"])
async def test_where_there_is_more_to_do_than_one_call_each_is_asked_alone(why: str) -> None:
    held = Held(None if why == "no model" else Model(None if why == "the call fails" else 0.75))
    told: list[JointCase] = []
    case = joint(0.75, told)
    trial = OnTrial(case.order.strategy if why == "it is a canary's" else "another")
    embedded = Embedded(held, Clock(), enabled=lambda: why != "switched off", trial=trial)
    assert (embedded.begin([case]), told, case.budget.uses) == ((), [], [])
