"""Archived models for replays: found by version, checked against it, and run in a process of their own.

The serving side does not know how a model is made. An archive (`.mar`) contains its own code, `handler.py`, and its
version is the hash of that code, the metadata and the weights. Every packet names that hash. It is recomputed before
any of the code runs; the code then runs in a child process, as it did in TorchServe's worker.
"""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Self, TypeVar

from feature_cache.feature_set import SetRow
from feature_cache.features import MF1
from server.errors import ModelFailedError, ModelUnknownError
from server.inference import wire
from server.inference.outcome import BatchFailedError
from server.inference.wire import ModelIdentity
from server.models.model_process import EXPLAIN, SCORE

T = TypeVar("T")

_MOST_RUNNING: Final = 2
"""Models kept running, some 150 MiB each: the one that decides and the one on trial."""
_FILES: Final = ("handler.py", "metadata.json", "weights.bin")
"""What decides a score, in the order in which it is hashed."""
_MANIFEST: Final = "MAR-INF/MANIFEST.json"
_DAMAGED: Final = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile)
"""What reading an archive raises when some of its bits are others."""
_REQUEST: Final = struct.Struct("<BII")
_LENGTH: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Archive:
    """A model archive whose content is what its version says."""

    name: str
    version: str
    """16 hexadecimal digits: the hash of `files`."""
    files: Mapping[str, bytes]

    @property
    def feature_names(self) -> tuple[str, ...]:
        """What its rows hold."""
        return tuple(json.loads(self.files["metadata.json"])["feature_names"])

    @property
    def feature_set(self) -> str:
        """The set of its rows, as `FeatureSet.version` is written; this process need not know it."""
        metadata = json.loads(self.files["metadata.json"])
        return f"{metadata['feature_set']}/{metadata['feature_set_fingerprint']:08x}"


class Rescored(NamedTuple):
    """What a model says of a row."""

    model: ModelIdentity
    score: float
    part_scores: tuple[float, ...]
    """Of an ensemble: what each of `model.parts` says."""


@dataclass(frozen=True, slots=True)
class PartScore:
    """What a part of an ensemble says of a row."""

    version: str
    weight: float
    score: float
    """Calibrated, as that version alone would give it."""


@dataclass(frozen=True, slots=True)
class Attribution:
    """Why a model scored a row as it did, in log odds before calibration."""

    method: str
    margin: float
    base: float
    contributions: tuple[float, ...]
    """One a feature; with the base they sum to the margin."""
    parts: tuple[PartScore, ...] = ()
    """Of an ensemble."""


class ModelStore:
    """Archives in folders, and in all folders below them.

    Args:
        directories: Where to look; one that does not exist holds nothing.
    """

    def __init__(self, directories: Iterable[Path]) -> None:
        self._directories = tuple(directories)

    def find(self, version: str) -> Archive:
        """The archive of a version.

        Raises:
            ModelUnknownError: No folder holds it.
        """
        for directory in self._directories:
            for path in sorted(directory.rglob("*.mar"), key=lambda path: path.stem != version):
                if _declared_version(path) == version:
                    return read_archive(path)
        places = ", ".join(map(str, self._directories)) or "no model store at all"
        raise ModelUnknownError(f"no archive of model version {version} in {places}")


def read_archive(path: Path) -> Archive:
    """Reads an archive and holds its content against its version.

    Raises:
        ModelUnknownError: It cannot be read, or its content is not what its version says.
    """
    try:
        with zipfile.ZipFile(path) as archived:
            model = json.loads(archived.read(_MANIFEST))["model"]
            files = {name: archived.read(name) for name in _FILES}
    except _DAMAGED as error:
        raise ModelUnknownError(f"{path} is not a model archive of pretrade: {error}") from error
    version = content_version(files.values())
    if version != model["modelVersion"]:
        raise ModelUnknownError(f"{path} says version {model['modelVersion']}, but its content is {version}")
    return Archive(model["modelName"], version, files)


