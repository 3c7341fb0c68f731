"""Why a model scored a decision as it did: from the packet and the model version that it names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Self

import numpy as np

from fallback.order import MODEL_SOURCES
from feature_cache.feature_set import ROW
from feature_cache.features import MF1
from pretrade.audit.v1 import packet_pb2
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.vectors import vectors_in
from server.errors import NotReplayableError
from server.models.archive import Archive, Attribution, RunningModel, RunningModels

SCORED: Final = MODEL_SOURCES | {pb.SOURCE_CACHED_SCORE}
"""Sources whose score a model gave."""


class Explainer:
    """Explains decisions, one after another; a context manager that keeps models running between them.

    Args:
        packet_of: The packet of this decision, or None.
        archive_of: The archive of this model version; raises `ModelUnknownError`.
        models: How many models decide orders, each of which may have another version on trial.
    """

    def __init__(
        self,
        packet_of: Callable[[str], packet_pb2.DecisionPacket | None],
        archive_of: Callable[[str], Archive],
        models: int = 1,
    ) -> None:
        self._packet_of = packet_of
        self._models = RunningModels(archive_of, models + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the models."""
        self._models.__exit__()

    def explain(self, packet: packet_pb2.DecisionPacket) -> pb.Explanation:
        """The explanation of a decision's score, or why there is none; raises nothing."""
        decision = packet.decision
        if decision.source not in SCORED:
            return no_model(decision.source)
        try:
            return self._explained(self._scored(packet))
        except NotReplayableError as error:
            return unavailable(str(error))

    def warm_up(self, version: str) -> None:
        """Loads a model and has it explain a row of zeros.

        Raises:
            NotReplayableError: It cannot.
        """
        self._models.ask(version, lambda model: model.explain(bytes(4 * len(model.archive.feature_names))))

    def _scored(self, packet: packet_pb2.DecisionPacket) -> packet_pb2.DecisionPacket:
        """The packet of the decision that the score comes from."""
        if packet.decision.source != pb.SOURCE_CACHED_SCORE:
            return packet
        origin = self._packet_of(packet.cached_from_decision_id)
        if origin is None:
            raise NotReplayableError(f"the audit does not hold decision {packet.cached_from_decision_id}")
        return origin

    def _explained(self, packet: packet_pb2.DecisionPacket) -> pb.Explanation:
        version = packet.decision.model_version
        feature_set = packet.scored_feature_set or MF1.version
        scored = vectors_in(packet).get(feature_set, b"")
        row = np.frombuffer(scored, dtype=ROW)

        def explain(model: RunningModel) -> tuple[tuple[str, ...], Attribution]:
            wanted = model.archive.feature_set
            if feature_set != wanted or len(row) != len(model.archive.feature_names):
                raise NotReplayableError(
                    f"the model takes features of the set {wanted}, which the decision does not hold"
                )
            return model.archive.feature_names, model.explain(scored)

        names, attribution = self._models.ask(version, explain)
        explanation = pb.Explanation(
            status=pb.EXPLANATION_STATUS_READY,
            method=attribution.method,
            margin=attribution.margin,
            base=attribution.base,
            decision_id=packet.decision.decision_id,
            model_version=version,
        )
        for name, value, contribution in zip(names, row.tolist(), attribution.contributions, strict=True):
            explanation.contributions.add(
                feature=name, value=None if math.isnan(value) else value, contribution=contribution
            )
        for part in attribution.parts:
            explanation.parts.add(model_version=part.version, weight=part.weight, score=part.score)
        return explanation


def no_model(source: pb.Source.ValueType) -> pb.Explanation:
    """There is nothing to explain."""
    message = f"no model scored the order: source {enum_name(pb.Source, source)}"
    return pb.Explanation(status=pb.EXPLANATION_STATUS_NO_MODEL, message=message)


def unavailable(why: str) -> pb.Explanation:
    """An explanation that cannot be made."""
    return pb.Explanation(status=pb.EXPLANATION_STATUS_UNAVAILABLE, message=why)
