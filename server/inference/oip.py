"""The Open Inference Protocol (KServe v2, gRPC), for model servers that know nothing of pretrade.

Such a server answers with scores and the name of a version. pretrade's own handler also sends, with every answer, what
else a decision needs, above all the threshold and the feature set. For this protocol that comes from a description of
the model: the `NAME.json` that is exported beside every archive, or a file of your own with the fields of
`ModelDescription`. An answer counts only while the server says that it serves the version described.

Versions that are loaded later, for a canary or as the next champion, are described by their archives in the registry.
Every request names the version that it means, under the name that the server has for it.

A request holds one FP32 tensor `[rows, features]`, with NaN where a feature is undefined. An answer holds one FP32 or
FP64 tensor: `[rows]` or `[rows, 1]` scores, or `[rows, 2]` probabilities of both classes, the second being the score.
Scores are calibrated probabilities; `python -m torchserve.mlserver` writes the champion as an XGBoost model that gives
those. They equal the handler's to 1e-6 and not to the last bit. A replay of such a decision shows that difference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import grpc.aio
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FilePath, ValidationError, field_validator, model_validator

from feature_cache import feature_sets
from feature_cache.feature_set import FeatureSet
from pretrade.wire.oip.inference_pb2 import ModelInferRequest, ModelInferResponse
from server.inference.codec import Call
from server.inference.outcome import BatchFailedError, Outcome
from server.inference.wire import LAST_EXPIRY, ModelIdentity, ScoreBatch

_METHOD: Final = "/inference.GRPCInferenceService/ModelInfer"
_HASH: Final = re.compile("[0-9a-f]{16}")
_NUMBER_DIGITS: Final = 15
"""Hex digits of a version that a signed 64-bit number always holds."""
_DTYPES: Final = {"FP32": "<f4", "FP64": "<f8"}


class OpenInferenceSettings(BaseModel):
    """Replicas that speak the Open Inference Protocol."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_name: str = Field(default="input", min_length=1, max_length=128)
    """Name of the input tensor. Triton's backends require their own, for example `input__0`."""
    output_name: str = Field(default="", max_length=128)
    """Name of the output tensor with the scores, for example `output__0`; empty for the first one that is sent."""
    champion: FilePath | None = None
    """JSON file that describes the champion: `version`, `threshold`, `feature_set_fingerprint`, and optionally
    `expires_at` and `served_version`. The exported `champion.json` is one. Required if primary or secondary use
    `oip`."""
    challenger: FilePath | None = None
    """The same for the challenger."""
    version_names: Literal["hash", "number"] = "hash"
    """What such servers call the versions that this server loads into them, see `replicas.management`. `hash`: their 16
    hex digits. `number`: their first 15 hex digits as a decimal number, for Triton, whose versions are numbers."""
    triton_configs: Mapping[Annotated[str, Field(pattern="^[!-~]{1,64}$")], FilePath] = {}
    """Triton's configuration of a model, a file with one JSON object (`ModelConfig`), by model name. It is sent with
    each load request, with the versions to be served as its `version_policy`. Unset: the `config.pbtxt` in Triton's
    repository decides which versions are served, and no version is unloaded while its files are there."""

    @field_validator("champion", "challenger")
    @classmethod
    def _describes_a_model(cls, path: Path | None) -> Path | None:
        if path is not None:
            ModelDescription.read(path)
        return path

    @field_validator("triton_configs")
    @classmethod
    def _are_objects(cls, paths: Mapping[str, Path]) -> Mapping[str, Path]:
        for model, path in paths.items():
            try:
                is_object = isinstance(json.loads(path.read_text()), dict)
            except (OSError, ValueError) as error:
                raise ValueError(f"{model}: {path}: {error}") from error
            if not is_object:
                raise ValueError(f"{model}: {path} does not hold one JSON object")
        return paths

    @model_validator(mode="after")
    def _tritons_versions_are_numbers(self) -> Self:
        if self.triton_configs and self.version_names != "number":
            raise ValueError("triton_configs: needs version_names=number, for Triton's versions are numbers")
        return self


class ModelDescription(BaseModel):
    """What a server of the protocol does not say of its model. Other fields are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: str = Field(pattern="^[0-9a-f]{16}$")
    """Names the model in decisions and audit: 16 hex digits."""
    threshold: float = Field(ge=0, le=1)
    """TRADE at or above it."""
    feature_set_fingerprint: int
    """Of the feature set that it was trained on; `pretrade features list` shows those that are known."""
    expires_at: int = Field(default=0, ge=0, le=LAST_EXPIRY)
    """Unix seconds after which its scores must not be used; 0 for never."""
    served_version: str | None = None
    """What the server calls this version, for example `1` in a Triton repository; unset: as `version_names` says."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a description.

        Raises:
            OSError: It cannot be read.
            ValueError: It is none.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{path} does not describe a model: {error}") from error

    @property
    def feature_set(self) -> FeatureSet:
        """The feature set that it was trained on.

        Raises:
            ValueError: This process does not know it.
        """
        found = feature_sets.by_fingerprint(self.feature_set_fingerprint)
        if found is None:
            raise ValueError(
                f"feature set {self.feature_set_fingerprint:08x} is not known here: {feature_sets.names()}"
            )
        return found


