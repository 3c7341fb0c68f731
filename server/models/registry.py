"""The model registry: every version under its content hash, and aliases for some of them.

It is a folder that all servers see::

    versions/<version>.mar   archives, never changed once they are there
    aliases/<alias>          one line, a version; replaced whole; of the default model
    aliases/<model>/<alias>  the same of another model of the server
    cards/<version>/         its model card, and what was measured of it

Training puts archives and cards into it (`torchserve/export.py`, `local/training`); servers read them and move the
aliases. An alias says which version a model server should be started with. Which version decides orders is part of the
control state.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fallback.model_limits import NO_LIMITS, ModelLimits, limits_of
from feature_cache import feature_sets
from feature_cache.feature_set import ROW, FeatureSet
from feature_cache.features import MF1
from server.errors import ModelUnknownError
from server.inference.model_names import DEFAULT, qualified
from server.models.archive import Archive, read_archive
from server.models.markout import Markout, markout_of

VERSIONS: Final = "versions"
CARDS: Final = "cards"
"""Folder with a folder for the card of every version."""
CARD_FILE: Final = "card.md"
EVALUATION_FILE: Final = "evaluation.json"
"""Beside the card: all figures of the walk-forward evaluation, and `standing` by kind of model."""
NOT_MEASURED: Final = "no card says how good it is"
_ALIASES: Final = "aliases"
CANDIDATE: Final = "candidate"
"""What was trained last, and has not been given an order yet."""
ALIASES: Final = ("champion", "challenger", "previous", CANDIDATE)
_HEX_DIGITS: Final = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Standing:
    """How a version does against the baselines, as its card says."""

    text: str
    """In a few words, for example `does not beat the rules`."""
    card: Path | None
    """The card; None where there is none."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured of a version before it decided."""

    kind: str
    """What it is; empty where its archive is damaged."""
    measured: Mapping[str, Any]
    """All that `WalkForward.summary` gives; empty where nothing was measured. Whoever wrote the file may have been of
    another version of pretrade."""
    standing: Standing


class ModelUnusableError(Exception):
    """The version cannot score what this server would ask it."""


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """What a version says of itself."""

    version: str
    """First 16 hex digits of its content hash."""
    name: str
    """Of the model whose place it is for: `champion` or `challenger`."""
    kind: str
    """`monotone`, `xgboost` or `torch`."""
    feature_set: str
    """Id and fingerprint, for example `mf1/d953e411`."""
    threshold: float
    created_at: float
    """When its archive was written, seconds since the Unix epoch."""
    expires_at: int
    """Unix seconds; 0 for never."""
    canned_rows: NDArray[np.float32]
    """float32[n, features of the set] that it was asked to score when it was exported; n is 0 where it was not."""
    canned_scores: NDArray[np.float32]
    """float32[n], its answers then."""
    problem: str = ""
    """Why this server cannot use it; empty when it can."""
    markout: Markout = field(default_factory=Markout)
    """The label that it has learnt."""
    limits: ModelLimits = NO_LIMITS
    """What it says of its own limits."""
    features: FeatureSet = MF1
    """The set that it takes, where there is no problem."""


