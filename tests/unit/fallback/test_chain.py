from __future__ import annotations

from cases import new_case

from fallback.chain import Chain
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


RULES_TRADE = Answer(pb.ACTION_TRADE, pb.SOURCE_RULES, pb.REASON_CODE_RULES_PASSED)


async def test_the_first_stage_that_answers_is_the_last_one_asked() -> None:
    asked: list[str] = []
    chain = Chain([Scripted("a", asked, None), Scripted("b", asked, RULES_TRADE), Scripted("c", asked, RULES_TRADE)])
    case = new_case()
    assert await chain.decide(case) is RULES_TRADE
    assert asked == ["a", "b"]
    assert case.degradations == [pb.DEGRADATION_NO_CACHED_SCORE]


async def test_when_no_stage_answers_the_chain_abstains() -> None:
    asked: list[str] = []
    answer = await Chain([Scripted("a", asked, None), Scripted("b", asked, None)]).decide(new_case())
    assert (answer.action, answer.source, answer.reason) == (
        pb.ACTION_ABSTAIN,
        pb.SOURCE_NONE,
        pb.REASON_CODE_NO_SOURCE,
    )
    assert asked == ["a", "b"]


async def test_a_chain_without_stages_abstains() -> None:
    assert (await Chain([]).decide(new_case())).action == pb.ACTION_ABSTAIN