class OpenInference:
    """The codec of the protocol.

    Args:
        settings: Names of the tensors.
        description: The model; None where its versions become known one by one, from their archives.

    Raises:
        ValueError: This process does not know the model's feature set.
    """

    protocol: Final = "oip"
    method: Final = None

    def __init__(self, settings: OpenInferenceSettings, description: ModelDescription | None) -> None:
        self._settings = settings
        self._described = ""
        """The version that is meant where none is named; empty for the server's choice."""
        self._names: dict[str, str] = {}
        """What the server calls a version, where somebody has said so."""
        self._known: dict[str, ModelIdentity] = {}
        """The versions that are known, by the server's names."""
        if description is None:
            return
        self._described = description.version
        if description.served_version:
            self._names[description.version] = description.served_version
        self.learn(
            ModelIdentity(
                "",
                description.version,
                float(np.float32(description.threshold)),
                description.expires_at,
                description.feature_set,
            )
        )

    def learn(self, model: ModelIdentity) -> None:
        """See `Codec`."""
        self._known[self.served_name(model.version)] = model

    def feature_set_of(self, version: str) -> FeatureSet | None:
        """See `Codec`; of a version that is not known, that of the one described."""
        known = self._known.get(self.served_name(version)) or self._known.get(self.served_name(self._described))
        return None if known is None else known.feature_set

    def served_name(self, version: str) -> str:
        """See `Codec`."""
        name = self._names.get(version)
        if name is None:
            numbered = self._settings.version_names == "number" and _HASH.fullmatch(version)
            name = str(int(version[:_NUMBER_DIGITS], 16)) if numbered else version
        return name

    def version_of(self, served_name: str) -> str:
        """See `Codec`."""
        known = self._known.get(served_name)
        return served_name if known is None else known.version

    def open(self, channel: grpc.aio.Channel) -> Call:
        """See `Codec`."""
        return channel.unary_unary(
            _METHOD,
            request_serializer=ModelInferRequest.SerializeToString,
            response_deserializer=ModelInferResponse.FromString,
        )

    def request(self, model_name: str, rows: list[bytes], version: str, feature_set: FeatureSet) -> ModelInferRequest:
        """See `Codec`."""
        served = self.served_name(version or self._described)
        request = ModelInferRequest(model_name=model_name, model_version=served)
        if self._settings.output_name:
            request.outputs.add(name=self._settings.output_name)
        shape = [len(rows), len(feature_set)]
        request.inputs.add(name=self._settings.input_name, datatype="FP32", shape=shape)
        request.raw_input_contents.append(b"".join(rows))
        return request

    def parse(self, model_name: str, n_rows: int, answer: ModelInferResponse) -> ScoreBatch:
        """See `Codec`."""
        model = self._known.get(answer.model_version)
        if model is None:
            known = ", ".join(repr(name) for name in self._known) or "none"
            raise _bad(f"model version {answer.model_version[:64]!r}, described are {known}")
        if model.name != model_name:
            model = self._known[answer.model_version] = replace(model, name=model_name)
        return ScoreBatch(model, self._scores(n_rows, answer))

    def _scores(self, n_rows: int, answer: ModelInferResponse) -> NDArray[np.float32]:
        wanted = self._settings.output_name
        places = (place for place, output in enumerate(answer.outputs) if output.name == wanted or not wanted)
        place = next(places, None)
        if place is None:
            raise _bad(f"no output {wanted!r}" if wanted else "no output")
        output = answer.outputs[place]
        shape = tuple(output.shape)
        if output.datatype not in _DTYPES or shape not in ((n_rows,), (n_rows, 1), (n_rows, 2)):
            raise _bad(f"{output.datatype[:16]} {list(shape[:4])} for {n_rows} rows")
        dtype = np.dtype(_DTYPES[output.datatype])
        values: NDArray[np.floating]
        if place < len(answer.raw_output_contents):
            raw = answer.raw_output_contents[place]
            if len(raw) != dtype.itemsize * n_rows * (shape[1:] or (1,))[0]:
                raise _bad(f"{len(raw)} bytes for {output.datatype} {list(shape)}")
            values = np.frombuffer(raw, dtype=dtype)
        else:
            contents = output.contents
            values = np.array(contents.fp32_contents if output.datatype == "FP32" else contents.fp64_contents, dtype)
            if len(values) != n_rows * (shape[1:] or (1,))[0]:
                raise _bad(f"{len(values)} values for {output.datatype} {list(shape)}")
        return values.reshape(n_rows, -1)[:, -1].astype(np.float32)


def _bad(detail: str) -> BatchFailedError:
    return BatchFailedError(Outcome.BAD_ANSWER, detail)
