"""The Open Inference Protocol (KServe v2, gRPC), for model servers that know nothing of pretrade.

Such a server answers with scores and the name of a version. pretrade's own handler also sends, with every answer, what
else a decision needs, above all the threshold and the feature set. For this protocol that comes from a description of
the model: the `NAME.json` that is exported beside every archive, or a file of your own with the fields of
`ModelDescription`. An answer counts only while the server says that it serves the version described.

A request holds one FP32 tensor `[rows, features]`, with NaN where a feature is undefined. An answer holds one FP32 or
FP64 tensor: `[rows]` or `[rows, 1]` scores, or `[rows, 2]` probabilities of both classes, the second being the score.
Scores are calibrated probabilities; `python -m torchserve.mlserver` writes the champion as an XGBoost model that gives
those. They equal the handler's to 1e-6 and not to the last bit. A replay of such a decision shows that difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Self

import grpc.aio
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FilePath, ValidationError, field_validator

from feature_cache import feature_sets
from feature_cache.feature_set import FeatureSet
from pretrade.wire.oip.inference_pb2 import ModelInferRequest, ModelInferResponse
from server.inference.codec import Call
from server.inference.outcome import BatchFailedError, Outcome
from server.inference.wire import LAST_EXPIRY, ModelIdentity, ScoreBatch

_METHOD: Final = "/inference.GRPCInferenceService/ModelInfer"
_DTYPES: Final = {"FP32": "<f4", "FP64": "<f8"}


class OpenInferenceSettings(BaseModel):
    """Replicas that speak the Open Inference Protocol."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

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

    @field_validator("champion", "challenger")
    @classmethod
    def _describes_a_model(cls, path: Path | None) -> Path | None:
        if path is not None:
            ModelDescription.read(path)
        return path


class ModelDescription(BaseModel):
    """What a server of the protocol does not say of its model. Other fields are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    version: str = Field(pattern="^[0-9a-f]{16}$")
    """Names the model in decisions and audit: 16 hex digits."""
    threshold: float = Field(ge=0, le=1)
    """TRADE at or above it."""
    feature_set_fingerprint: int
    """Of the feature set that it was trained on; `pretrade features list` shows those that are known."""
    expires_at: int = Field(default=0, ge=0, le=LAST_EXPIRY)
    """Unix seconds after which its scores must not be used; 0 for never."""
    served_version: str | None = None
    """What the server calls this version, for example `1` in a Triton repository; unset: `version`."""

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
        description: The model.

    Raises:
        ValueError: This process does not know the model's feature set.
    """

    def __init__(self, settings: OpenInferenceSettings, description: ModelDescription) -> None:
        self._settings = settings
        self._description = description
        self.feature_set: Final = description.feature_set
        self._served_version = description.served_version or description.version

    def open(self, channel: grpc.aio.Channel) -> Call:
        """See `Codec`."""
        return channel.unary_unary(
            _METHOD,
            request_serializer=ModelInferRequest.SerializeToString,
            response_deserializer=ModelInferResponse.FromString,
        )

    def request(self, model_name: str, rows: list[bytes], version: str, feature_set: FeatureSet) -> ModelInferRequest:
        """See `Codec`."""
        served = self._served_version if version == self._description.version else version
        request = ModelInferRequest(model_name=model_name, model_version=served)
        if self._settings.output_name:
            request.outputs.add(name=self._settings.output_name)
        shape = [len(rows), len(feature_set)]
        request.inputs.add(name=self._settings.input_name, datatype="FP32", shape=shape)
        request.raw_input_contents.append(b"".join(rows))
        return request

    def parse(self, model_name: str, n_rows: int, answer: ModelInferResponse) -> ScoreBatch:
        """See `Codec`."""
        if answer.model_version != self._served_version:
            raise _bad(f"model version {answer.model_version[:64]!r}, described is {self._served_version!r}")
        described = self._description
        identity = ModelIdentity(
            model_name,
            described.version,
            float(np.float32(described.threshold)),
            described.expires_at,
            self.feature_set,
        )
        return ScoreBatch(identity, self._scores(n_rows, answer))

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
