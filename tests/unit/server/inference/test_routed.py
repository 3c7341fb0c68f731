"""Orders that come together, each to its own model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
from support.cases import Clock, new_case

from fallback.cached_score import CachedScores, CachedScoreSettings
from fallback.chain import Chain
from fallback.order import Answer, Case
from pretrade.decision.v1 import decision_pb2 as pb
from server.canary.burn import Objective, RoutedObjective, SloSettings
from server.inference.model_map import MapRule, ModelMap
from server.inference.model_names import DEFAULT
from server.inference.routed import RoutedCheck, RoutedScores, RoutedShadow, RoutedStage


class Stage:
    """A model's stage that says which orders it was asked for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.begun: list[list[str]] = []
        self.broken = False
        self.answers_at_once = True

    def _answer(self, case: Case) -> Answer:
        assert case.model == self.name
        return Answer(pb.ACTION_TRADE, pb.SOURCE_PRIMARY, pb.REASON_CODE_RULES_PASSED, 0.9, 0.5, self.name)

    async def answer(self, case: Case) -> Answer | None:
        if self.broken:
            raise RuntimeError("a bug")
        return self._answer(case)

    def begin(self, cases: Sequence[Any]) -> Sequence[Any]:
        if self.broken:
            raise RuntimeError("a bug")
        self.begun.append([case.order.strategy for case in cases])
        return cases[:-1]

    def parted(self, chosen: str, orders: Sequence[Any], places: Sequence[int]) -> list[list[int]]:
        assert chosen == self.name
        return [[place] for place in places]

    def settle(self, case: Any) -> Answer | None:
        return self._answer(case) if case.order.strategy != "again" else None

    async def go_on(self, case: Any) -> Answer | None:
        return self._answer(case)


class Two:
    """A default model and a scalper for strategies that begin with s."""

    def __init__(self) -> None:
        self.map = ModelMap()
        self.map.set((MapRule(strategy="s*", model="scalper"), MapRule(strategy="gone", model="elsewhere")))
        self.stages = {name: Stage(name) for name in (DEFAULT, "scalper")}
        self.stage = RoutedStage(cast(Any, self.stages), self.map, pb.STAGE_PRIMARY)


def cases_of(*strategies: str) -> list[Any]:
    return [new_case(strategy=one) for one in strategies]


async def test_orders_that_come_together_are_begun_in_one_group_for_each_model() -> None:
    two, cases = Two(), cases_of("s1", "a", "s2", "b", "s3")
    begun = two.stage.begin(cases)
    assert two.stages["scalper"].begun == [["s1", "s2", "s3"]]
    assert two.stages[DEFAULT].begun == [["a", "b"]]
    assert {case.order.strategy for case in begun} == {"s1", "s2", "a"}
    assert [cast(Answer, two.stage.settle(case)).model_name for case in begun] == ["scalper", "scalper", DEFAULT]
    again = cases_of("again")[0]
    assert two.map.of(again) == DEFAULT
    assert two.stage.settle(again) is None
    assert cast(Answer, await two.stage.go_on(again)).model_name == DEFAULT


def test_orders_in_columns_are_parted_by_their_own_model() -> None:
    two, orders = Two(), [case.order for case in cases_of("s1", "a", "s2")]
    assert list(two.stage.parted("scalper", orders, [0, 2])) == [[0], [2]]
    assert list(two.stage.parted("elsewhere", orders, [0, 2])) == [[0, 2]]


@pytest.mark.parametrize(("of_each", "says"), [((True, True), True), ((True, False), True), ((False, False), False)])
def test_orders_of_a_model_that_answers_at_once_do_not_wait_for_the_trial_of_another(
    of_each: Sequence[bool], says: bool
) -> None:
    two = Two()
    for stage, answers_at_once in zip(two.stages.values(), of_each, strict=True):
        stage.answers_at_once = answers_at_once
    assert two.stage.answers_at_once is says


async def test_a_model_that_is_not_here_costs_its_orders_the_stage_and_asks_no_other_model() -> None:
    two, (case,) = Two(), cases_of("gone")
    assert not two.stage.begin([case])
    assert await two.stage.answer(case) is None
    scores = RoutedScores({}, two.map)
    assert await scores.answer(case) is None
    assert case.degradations == [pb.DEGRADATION_MODEL_NOT_HERE]
    assert [(use[0], use[3]) for use in case.budget.uses] == [
        (pb.STAGE_PRIMARY, pb.DEGRADATION_MODEL_NOT_HERE),
        (pb.STAGE_CACHED_SCORE, pb.DEGRADATION_MODEL_NOT_HERE),
    ]


async def test_a_model_that_breaks_costs_the_other_models_orders_nothing() -> None:
    two = Two()
    two.stages["scalper"].broken = True
    chain = Chain({"model": two.stage}, ("model",), Clock())
    cases = cases_of("s1", "a", "b")
    begun, _ = chain.begin(cases)
    assert [case.order.strategy for case in begun] == ["a"]
    assert not chain.broken
    assert (await chain.decide(cases[0])).source == pb.SOURCE_NONE
    assert pb.DEGRADATION_STAGE_BROKEN in cases[0].degradations
    assert chain.broken == {"model": 1}
    with pytest.raises(RuntimeError):
        two.stage.begin(cases_of("s1", "s2"))


async def test_each_model_keeps_its_own_scores_of_an_instrument() -> None:
    two, clock = Two(), Clock()
    kept = {name: CachedScores(CachedScoreSettings(), clock) for name in (DEFAULT, "scalper")}
    scores = RoutedScores(kept, two.map)
    mine, others, later = cases_of("s1", "a", "s2")
    for case, score in ((mine, 0.9), (others, 0.1)):
        answer = Answer(pb.ACTION_TRADE, pb.SOURCE_PRIMARY, pb.REASON_CODE_RULES_PASSED, score, 0.5)
        scores.remember(case, answer, case.order.strategy)
    assert cast(Answer, await scores.answer(later)).cached_from == "s1"
    scores.configure(CachedScoreSettings(max_mid_move_bps=0.0))
    later.mid *= 1.001
    assert await scores.answer(later) is None


def test_what_follows_a_decision_goes_to_the_parts_of_its_model() -> None:
    two, seen = Two(), list[tuple[str, list[str]]]()

    class Part:
        def __init__(self, name: str) -> None:
            self.name = name

        def mirror(self, decided: Sequence[tuple[Case, Answer, str]]) -> None:
            seen.append((self.name, [one[2] for one in decided]))

        def sample(self, _case: Case, _answer: Answer, decision_id: str) -> None:
            seen.append((f"check {self.name}", [decision_id]))

    parts: Any = {name: Part(name) for name in (DEFAULT, "scalper")}
    answer = Answer(pb.ACTION_TRADE, pb.SOURCE_EMBEDDED, pb.REASON_CODE_RULES_PASSED)
    cases = cases_of("s1", "a", "s2", "gone")
    RoutedShadow(parts, two.map).mirror([(case, answer, case.order.strategy) for case in cases])
    RoutedCheck(parts, two.map).sample(cases[0], answer, "one")
    assert seen == [("scalper", ["s1", "s2"]), (DEFAULT, ["a"]), ("check scalper", ["one"])]

    objectives = {name: Objective(SloSettings(), 0.05) for name in (DEFAULT, "scalper")}
    routed = RoutedObjective(objectives, two.map.of)
    for case in cases:
        routed.note(case, by_model=True)
    assert {name: one.met for name, one in objectives.items()} == {DEFAULT: 1, "scalper": 2}
