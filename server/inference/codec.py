"""How rows are sent to a model server and scores come back: one codec per protocol, for the same replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, Protocol

import grpc.aio

from feature_cache.feature_set import FeatureSet
from pretrade.wire.torchserve import inference_pb2, inference_pb2_grpc
from server.inference import wire
from server.inference.wire import ModelIdentity, ScoreBatch

ProtocolName = Literal["torchserve", "oip"]
"""`torchserve`: its own `Predictions`. `oip`: the Open Inference Protocol of Triton, KServe and MLServer."""

Call = grpc.aio.UnaryUnaryMultiCallable[Any, Any]
"""A method of a server; request and response are those of one codec."""


class Method(NamedTuple):
    """The method that scores, for a client that is not gRPC's own."""

    path: str
    read: Callable[[bytes], Any]
    """Its response from the bytes of a message; raises `DecodeError`."""


class Codec(Protocol):
    """The words of one protocol. Outcomes of failed calls are classed by `outcome.classify`, whatever the protocol."""

    @property
    def protocol(self) -> ProtocolName:
        """Its name."""

    @property
    def method(self) -> Method | None:
        """The method that scores; None where only gRPC's client is known to get on with the servers."""

    def learn(self, model: ModelIdentity) -> None:
        """Takes note of a version that the server is going to be asked for, where answers do not describe it."""

    def feature_set_of(self, version: str) -> FeatureSet | None:
        """The set that a version takes, where that is known from elsewhere; None where the server says it."""

    def served_name(self, version: str) -> str:
        """What the server calls a version."""

    def version_of(self, served_name: str) -> str:
        """The version that the server calls so; that name, where it is not known."""

    def open(self, channel: grpc.aio.Channel) -> Call:
        """The method that scores."""

    def request(self, model_name: str, rows: list[bytes], version: str, feature_set: FeatureSet) -> Any:
        """The request for a batch, of one version of the model, or of the server's choice where that is empty.

        Each row is a vector of the set as little-endian float32, turned for its order's side.
        """

    def parse(self, model_name: str, n_rows: int, answer: Any) -> ScoreBatch:
        """Parses the answer to a batch of `n_rows`, at a cost that `n_rows` and the largest message bound.

        Raises:
            BatchFailedError: BAD_ANSWER, with what is wrong.
        """


class TorchServe:
    """TorchServe's own protocol, with the header that our handler puts before the scores."""

    protocol: ProtocolName = "torchserve"
    method: Method | None = Method(
        "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions",
        inference_pb2.PredictionResponse.FromString,
    )

    def learn(self, model: ModelIdentity) -> None:
        """See `Codec`: its answers say what they are of."""

    def feature_set_of(self, version: str) -> FeatureSet | None:
        """See `Codec`."""
        return None

    def served_name(self, version: str) -> str:
        """See `Codec`."""
        return version

    def version_of(self, served_name: str) -> str:
        """See `Codec`."""
        return served_name

    def open(self, channel: grpc.aio.Channel) -> Call:
        """See `Codec`."""
        return inference_pb2_grpc.InferenceAPIsServiceStub(channel).Predictions

    def request(
        self, model_name: str, rows: list[bytes], version: str, feature_set: FeatureSet
    ) -> inference_pb2.PredictionsRequest:
        """See `Codec`."""
        return wire.request(model_name, rows, version, feature_set)

    def parse(self, model_name: str, n_rows: int, answer: inference_pb2.PredictionResponse) -> ScoreBatch:
        """See `Codec`."""
        return wire.parse_answer(model_name, n_rows, answer.prediction)


TORCHSERVE: Final = TorchServe()
