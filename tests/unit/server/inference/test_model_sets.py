"""Which set a model takes is learnt from answers, archives and refusals."""

from __future__ import annotations

import pytest
from support.guest_sets import MIXED, REGISTERED, know

from feature_cache.feature_set import SetRow
from feature_cache.features import MF1
from server.inference import model_sets

OURS, THEIRS = bytes(MF1.row_bytes), SetRow.of(MIXED, bytes(MIXED.row_bytes))


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    know(monkeypatch, REGISTERED)
    monkeypatch.setattr(model_sets, "_known", {})


def test_a_model_of_which_nothing_is_known_takes_mf1() -> None:
    assert model_sets.of("aa" * 8) is MF1


def test_what_an_answer_says_is_kept_for_the_version() -> None:
    model_sets.learn("aa" * 8, MIXED)
    assert (model_sets.of("aa" * 8), model_sets.of("bb" * 8)) == (MIXED, MF1)


def test_a_refusal_names_the_set_that_is_wanted() -> None:
    refused = "`feature_set` is b'{:08x}', this model's is {:08x}"
    model_sets.learn_from_refusal("aa" * 8, refused.format(MF1.fingerprint, MIXED.fingerprint))
    assert model_sets.of("aa" * 8) is MIXED
    model_sets.learn_from_refusal("aa" * 8, refused.format(MIXED.fingerprint, MF1.fingerprint))
    assert model_sets.of("aa" * 8) is MF1


@pytest.mark.parametrize("message", ["", "queue is full", "this model's is 00000007", "this model's is nonsense"])
def test_any_other_message_teaches_nothing(message: str) -> None:
    model_sets.learn_from_refusal("aa" * 8, message)
    assert model_sets.of("aa" * 8) is MF1


def test_the_oldest_of_many_versions_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_sets, "_MOST_KNOWN", 2)
    for version in "abc":
        model_sets.learn(version, MIXED)
    assert [model_sets.of(version) for version in "abc"] == [MF1, MIXED, MIXED]


def test_rows_say_which_set_they_are_of_and_never_share_a_batch_with_another() -> None:
    assert model_sets.set_of([OURS, OURS]) is MF1
    assert model_sets.set_of([THEIRS, THEIRS]) is MIXED
    assert model_sets.set_of([OURS, THEIRS]) is None
    assert model_sets.set_of([THEIRS, OURS]) is None
    assert model_sets.row_of(MIXED, bytes(12)) == THEIRS
    assert type(model_sets.row_of(MF1, OURS)) is bytes
