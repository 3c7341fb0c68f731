"""A model's card in the contract's words: figures alone, and nothing of where they are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from pretrade.admin.v1 import admin_pb2 as pb

if TYPE_CHECKING:
    from server.models.registry import Registry

_NOTHING: Final = "nothing was measured of it: it was brought, or its card has gone"
_UNREADABLE: Final = "what was measured of it cannot be read: it is of another version of pretrade, or damaged"


def card_of(registry: Registry, version: str) -> pb.GetModelCardResponse:
    """The card of a version. Blocks.

    Raises:
        ModelUnknownError: There is no such version.
    """
    found = registry.evaluation(version)
    card = pb.GetModelCardResponse(model_version=version, kind=found.kind, standing=found.standing.text)
    if "figures" not in found.measured:
        card.problem = _NOTHING
        return card
    try:
        card.MergeFrom(_measured(found.measured, found.kind))
    except (KeyError, TypeError, ValueError):
        card.problem = _UNREADABLE
    return card


def _measured(measured: Mapping[str, Any], kind: str) -> pb.GetModelCardResponse:
    """What an evaluation says of a kind of model.

    Raises:
        KeyError, TypeError, ValueError: It says it otherwise than this version of pretrade does.
    """
    return pb.GetModelCardResponse(
        label=measured["label"]["text"],
        samples=measured["samples"],
        independent_samples=measured["independent"],
        base_rate=_figure("base_rate", measured["base_rate"]),
        deciders=_deciders(measured["figures"], kind, measured["comparisons"][kind]),
        reliability=[
            pb.ReliabilityBin(samples=one["samples"], mean_score=one["mean_score"], eligible=one["eligible"])
            for one in measured.get("reliability", {}).get(kind, ())
        ],
    )


def _deciders(
    figures: Mapping[str, Mapping[str, Any]], kind: str, baselines: Mapping[str, Any]
) -> Iterator[pb.CardDecider]:
    """The model, and what it was held against; other models of the same training have cards of their own."""
    for name in (kind, *baselines):
        yield pb.CardDecider(name=name, figures=[_figure(one, given) for one, given in figures[name].items()])


def _figure(name: str, given: Sequence[float | None]) -> pb.CardFigure:
    value, low, high = given
    return pb.CardFigure(name=name, value=value, low=low, high=high)
