"""Sets are found in packages and in a file, are unique, and have a source for each of their features."""

from __future__ import annotations

import re
import textwrap
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from feature_cache import feature_sets
from feature_cache.feature_set import CALLER, Feature, FeatureSet, FeatureSetError
from feature_cache.feature_sets import FeatureSets, Registered
from feature_cache.features import MF1

SPREAD = Feature("spread_bps", "bps", "Copied.", lowest=0.0, source="mf1")
MOMENTUM = Feature("momentum", "bps", "Ours.", signed=True)
URGENCY = Feature("urgency", "", "Theirs.", source=CALLER)
MIXED = FeatureSet("mixed", (SPREAD, MOMENTUM, URGENCY))
COPIED = FeatureSet("copied", (SPREAD, URGENCY))
FILE = """
    import numpy as np
    from feature_cache.feature_set import Feature, FeatureSet
    from feature_cache.feature_sets import ComputedSet

    class Momentum:
        def on_event(self, event): ...
        def values(self): return np.zeros(1, np.float32)

    NUMBERS = FeatureSet("numbers", (Feature("momentum", "bps", "Ours.", signed=True),))
    FEATURE_SETS = [ComputedSet(NUMBERS, lambda instrument: Momentum())]
"""


class Quiet:
    def on_event(self, event: object) -> None: ...

    def values(self) -> object: ...


def made(feature_set: FeatureSet, *, computed: bool = True, origin: str = "a test") -> Registered:
    return Registered(feature_set, (lambda instrument: Quiet()) if computed else None, origin)  # type: ignore[arg-type,return-value]


def written(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "some_numbers.py", FILE)


def test_mf1_is_always_known() -> None:
    assert [one.feature_set for one in FeatureSets()] == [MF1]
    assert feature_sets.by_id("mf1") is feature_sets.by_fingerprint(MF1.fingerprint) is MF1


def test_a_set_is_found_by_id_and_by_fingerprint() -> None:
    sets = FeatureSets([made(MIXED)])
    assert sets.by_id("mixed") is sets.by_fingerprint(MIXED.fingerprint)
    assert sets.by_id("other") is sets.by_fingerprint(7) is None
    found = sets.by_id("mixed")
    assert found is not None
    assert found.own == (1,)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ((made(MIXED), made(FeatureSet("mixed", MIXED.features[:2]), origin="b")), "a test has mixed/"),
        ((made(FeatureSet("mf1", (MOMENTUM,))),), "pretrade has mf1/"),
        ((made(MIXED, computed=False),), "mixed.momentum of a test: has no source; name one, or make the set a Comp"),
        ((made(COPIED),), "copied of a test: all its features have a source"),
        (
            (made(FeatureSet("far", (replace(SPREAD, source="moon"),)), computed=False),),
            "far.spread_bps of a test: its source 'moon' is no set known here: mf1, far, caller",
        ),
        (
            (made(FeatureSet("far", (replace(SPREAD, name="width"),)), computed=False),),
            "far.width of a test: mf1 does not compute a feature of this name",
        ),
        (
            (made(MIXED), made(FeatureSet("far", (replace(URGENCY, source="mixed"),)), computed=False)),
            "far.urgency of a test: mixed does not compute",
        ),
        (
            (made(FeatureSet("far", (replace(SPREAD, signed=True),)), computed=False),),
            "far.spread_bps of a test: `signed` must be False, as in mf1",
        ),
    ],
    ids=["id", "mf1's id", "no computer", "nothing to compute", "unknown source", "no feature", "not its own", "sign"],
)
def test_sets_that_contradict_each_other_are_refused(found: tuple[Registered, ...], message: str) -> None:
    with pytest.raises(FeatureSetError, match=re.escape(message)):
        FeatureSets(found)


def test_two_sets_of_one_fingerprint_are_refused() -> None:
    other = FeatureSet("other", (MOMENTUM,))
    object.__setattr__(other, "fingerprint", MIXED.fingerprint)
    with pytest.raises(FeatureSetError, match=r"names one set only; give it another id"):
        FeatureSets([made(MIXED), made(other)])


def test_a_file_that_the_operator_names_brings_sets(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_sets, "_loaded", {})
    loaded = feature_sets.load(file).by_id("numbers")
    assert loaded is not None
    assert loaded.make is not None
    assert loaded.make("A.SIM").values().tolist() == [0.0]
    assert loaded.origin == str(file)
    assert feature_sets.by_fingerprint(loaded.feature_set.fingerprint) is loaded.feature_set
    assert feature_sets.by_id("numbers") is loaded.feature_set
    assert loaded.feature_set.version in feature_sets.names()


def test_what_has_no_settings_reads_the_file_from_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_sets, "_loaded", {})
    monkeypatch.setenv("PRETRADE_FEATURES__FILE", str(file))
    assert feature_sets.by_id("numbers") is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have a list FEATURE_SETS"),
        ("FEATURE_SETS = []", "must have a list FEATURE_SETS"),
        ("FEATURE_SETS = [7]", "is 7, not a FeatureSet or an object"),
        ("1 / 0", "cannot be run: ZeroDivisionError"),
        ("from feature_cache.feature_set import FeatureSet\nFEATURE_SETS = [FeatureSet('Bad', ())]", "id: 'Bad' must"),
    ],
    ids=["no list", "empty list", "no set", "raises", "no good set"],
)
def test_a_file_without_sound_sets_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path / "numbers.py", text)
    with pytest.raises(FeatureSetError, match=re.escape(f"{path}: ") + ".*" + re.escape(message)):
        feature_sets.of_file(path)


def test_a_file_that_is_not_there_or_no_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FeatureSetError, match="there is no such file"):
        feature_sets.of_file(tmp_path / "none.py")
    with pytest.raises(FeatureSetError, match=r"must be a Python file, and end with \.py"):
        feature_sets.of_file(tmp_path / "none.toml")


def test_a_package_brings_sets_and_one_that_cannot_be_imported_is_left_out(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(file.parent)
    entries = [
        EntryPoint("numbers", "some_numbers:NUMBERS", feature_sets.GROUP),
        EntryPoint("computed", f"{file.stem}:FEATURE_SETS", feature_sets.GROUP),  # a list is no set
        EntryPoint("gone", "a_package_that_is_not_there:X", feature_sets.GROUP),
    ]
    monkeypatch.setattr(feature_sets, "entry_points", lambda group: entries if group == "pretrade.features" else [])
    (found,) = feature_sets.of_packages()
    assert (found.feature_set.id, found.origin) == ("numbers", "a package (some_numbers:NUMBERS)")