def content_version(parts: Iterable[bytes]) -> str:
    """Hash of all that decides a score, as `torchserve/handler.py` computes it: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


class RunningModel:
    """A model that scores; a context manager around its process, used by one thread."""

    def __init__(self, archive: Archive) -> None:
        self.archive: Final = archive

    def __enter__(self) -> Self:
        """Starts the process, which removes the folder as soon as it has loaded the model."""
        self._directory = tempfile.TemporaryDirectory(prefix="pretrade-model-", ignore_cleanup_errors=True)
        for name, content in self.archive.files.items():
            (Path(self._directory.name) / name).write_bytes(content)
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter and a hash
            [sys.executable, "-m", "server.models.model_process", self._directory.name, self.archive.version],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process, which exits at the end of its input."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):  # it ended before it read what was written last
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._directory.cleanup()

    def score(self, row: bytes, batch_rows: int, batch_index: int) -> Rescored:
        """The score of one row in its place of a batch.

        Args:
            row: A vector of the model's feature set as `model_sets.row_of` makes it: the model refuses another set's.
            batch_rows: Rows in the batch; the others are zeros, which no score depends on.
            batch_index: The row's place in it.

        Raises:
            ModelFailedError: There is no score.
        """
        batch = bytearray(batch_rows * len(row))
        batch[batch_index * len(row) : (batch_index + 1) * len(row)] = row
        try:
            feature_set = row.feature_set if isinstance(row, SetRow) else MF1
            scored = self._exchange(SCORE, bytes(batch), feature_set.fingerprint)
            answer = wire.parse_answer(self.archive.name, batch_rows, scored)
        except (OSError, BatchFailedError) as error:
            raise ModelFailedError(f"{self.archive.name} {self.archive.version} gave no score: {error}") from error
        parts = () if answer.of_parts is None else tuple(answer.of_parts[batch_index].tolist())
        return Rescored(answer.model, float(answer.scores[batch_index]), parts)

    def explain(self, row: bytes) -> Attribution:
        """Why it scores one row, little-endian float32, as it does.

        Raises:
            ModelFailedError: It cannot say.
        """
        try:
            answer = self._exchange(EXPLAIN, row)
        except OSError as error:
            raise ModelFailedError(
                f"{self.archive.name} {self.archive.version} gave no explanation: {error}"
            ) from error
        said = json.loads(answer)
        if "unavailable" in said:
            raise ModelFailedError(f"{self.archive.name} {self.archive.version}: {said['unavailable']}")
        parts = tuple(PartScore(one["model_version"], one["weight"], one["score"]) for one in said.get("parts", ()))
        return Attribution(said["method"], said["margin"], said["base"], tuple(said["contributions"]), parts)

    def _exchange(self, question: int, request: bytes, fingerprint: int = 0) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(_REQUEST.pack(question, fingerprint, len(request)) + request)
        self._process.stdin.flush()
        header = self._process.stdout.read(_LENGTH.size)
        if len(header) < _LENGTH.size:
            raise ModelFailedError(
                f"the process of {self.archive.name} {self.archive.version} ended with {self._process.wait()}"
            )
        return self._process.stdout.read(_LENGTH.unpack(header)[0])


class RunningModels:
    """Models that keep running between questions; a context manager, used by one thread.

    Args:
        archive_of: The archive of this model version; raises `ModelUnknownError`.
        most: So many are kept running.
    """

    def __init__(self, archive_of: Callable[[str], Archive], most: int = _MOST_RUNNING) -> None:
        self._archive_of = archive_of
        self._most = most
        self._running: OrderedDict[str, tuple[RunningModel, ExitStack]] = OrderedDict()
        """By version, the longest unused first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends them."""
        for version in list(self._running):
            self._end(version)

    def ask(self, version: str, question: Callable[[RunningModel], T]) -> T:
        """What a model answers to a question. One that fails is ended, as its process may be gone.

        Raises:
            ModelUnknownError: There is no such version.
            ModelFailedError: It gave no answer. The next question starts it anew.
        """
        if version not in self._running:
            archive = self._archive_of(version)
            if len(self._running) == self._most:
                self._end(next(iter(self._running)))
            started = ExitStack()
            self._running[version] = (started.enter_context(RunningModel(archive)), started)
        self._running.move_to_end(version)
        try:
            return question(self._running[version][0])
        except ModelFailedError:
            self._end(version)
            raise

    def _end(self, version: str) -> None:
        self._running.pop(version)[1].close()


def _declared_version(path: Path) -> str | None:
    """The version in an archive's manifest; None when it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archived:
            version: str = json.loads(archived.read(_MANIFEST))["model"]["modelVersion"]
    except _DAMAGED:
        return None
    return version