class Registry:
    """One registry on disk; everything here blocks.

    Args:
        root: Its folder; one that does not exist holds nothing.
        model: Whose aliases are meant. All models share the versions.
    """

    def __init__(self, root: Path, model: str = DEFAULT) -> None:
        self.root = root
        self._model = model
        self._aliases = root / _ALIASES if model == DEFAULT else root / _ALIASES / model

    def records(self) -> list[ModelRecord]:
        """Every version, the newest first."""
        found = (self.describe(path.stem) for path in (self.root / VERSIONS).glob("*.mar") if is_version(path.stem))
        return sorted(found, key=lambda record: (-record.created_at, record.version))

    def aliases(self) -> Mapping[str, str]:
        """The version of every alias that is set."""
        versions = {alias: self._read_alias(alias) for alias in ALIASES}
        return {alias: version for alias, version in versions.items() if version is not None}

    def aliases_of_all(self) -> Mapping[str, str]:
        """The same of every model; those of others than the default one follow its name: `scalper/champion`."""
        folder = self.root / _ALIASES
        names = [DEFAULT, *sorted(path.name for path in folder.glob("*") if path.is_dir())]
        return {
            qualified(name, alias): version
            for name in names
            for alias, version in Registry(self.root, name).aliases().items()
        }

    def resolve(self, version_or_alias: str) -> str:
        """The version that is meant.

        Raises:
            ModelUnknownError: It is neither a version in the registry nor an alias of one.
        """
        version = self._read_alias(version_or_alias) if version_or_alias in ALIASES else version_or_alias
        if version is None or not is_version(version) or not self.path(version).is_file():
            if version_or_alias == CANDIDATE:
                raise ModelUnknownError(self._no_candidate())
            raise ModelUnknownError(f"no model {version_or_alias!r} in {self.root}: `pretrade models list` names them")
        return version

    def _no_candidate(self) -> str:
        if self._model == DEFAULT:
            return "there is no candidate yet: `pretrade train` and `pretrade models add` make one, or name a version"
        adds = f"`pretrade models add … --model {self._model}` makes one"
        return f"the model {self._model} has no candidate of its own yet: {adds}, or name a version"

    def path(self, version: str) -> Path:
        """Where a version's archive is."""
        return self.root / VERSIONS / f"{version}.mar"

    def describe(self, version: str) -> ModelRecord:
        """What a version says of itself; one that is damaged or of a set that is not known here has a `problem`.

        Raises:
            ModelUnknownError: There is no such version.
        """
        path = self.path(version)
        try:
            created_at = path.stat().st_mtime
        except OSError as error:
            raise ModelUnknownError(f"no model {version} in {self.root}") from error
        try:
            archive = read_archive(path)
            if archive.version != version:
                raise ModelUnknownError(f"its name says {version}, its content is {archive.version}")
        except ModelUnknownError as error:
            return _unreadable(version, created_at, error)
        return record_of(archive, created_at)

    def evaluation(self, version: str) -> Evaluation:
        """What was measured of a version before it decided.

        Raises:
            ModelUnknownError: There is no such version.
        """
        if not is_version(version):
            raise ModelUnknownError(f"no model {version!r} in {self.root}: `pretrade models list` names them")
        kind = self.describe(version).kind
        directory = self.root / CARDS / version
        card = directory / CARD_FILE
        try:
            measured = json.loads((directory / EVALUATION_FILE).read_text())
            standing = str(measured["standing"][kind])
        except (OSError, ValueError, KeyError, TypeError):
            measured, standing = {}, NOT_MEASURED
        return Evaluation(kind, measured, Standing(standing, card if card.is_file() else None))

    def standing(self, version: str) -> Standing:
        """How a version does against the baselines, as its card says."""
        try:
            return self.evaluation(version).standing
        except ModelUnknownError:
            return Standing(NOT_MEASURED, None)

    def usable(self, version: str) -> ModelRecord:
        """The record of a version that this server can use.

        Raises:
            ModelUnknownError: There is no such version.
            ModelUnusableError: It is damaged, or wants features that are not known here.
        """
        record = self.describe(version)
        if record.problem:
            raise ModelUnusableError(f"model {version}: {record.problem}")
        return record

    def set_alias(self, alias: str, version: str) -> str | None:
        """Points an alias at a version, durably, and returns the one before.

        Raises:
            ValueError: There is no such alias.
            ModelUnknownError: There is no such version.
            ModelUnusableError: It is damaged, or wants features that are not known here.
            OSError: It cannot be written; nothing changed.
        """
        if alias not in ALIASES:
            raise ValueError(f"alias: one of {', '.join(ALIASES)}")
        self.usable(version)
        before = self._read_alias(alias)
        path = self._aliases / alias
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{alias}.{os.getpid()}.new")
        with unfinished.open("w") as file:
            file.write(f"{version}\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        return before

    def champions_markout(self) -> Markout:
        """The label that the champion has learnt; the default where the registry has none."""
        version = self._read_alias("champion")
        return Markout() if version is None or not self.path(version).is_file() else self.describe(version).markout

    def _read_alias(self, alias: str) -> str | None:
        try:
            version = (self._aliases / alias).read_text().strip()
        except OSError:
            return None
        return version if is_version(version) else None


def is_version(text: str) -> bool:
    """True for 16 hexadecimal digits."""
    return len(text) == 16 and _HEX_DIGITS.issuperset(text)


def record_of(archive: Archive, created_at: float) -> ModelRecord:
    """What an archive says of itself; one that is incomplete or of a set that is not known here has a `problem`."""
    try:
        return _record(archive.version, archive.name, json.loads(archive.files["metadata.json"]), created_at)
    except (ValueError, KeyError, TypeError, ArithmeticError, binascii.Error) as error:
        return _unreadable(archive.version, created_at, error)


def _unreadable(version: str, created_at: float, error: Exception) -> ModelRecord:
    nothing = np.empty((0, len(MF1)), dtype=np.float32), np.empty(0, dtype=np.float32)
    return ModelRecord(version, "", "", "", 0.0, created_at, 0, *nothing, problem=f"unreadable: {error}")


def _record(version: str, name: str, metadata: Mapping[str, Any], created_at: float) -> ModelRecord:
    fingerprint = int(metadata["feature_set_fingerprint"])
    feature_set = f"{metadata['feature_set']}/{fingerprint:08x}"
    canned = metadata["canned"]
    rows = np.frombuffer(base64.b64decode(canned["rows"], validate=True), dtype=ROW)
    scores = np.array(canned["scores"], dtype=np.float32)
    known = feature_sets.by_fingerprint(fingerprint)
    if known is None:
        problem = f"it wants features {feature_set}, known here are {feature_sets.names()}"
        rows, scores = rows[:0], scores[:0]
    else:
        problem = ""
        if len(rows) != len(scores) * len(known):
            raise ValueError(f"{len(rows)} values for {len(scores)} canned scores")
    taken = known or MF1
    return ModelRecord(
        version,
        name,
        str(metadata["kind"]),
        feature_set,
        float(metadata["threshold"]),
        created_at,
        int(metadata["expires_at"]),
        rows.reshape(-1, len(taken)),
        scores,
        problem,
        markout_of(metadata),
        NO_LIMITS if problem else limits_of(metadata, taken),
        taken,
    )
