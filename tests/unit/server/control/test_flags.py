"""Flags through the OpenFeature SDK: from the control state, or from a provider of somebody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
from openfeature.event import ProviderEventDetails
from openfeature.provider.in_memory_provider import InMemoryFlag, InMemoryProvider
from support.waiting import until

from server.control.flags import ControlProvider, FlagProviderError, Flags, provider_from

DEFAULTS = {"shadow": True, "cached_score": True}


class Followed:
    """Flags, and what they told of their changes."""

    def __init__(self, provider: InMemoryProvider | ControlProvider) -> None:
        self.told: list[Mapping[str, bool]] = []
        self.flags = Flags(DEFAULTS, provider, self.told.append)


def flag(is_on: bool) -> InMemoryFlag[bool]:
    return InMemoryFlag("on" if is_on else "off", {"on": True, "off": False})


def in_memory(**values: bool) -> InMemoryProvider:
    return InMemoryProvider({name: flag(value) for name, value in values.items()})


class Unwell(InMemoryProvider):
    """A provider that starts only at the second attempt."""

    attempts = 0

    def initialize(self, evaluation_context: object) -> None:
        self.attempts += 1
        if self.attempts == 1:
            raise ConnectionError("not there yet")


@asynccontextmanager
async def following(flags: Flags) -> AsyncIterator[None]:
    task = asyncio.create_task(flags.run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_ours_answers_from_the_control_state_when_it_is_told_of_a_change() -> None:
    values = dict(DEFAULTS)
    followed = Followed(ControlProvider(values.get))
    values["shadow"] = False
    assert followed.flags.values["shadow"], "nothing is asked while deciding"
    followed.flags.evaluate()
    assert followed.told == [{"shadow": False, "cached_score": True}]
    assert (followed.flags.is_ours, followed.flags.provider_name, followed.flags.problem) == (True, "control", "")
    client = followed.flags._client
    assert client.get_boolean_value("shadow", True) is False
    assert client.get_boolean_details("unknown", True).error_code is not None
    assert client.get_string_details("shadow", "x").error_code is not None


def test_two_states_in_a_process_do_not_hear_each_other() -> None:
    first, second = Followed(ControlProvider({"shadow": False}.get)), Followed(ControlProvider({"shadow": True}.get))
    for followed in (first, second):
        followed.flags.evaluate()
    assert (first.flags.values["shadow"], second.flags.values["shadow"]) == (False, True)


async def test_another_provider_is_followed_and_what_it_does_not_know_stays() -> None:
    provider = in_memory(shadow=False)
    followed = Followed(provider)
    async with following(followed.flags):
        await until(lambda: followed.told)
        assert followed.told == [{"shadow": False, "cached_score": True}]
        assert "cached_score" in followed.flags.problem
        provider._flags = {"shadow": flag(True), "cached_score": flag(False)}
        provider.emit_provider_configuration_changed(ProviderEventDetails())
        await until(lambda: followed.flags.values == {"shadow": True, "cached_score": False})
        assert followed.flags.problem == ""
    assert not followed.flags.is_ours


async def test_a_provider_that_says_nothing_of_its_changes_is_asked_again() -> None:
    provider = in_memory(shadow=True, cached_score=True)
    followed = Followed(provider)
    async with following(followed.flags):
        provider._flags = {"shadow": flag(False), "cached_score": flag(True)}
        await until(lambda: not followed.flags.values["shadow"])


async def test_a_provider_that_does_not_start_is_tried_again_and_flags_stay() -> None:
    followed = Followed(Unwell({"shadow": flag(False), "cached_score": flag(True)}))
    async with following(followed.flags):
        await until(lambda: followed.flags.problem)
        assert followed.flags.values == DEFAULTS
        await until(lambda: not followed.flags.values["shadow"])


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("no.such.module:Provider", {}),
        ("openfeature.provider.in_memory_provider:Nothing", {}),
        ("openfeature.provider.in_memory_provider:InMemoryProvider", {"colour": "red"}),
        ("builtins:dict", {}),
    ],
)
def test_a_provider_that_cannot_be_made_is_refused_by_name(path: str, options: dict[str, object]) -> None:
    with pytest.raises(FlagProviderError, match=r"control\.flag_provider"):
        provider_from(path, options)


def test_a_provider_is_made_with_its_options() -> None:
    made = provider_from("openfeature.provider.in_memory_provider:InMemoryProvider", {"flags": {}})
    assert isinstance(made, InMemoryProvider)
