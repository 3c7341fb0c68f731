"""The model map as operators see and set it."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.control_files import that_trades

from pretrade.admin.v1 import admin_pb2 as pb
from server.control.state import ControlSettings, ControlState
from server.control.subjects import MODEL_MAP, model_map_subjects
from server.errors import InvalidChangeError, UnknownSubjectError
from server.inference.model_map import MapRule, ModelMap, write_rules
from server.inference.model_names import DEFAULT
from server.journal.journal import Journal, JournalSettings
from server.rpc.models import ModelSteering

INSTRUMENTS = ("BTCUSDT.SIM", "ETHUSDT.SIM")


class Steered:
    """A map that is steered, on a server with a default model and a scalper."""

    def __init__(self, control: ControlState) -> None:
        self.control = control
        self.map = ModelMap()
        control.steer(model_map_subjects(self.map))
        models: Any = {
            name: SimpleNamespace(canaries=SimpleNamespace(champion_version=version))
            for name, version in ((DEFAULT, "aa" * 8), ("scalper", "bb" * 8), ("new", ""))
        }
        self.steering = ModelSteering(control, self.map, models, INSTRUMENTS)

    async def set(self, *rules: tuple[str, str, str], **changes: Any) -> pb.Change:
        listed = [pb.ModelMapRule(instrument=one, strategy=two, model=name) for one, two, name in rules]
        request = pb.SetModelMapRequest(rules=listed, reason="the desk's own", **changes)
        return (await self.steering.set(request, "ann")).change


@asynccontextmanager
async def steered(path: Path) -> AsyncIterator[Steered]:
    ids = (f"change-{number}" for number in itertools.count())
    async with Journal(JournalSettings(path=path / "journal.db")) as journal:
        control = ControlState(
            ControlSettings(),
            that_trades(path / "control.json"),
            {},
            journal,
            "one",
            lambda: next(ids),
            time.time_ns,
            time.monotonic,
        )
        yield Steered(control)


async def test_a_map_is_set_as_a_whole_versioned_and_reverts_to_the_default_model(tmp_path: Path) -> None:
    async with steered(tmp_path) as s:
        before = s.control.version
        made = await s.set(("BTC*", "", "scalper"), ("", "slow", "default"))
        assert (made.subject, made.author, made.version) == ("model_map", "ann", before + 1)
        assert made.diff == [
            "model_map: the default model for every order → BTC* * → scalper; * slow → default",
            "+ BTC* * → scalper",
            "+ * slow → default",
        ]
        assert s.map.of_order("BTCUSDT.SIM", "slow") == "scalper"
        assert [(one.instrument, one.strategy, one.model) for one in s.steering.rules()] == [
            ("BTC*", "*", "scalper"),
            ("*", "slow", "default"),
        ]
        assert (await s.set(("*", "slow", "default"))).diff[1:] == ["- BTC* * → scalper"]
        await s.set()
        assert s.map.rules == ()


async def test_a_dry_run_says_what_would_change_and_which_rule_fits_nothing(tmp_path: Path) -> None:
    async with steered(tmp_path) as s:
        would = await s.set(("XRP*", "", "scalper"), dry_run=True)
        assert would.dry_run
        assert would.diff[1:] == ["+ XRP* * → scalper", "XRP* * → scalper: fits no instrument of this server"]
        assert s.map.rules == ()


async def test_a_map_says_which_rules_get_no_order_and_which_models_cannot_decide_yet(tmp_path: Path) -> None:
    async with steered(tmp_path) as s:
        given = (
            ("BTC*", "a", "scalper"),
            ("BTC*", "a", "new"),
            ("", "b", "new"),
            ("", "", "default"),
            ("", "c", "scalper"),
        )
        would = await s.set(*given, dry_run=True)
        assert would.diff[1 + len(given) :] == [
            "BTC* a → new: gets no order, as BTC* a → scalper comes first",
            "* b → new: new has no champion yet, so that its orders go down the chain",
            "* c → scalper: gets no order, as * * → default comes first",
        ]


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (
            ("", "", "gone"),
            "rules.0.model: this server has no model 'gone'; it has default, scalper, new",
        ),
        (("", "", "Scalper"), "rules.0.model: this server has no model 'Scalper'; it has default, scalper, new"),
        (("B" * 65, "", "scalper"), "rules.0.instrument: must be a pattern of 1 to 64 characters"),
    ],
)
async def test_a_map_that_breaks_a_rule_is_refused_with_a_sentence(
    tmp_path: Path, rule: tuple[str, str, str], sentence: str
) -> None:
    async with steered(tmp_path) as s:
        with pytest.raises(InvalidChangeError) as refused:
            await s.set(rule)
        assert sentence in str(refused.value)


async def test_a_map_of_another_server_may_name_models_that_are_not_here(tmp_path: Path) -> None:
    async with steered(tmp_path) as s:
        subject = model_map_subjects(s.map)[MODEL_MAP]
        value = write_rules([MapRule(strategy="far", model="elsewhere")])
        assert not subject.check(value)
        subject.apply(value, None)
        assert s.map.of_order("BTCUSDT.SIM", "far") == "elsewhere"
        assert subject.check("[7]")


async def test_a_request_about_a_model_that_is_not_here_is_refused_by_its_name(tmp_path: Path) -> None:
    async with steered(tmp_path) as s:
        with pytest.raises(UnknownSubjectError, match="model: this server has no model 'gone'"):
            s.steering.of(pb.GetCanaryRequest(model="gone"))
