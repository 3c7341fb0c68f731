"""The vectors in a packet, with their names: what rules and guards saw, and what a model of another set scored.

Names are those of the feature set where this process knows it as it was, and the places in the vector where it does
not.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from feature_cache import feature_sets
from feature_cache.feature_set import ROW, FeatureSet
from feature_cache.features import MF1
from pretrade.audit.v1 import packet_pb2


def own_features(packet: packet_pb2.DecisionPacket) -> Mapping[str, float]:
    """What rules and guards saw, and a model of the same set; empty where features were missing."""
    return _named(packet.model_input, feature_sets.by_id(packet.feature_set_id))


def scored_features(packet: packet_pb2.DecisionPacket) -> Mapping[str, float]:
    """What a model of another set saw; empty where none scored."""
    return _named(packet.scored_input, feature_sets.by_version(packet.scored_feature_set))


def vectors_in(packet: packet_pb2.DecisionPacket) -> Mapping[str, bytes]:
    """What models could have scored, by the version of its feature set: little-endian float32, turned for the side.

    That is what rules and guards saw, and what a model of another set scored.
    """
    held = {packet.scored_feature_set: packet.scored_input} if packet.scored_feature_set else {}
    if packet.feature_set_id == MF1.id and len(packet.model_input) == MF1.row_bytes:
        held[MF1.version] = packet.model_input
    return held


def _named(vector: bytes, feature_set: FeatureSet | None) -> Mapping[str, float]:
    values = np.frombuffer(vector, dtype=ROW).tolist()
    known = feature_set is not None and len(feature_set) == len(values)
    names = feature_set.names if feature_set is not None and known else tuple(map(str, range(len(values))))
    return dict(zip(names, values, strict=True))
