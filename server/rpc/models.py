"""`AdminService` for a server's models and the map that chooses one: converts messages; knows no call and no status."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from pretrade.admin.v1 import admin_pb2 as pb
from server.control.subjects import MODEL_MAP
from server.errors import InvalidChangeError, UnknownSubjectError
from server.inference.model_map import MapRule, ModelMap, Rules, fits, read_rules, write_rules
from server.inference.model_names import DEFAULT
from server.rpc.steering import change_of, expiry

if TYPE_CHECKING:
    from server.control.state import ControlState
    from server.models.embedding import EmbeddedModel
    from server.rpc.canary import CanarySteering


class _Asking(Protocol):
    """A request about one model."""

    @property
    def model(self) -> str: ...


@dataclass(frozen=True, slots=True)
class SteeredModel:
    """What is shown and changed of one model."""

    canaries: CanarySteering
    embedded: EmbeddedModel


class ModelSteering:
    """The part of `AdminService` that is about which model decides, and finds the model that a request means.

    Args:
        control: What is steered.
        model_map: Chooses the model of an order.
        models: By name, the default one first.
        instruments: Those that this server decides orders of.
    """

    def __init__(
        self,
        control: ControlState,
        model_map: ModelMap,
        models: Mapping[str, SteeredModel],
        instruments: tuple[str, ...],
    ) -> None:
        self._control = control
        self._map = model_map
        self._models: Final = models
        self._instruments = instruments

    @property
    def default(self) -> SteeredModel:
        """The default model."""
        return self._models[DEFAULT]

    def of(self, request: _Asking) -> CanarySteering:
        """The canaries of the model that a request means.

        Raises:
            UnknownSubjectError: This server does not have it.
        """
        found = self._models.get(request.model or DEFAULT)
        if found is None:
            raise UnknownSubjectError(f"model: {self._no(request.model)}")
        return found.canaries

    def rules(self) -> list[pb.ModelMapRule]:
        """The rules in force."""
        return [_message(rule) for rule in self._map.rules]

    def models(self) -> list[pb.NamedModel]:
        """Every model, the default one first."""
        return [_described(one) for one in self._models.values()]

    def others(self, drift: Mapping[str, pb.DriftStatus]) -> list[pb.NamedModel]:
        """Every model with what was compared of it, where there is one besides the default one."""
        if len(self._models) == 1:
            return []
        found = self.models()
        for one in found:
            one.drift.CopyFrom(drift[one.name])
        return found

    async def list_models(self) -> pb.ListModelsResponse:
        """Every version in the registry, with the aliases of all models."""
        first, *others = (one.canaries for one in self._models.values())
        return await first.list_models(others)

    async def card(self, request: pb.GetModelCardRequest) -> pb.GetModelCardResponse:
        """What was measured of a version, whichever model it is for."""
        return await self.default.canaries.card(request.model_version)

    def get(self) -> pb.GetModelMapResponse:
        """The map, and what it can name."""
        return pb.GetModelMapResponse(rules=self.rules(), models=self.models(), control_version=self._control.version)

    async def set(self, request: pb.SetModelMapRequest, author: str) -> pb.SetModelMapResponse:
        """Sets the map."""
        rules = self._read(request)
        value = write_rules(rules) if rules else None
        change = await change_of(
            self._control, request, author, MODEL_MAP, value, expiry(request), detail=self._detail(rules)
        )
        return pb.SetModelMapResponse(rules=self.rules(), change=change)

    def _read(self, request: pb.SetModelMapRequest) -> Rules:
        """The rules of a request.

        Raises:
            InvalidChangeError: They break a rule, or name a model that this server does not have.
        """
        for place, one in enumerate(request.rules):
            if one.model not in self._models:
                raise InvalidChangeError(f"rules.{place}.model: {self._no(one.model)}")
        given = [
            {"instrument": one.instrument or "*", "strategy": one.strategy or "*", "model": one.model}
            for one in request.rules
        ]
        try:
            return read_rules(given)
        except ValueError as error:
            raise InvalidChangeError(str(error)) from None

    def _no(self, model: str) -> str:
        return f"this server has no model {model!r}; it has {', '.join(self._models)} (PRETRADE_MODELS)"

    def _detail(self, rules: Rules) -> tuple[str, ...]:
        """What differs, a line each."""
        before = self._map.rules
        gone = [f"- {rule}" for rule in before if rule not in rules]
        came = [f"+ {rule}" for rule in rules if rule not in before]
        return (*gone, *came, *self._warnings(rules))

    def _warnings(self, rules: Rules) -> Iterator[str]:
        """What rules do that nobody can have meant, a line each."""
        for place, rule in enumerate(rules):
            hidden_by = next((one for one in rules[:place] if one.hides(rule)), None)
            if hidden_by is not None:
                yield f"{rule}: gets no order, as {hidden_by} comes first"
            elif not any(fits(rule.instrument, name) for name in self._instruments):
                yield f"{rule}: fits no instrument of this server"
            elif not self._models[rule.model].canaries.champion_version:
                yield f"{rule}: {rule.model} has no champion yet, so that its orders go down the chain"


def _described(model: SteeredModel) -> pb.NamedModel:
    message = model.canaries.standing_of_model()
    embedded = model.embedded
    message.embedded.CopyFrom(pb.EmbeddedStatus(model_version=embedded.version, problem=embedded.problem))
    return message


def _message(rule: MapRule) -> pb.ModelMapRule:
    return pb.ModelMapRule(instrument=rule.instrument, strategy=rule.strategy, model=rule.model)
