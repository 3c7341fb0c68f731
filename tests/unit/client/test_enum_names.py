"""The names of the contract's enum values."""

from __future__ import annotations

import pytest

from pretrade.client.enum_names import enum_choices, enum_name
from pretrade.decision.v1 import decision_pb2 as pb


def test_a_name_comes_without_the_prefix_of_its_enum() -> None:
    assert enum_name(pb.Source, pb.SOURCE_CACHED_SCORE) == "CACHED_SCORE"
    assert enum_name(pb.ReasonCode, 0) == "UNSPECIFIED"


def test_a_value_that_the_enum_does_not_have_is_an_error() -> None:
    with pytest.raises(ValueError, match="12345"):
        enum_name(pb.Source, 12345)


def test_people_may_choose_every_value_but_the_unspecified_one() -> None:
    assert enum_choices(pb.Action) == {
        "trade": pb.ACTION_TRADE,
        "no_trade": pb.ACTION_NO_TRADE,
        "abstain": pb.ACTION_ABSTAIN,
    }
    assert len(enum_choices(pb.Source)) == len(pb.Source.keys()) - 1
