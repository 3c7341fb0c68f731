from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from structlog.testing import capture_logs
from support.cases import Clock, new_case

from fallback.chain import Chain, Stage, StageName
from fallback.order import Answer, Case
from pretrade.decision.v1 import decision_pb2 as pb


class Scripted:
    """A stage that answers as told, or notes a degradation."""

    def __init__(self, name: str, asked: list[str], answer: Answer | None) -> None:
        self.name = name
        self.asked = asked
        self.given = answer

    async def answer(self, case: Case) -> Answer | None:
        self.asked.append(self.name)
        if self.given is None:
            case.degradations.append(pb.DEGRADATION_NO_CACHED_SCORE)
        return self.given


class Buggy:
    """A stage that raises whatever it is asked."""

    async def answer(self, case: Case) -> Answer | None:
        raise ZeroDivisionError("a bug")


def chain_of(*stages: Stage, clock: Clock | None = None) -> Chain:
    names: tuple[StageName, ...] = ("model", "cached_score", "rules")
    known = dict(zip(names, stages, strict=False))
    return Chain(known, tuple(known), clock or Clock())


RULES_TRADE = Answer(pb.ACTION_TRADE, pb.SOURCE_RULES, pb.REASON_CODE_RULES_PASSED)


async def test_the_first_stage_that_answers_is_the_last_one_asked() -> None:
    asked: list[str] = []
    chain = chain_of(Scripted("a", asked, None), Scripted("b", asked, RULES_TRADE), Scripted("c", asked, RULES_TRADE))
    case = new_case()
    assert await chain.decide(case) is RULES_TRADE
    assert asked == ["a", "b"]
    assert case.degradations == [pb.DEGRADATION_NO_CACHED_SCORE]


async def test_when_no_stage_answers_the_chain_abstains() -> None:
    asked: list[str] = []
    answer = await chain_of(Scripted("a", asked, None), Scripted("b", asked, None)).decide(new_case())
    assert (answer.action, answer.source, answer.reason) == (
        pb.ACTION_ABSTAIN,
        pb.SOURCE_NONE,
        pb.REASON_CODE_NO_SOURCE,
    )
    assert asked == ["a", "b"]


async def test_a_chain_without_stages_abstains() -> None:
    assert (await chain_of().decide(new_case())).action == pb.ACTION_ABSTAIN


@pytest.mark.fault(
    "A16",
    "A stage of the fallback chain raises an exception",
    "The next stage answers, with STAGE_BROKEN. It is counted and logged.",
)
async def test_a_stage_with_a_bug_is_counted_and_logged_once_and_the_next_one_answers() -> None:
    clock = Clock()
    chain = chain_of(Buggy(), Scripted("b", [], RULES_TRADE), clock=clock)
    with capture_logs() as lines:
        for _ in range(100):
            case = new_case()
            assert await chain.decide(case) is RULES_TRADE
            assert case.degradations == [pb.DEGRADATION_STAGE_BROKEN]
        clock.now += 6
        await chain.decide(new_case())
    assert chain.broken == {"model": 101}
    assert [(line["stage"], line["times"]) for line in lines] == [("model", 1), ("model", 101)]


class Joint(Scripted):
    """A stage that begins with many cases at once, and meets a bug when it does."""

    def begin(self, cases: Sequence[Case]) -> Sequence[Case]:
        raise ZeroDivisionError("a bug")

    def settle(self, case: Case) -> Answer | None:
        raise AssertionError("nothing was begun")

    async def go_on(self, case: Case) -> Answer | None:
        raise AssertionError("nothing was begun")


async def test_what_a_stage_cannot_begin_with_together_is_asked_one_by_one() -> None:
    chain = chain_of(Joint("a", [], RULES_TRADE))
    case = new_case()
    with capture_logs() as lines:
        begun, _ = chain.begin([case])
    assert begun == ()
    assert (dict(chain.broken), len(lines)) == ({"model": 1}, 1)
    assert await chain.decide(case) is RULES_TRADE
    assert case.degradations == []


async def test_a_chain_of_bugs_abstains() -> None:
    answer = await chain_of(Buggy(), Buggy(), Buggy()).decide(new_case())
    assert answer.source == pb.SOURCE_NONE


async def test_a_cancelled_caller_is_no_bug() -> None:
    class Waiting:
        async def answer(self, case: Case) -> Answer | None:
            await asyncio.sleep(3_600)
            return None

    chain = chain_of(Waiting(), Scripted("b", [], RULES_TRADE))
    task = asyncio.create_task(chain.decide(new_case()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not chain.broken


async def test_on_call_may_choose_the_stages_and_their_order_and_the_case_says_so() -> None:
    asked: list[str] = []
    chain = chain_of(Scripted("a", asked, None), Scripted("b", asked, None), Scripted("c", asked, None))
    chain.ask_in_order(("rules", "model"))
    case = new_case()
    assert (await chain.decide(case)).source == pb.SOURCE_NONE
    assert (asked, case.stages) == (["c", "a"], ("rules", "model"))
    chain.ask_in_order(("model", "cached_score", "rules"))
    usual = new_case()
    await chain.decide(usual)
    assert (asked[2:], usual.stages) == (["a", "b", "c"], ())
