"""Why a model scored a decision as it did: from the packet and the model version that it names."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final, Self

import numpy as np

from pretrade.audit.v1 import packet_pb2
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb
from server.errors import ModelFailedError, NotReplayableError
from server.models.archive import Archive, RunningModel

SCORED: Final = frozenset((pb.SOURCE_PRIMARY, pb.SOURCE_SECONDARY, pb.SOURCE_CANARY, pb.SOURCE_CACHED_SCORE))
"""Sources whose score a model gave."""
_MOST_RUNNING: Final = 2
"""Models kept loaded, some 150 MiB each: the one that decides and the one on trial."""


class Explainer:
    """Explains decisions, one after another; a context manager that keeps models running between them.

    Args:
        packet_of: The packet of this decision, or None.
        archive_of: The archive of this model version; raises `ModelUnknownError`.
    """

    def __init__(
        self,
        packet_of: Callable[[str], packet_pb2.DecisionPacket | None],
        archive_of: Callable[[str], Archive],
    ) -> None:
        self._packet_of = packet_of
        self._archive_of = archive_of
        self._running: OrderedDict[str, tuple[RunningModel, ExitStack]] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the models."""
        for version in list(self._running):
            self._end(version)

    def explain(self, packet: packet_pb2.DecisionPacket) -> pb.Explanation:
        """The explanation of a decision's score, or why there is none; raises nothing."""
        decision = packet.decision
        if decision.source not in SCORED:
            return no_model(decision.source)
        try:
            return self._explained(self._scored(packet))
        except NotReplayableError as error:
            return unavailable(str(error))

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
        model = self._model(version)
        names = model.archive.feature_names
        row = np.frombuffer(packet.model_input, dtype="<f4")
        if len(row) != len(names):
            raise NotReplayableError(f"the features are of the set {packet.feature_set_id!r}, not the model's")
        try:
            attribution = model.explain(packet.model_input)
        except ModelFailedError:
            self._end(version)  # its process may be gone: the next one starts it anew
            raise
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
        return explanation

    def _model(self, version: str) -> RunningModel:
        if version not in self._running:
            archive = self._archive_of(version)
            if len(self._running) == _MOST_RUNNING:
                self._end(next(iter(self._running)))
            started = ExitStack()
            self._running[version] = (started.enter_context(RunningModel(archive)), started)
        self._running.move_to_end(version)
        return self._running[version][0]

    def _end(self, version: str) -> None:
        self._running.pop(version)[1].close()


def no_model(source: pb.Source.ValueType) -> pb.Explanation:
    """There is nothing to explain."""
    message = f"no model scored the order: source {enum_name(pb.Source, source)}"
    return pb.Explanation(status=pb.EXPLANATION_STATUS_NO_MODEL, message=message)


def unavailable(why: str) -> pb.Explanation:
    """An explanation that cannot be made."""
    return pb.Explanation(status=pb.EXPLANATION_STATUS_UNAVAILABLE, message=why)
