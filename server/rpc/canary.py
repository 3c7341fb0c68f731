"""`AdminService` for models and canaries: converts messages and applies changes; knows no call and no status."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import ValidationError

from pretrade.admin.v1 import admin_pb2 as pb
from server.canary.evidence import Check, Verdict
from server.canary.history import EvidenceHistory
from server.canary.plan import Canary
from server.canary.rollout import CanaryError, Rollout
from server.canary.settings import check_steps
from server.canary.subjects import canary_subject, champion_subject
from server.control.state import ControlState, Wanted
from server.errors import (
    ChangeRefusedError,
    ControlChangedError,
    InvalidChangeError,
    ModelUnknownError,
    UnknownSubjectError,
)
from server.inference import model_sets
from server.inference.model_map import PATTERN_RULE
from server.inference.model_names import DEFAULT, qualified
from server.inference.replicas import Replicas
from server.models.deployment import Deployment, DeploymentError
from server.models.expiry import ModelExpiry
from server.models.management import LoadError
from server.models.registry import (
    ALIASES,
    CANDIDATE,
    NOT_MEASURED,
    ModelRecord,
    ModelUnusableError,
    Registry,
    Standing,
)
from server.rpc.cards import card_of
from server.rpc.steering import Asking, duration

T = TypeVar("T")

_MOST_AFFECTED: Final = 1_000
_STATES: Final = {
    "running": pb.CANARY_STATE_RUNNING,
    "promoted": pb.CANARY_STATE_PROMOTED,
    "rolled_back": pb.CANARY_STATE_ROLLED_BACK,
    "aborted": pb.CANARY_STATE_ABORTED,
}
_VERDICTS: Final = {
    Verdict.NO_EVIDENCE: pb.CANARY_VERDICT_NO_EVIDENCE,
    Verdict.BETTER_OR_EQUAL: pb.CANARY_VERDICT_BETTER_OR_EQUAL,
    Verdict.WORSE: pb.CANARY_VERDICT_WORSE,
}


class CanarySteering:
    """The part of `AdminService` that is about models and canaries.

    What it raises is a `ControlError`; a change that was asked for with `dry_run` is not made.

    Args:
        rollout: The canary.
        deployment: The models and where they are loaded.
        control: The control state.
        replicas: By name, primary first.
        steps: Share of the flows at each step, where a request names none.
        new_id: Makes a unique, time-ordered id.
        wall_seconds: Seconds since the Unix epoch.
        expiry: Tells when models expire.
        model: The name of the model whose canaries these are.
    """

    def __init__(
        self,
        rollout: Rollout,
        deployment: Deployment,
        control: ControlState,
        replicas: Replicas,
        steps: tuple[float, ...],
        new_id: Callable[[], str],
        wall_seconds: Callable[[], float],
        expiry: ModelExpiry,
        model: str = DEFAULT,
    ) -> None:
        self._model = model
        self._canary_subject, self._champion_subject = canary_subject(model), champion_subject(model)
        self._rollout = rollout
        self._deployment = deployment
        self._control = control
        self._replicas = replicas
        self._steps = steps
        self._new_id = new_id
        self._wall_seconds = wall_seconds
        self._expiry = expiry
        self._champion = pb.ChampionStatus()
        """What was said of the champion last: a card does not change."""

    def current(self) -> pb.Canary | None:
        """The canary that is under way, without its evidence."""
        canary = self._rollout.canary
        return self._message(canary, checks=False) if canary is not None and canary.running else None

    async def get(self, request: pb.GetCanaryRequest) -> pb.GetCanaryResponse:
        """The canary with its evidence, as this process has it."""
        if request.affected_decisions > _MOST_AFFECTED:
            raise InvalidChangeError(f"affected_decisions: must be 0 to {_MOST_AFFECTED:,}")
        canary = self._rollout.canary
        if canary is None:
            return pb.GetCanaryResponse()
        affected = list(self._rollout.affected)[::-1][: request.affected_decisions]
        return pb.GetCanaryResponse(
            canary=self._message(canary), affected_decision_ids=affected, history=_history(self._rollout.history)
        )

    async def start(self, request: pb.StartCanaryRequest, author: str) -> pb.StartCanaryResponse:
        """Loads and checks a version, and gives it its first orders."""
        steps = tuple(request.steps) or self._steps
        try:
            check_steps(steps)
        except ValueError as error:
            raise InvalidChangeError(f"steps: {error}") from None
        if request.HasField("expires_in"):
            raise InvalidChangeError("expires_in: a canary ends by its settings' patience")
        champion = self._deployment.champion_version
        if not champion:
            raise ChangeRefusedError(
                "no champion has answered yet: there is nothing to compare a canary with"
                + ("" if self._model == DEFAULT else f" (`pretrade models alias champion … --model {self._model}`)")
            )
        version = await self._resolve(request.model_version)
        try:
            canary = Canary.start(
                self._new_id(),
                version,
                champion,
                steps,
                author,
                request.reason,
                self._wall_seconds(),
                request.instrument,
                request.strategy,
            )
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            raise InvalidChangeError(f"{wrong['loc'][0]}: {PATTERN_RULE}") from None
        if request.dry_run:
            change = await self._put(request, author, self._canary_subject, canary.model_dump_json())
            return pb.StartCanaryResponse(canary=self._message(canary, checks=False), change=change)
        self._expect(request)
        change = await _refused(self._rollout.start(canary))
        return pb.StartCanaryResponse(canary=self._message(self._rollout.canary or canary), change=change)

    async def set_weight(self, request: pb.SetCanaryWeightRequest, author: str) -> pb.SetCanaryWeightResponse:
        """Sets the canary's share by hand."""
        if not 0 <= request.weight <= 1:
            raise InvalidChangeError("weight: must be 0 to 1")
        before = self._running()
        after = before.weighted(request.weight, request.hold, self._wall_seconds())
        # Made of the canary as it is known here: one that another server has just rolled back stays out.
        made = self._put(request, author, self._canary_subject, after.model_dump_json(), unchanged=True)
        if request.dry_run:
            change = await made
        else:
            change = await self._rollout.turn("weighted", before, after, author, request.reason, made)
        return pb.SetCanaryWeightResponse(canary=self._message(after), change=change)

    async def promote(self, request: pb.PromoteCanaryRequest, author: str) -> pb.PromoteCanaryResponse:
        """Makes the canary the champion now."""
        canary = self._running()
        if request.dry_run:
            change = await self._put(request, author, self._champion_subject, canary.model_version)
        else:
            self._expect(request)
            change = await _refused(self._rollout.promote(canary, author, request.reason))
        return pb.PromoteCanaryResponse(canary=self._message(self._rollout.canary or canary), change=change)

    async def abort(self, request: pb.AbortCanaryRequest, author: str) -> pb.AbortCanaryResponse:
        """Ends the canary."""
        canary = self._running()
        if request.dry_run:
            after = canary.ended("aborted", request.reason, self._wall_seconds())
            change = await self._put(request, author, self._canary_subject, after.model_dump_json())
        else:
            self._expect(request)
            change = await self._rollout.end(canary, "aborted", author, request.reason)
        return pb.AbortCanaryResponse(canary=self._message(self._rollout.canary or canary), change=change)

    async def roll_back(self, request: pb.RollBackRequest, author: str) -> pb.RollBackResponse:
        """Makes the champion's predecessor the champion again."""
        canary = self._rollout.canary
        if canary is not None and canary.running:
            raise ChangeRefusedError(f"canary {canary.canary_id} is under way; abort it first")
        before = self._deployment.champion_version
        version = await self._resolve("previous")
        change = await self._make_champion(request, author, version)
        return pb.RollBackResponse(previous_version=before, model_version=version, change=change)

    async def list_models(self, others: Sequence[CanarySteering] = ()) -> pb.ListModelsResponse:
        """Every version in the registry, which all models share.

        Args:
            others: Those of the other models, for their aliases and replicas.
        """
        try:
            registry = self._deployment.registry
        except DeploymentError as error:
            raise ChangeRefusedError(str(error)) from None
        models = (self, *others)
        loaded = {name: versions for one in models for name, versions in (await one.loaded()).items()}

        def described() -> list[pb.ModelVersion]:
            aliases = {alias: version for one in models for alias, version in one.aliases().items()}
            return [_model(record, registry.standing(record.version), aliases, loaded) for record in registry.records()]

        return pb.ListModelsResponse(models=await asyncio.to_thread(described))

    async def card(self, version: str) -> pb.GetModelCardResponse:
        """What was measured of a version before it decided."""
        try:
            registry = self._deployment.registry
            return await asyncio.to_thread(card_of, registry, version)
        except DeploymentError as error:
            raise ChangeRefusedError(str(error)) from None
        except ModelUnknownError as error:
            raise UnknownSubjectError(str(error)) from None

    async def loaded(self) -> dict[str, list[str]]:
        """The versions that each of its replicas has loaded."""
        loader = self._deployment.loader
        return {name: await loader.loaded(replica) for name, replica in self._replicas.items()}

    def aliases(self) -> dict[str, str]:
        """The version of each of its aliases, which follow its name where it is not the default model. Blocks."""
        found = _aliases(self._deployment.registry, self._deployment.champion_version)
        return {qualified(self._model, alias): version for alias, version in found.items()}

    @property
    def champion_version(self) -> str:
        """The version that decides without a canary; empty while none is known."""
        return self._deployment.champion_version

    def standing_of_model(self) -> pb.NamedModel:
        """What is known of the model in one line."""
        champions = [replica for role in self._replicas.champions for replica in role.replicas]
        version = self._deployment.champion_version
        champion = self._until_expiry(pb.ChampionStatus(model_version=version))
        return pb.NamedModel(
            name=self._model,
            champion_version=version,
            expires_in=champion.expires_in if champion.HasField("expires_in") else None,
            feature_set=model_sets.of(version).version if version else "",
            available=any(replica.available and replica.healthy for replica in champions),
            canary=self.current(),
        )

    async def champion(self) -> pb.ChampionStatus | None:
        """The version that decides without a canary, and how good it is known to be."""
        version = self._deployment.champion_version
        if not version:
            return None
        if self._champion.model_version != version:
            try:
                registry = self._deployment.registry
            except DeploymentError:
                return self._until_expiry(pb.ChampionStatus(model_version=version, standing=NOT_MEASURED))
            standing = await asyncio.to_thread(registry.standing, version)
            self._champion = pb.ChampionStatus(
                model_version=version, standing=standing.text, card=str(standing.card or "")
            )
        return self._until_expiry(self._champion)

    def _until_expiry(self, champion: pb.ChampionStatus) -> pb.ChampionStatus:
        """With how long it may still decide."""
        served = (one.model for one in self._replicas.values() if one.model is not None)
        expires_at = next((one.expires_at for one in served if one.version == champion.model_version), 0)
        left = self._expiry.left_seconds(expires_at)
        champion.ClearField("expires_in")
        if left is not None:
            champion.expires_in.CopyFrom(duration(left))
        return champion

    async def load_model(self, request: pb.LoadModelRequest, author: str) -> pb.LoadModelResponse:
        """Loads a version; it gets no orders by that."""
        known = self._replicas.names
        asked = [name if name in known else qualified(self._model, name) for name in request.replicas]
        names = asked or [role.name for role in self._replicas.champions]
        if unknown := set(names) - set(known):
            raise UnknownSubjectError(f"replicas: {', '.join(sorted(unknown))}; one of {', '.join(known)}")
        version = await self._resolve(request.model_version)
        if not request.dry_run:
            await _refused(self._deployment.load(version, [self._replicas.find(name) for name in names]))
        change = await self._beside(request, author, version, "", f"loaded on {', '.join(names)}")
        return pb.LoadModelResponse(model=await self._known(version), change=change)

    async def set_alias(self, request: pb.SetModelAliasRequest, author: str) -> pb.SetModelAliasResponse:
        """Points an alias at a version; that of the champion makes it decide, loaded and checked."""
        if request.alias not in ALIASES:
            raise InvalidChangeError(f"alias: one of {', '.join(ALIASES)}")
        version = await self._resolve(request.model_version)
        if request.alias == "champion":
            change = await self._make_champion(request, author, version)
        else:
            registry = self._deployment.registry
            previous = registry.aliases().get(request.alias, "")
            if not request.dry_run:
                self._expect(request)
                await _refused(asyncio.to_thread(registry.set_alias, request.alias, version))
            change = await self._beside(request, author, request.alias, previous, version)
        return pb.SetModelAliasResponse(model=await self._known(version), change=change)

    async def _make_champion(self, request: Asking, author: str, version: str) -> pb.Change:
        if request.dry_run:
            return await self._put(request, author, self._champion_subject, version)
        self._expect(request)
        return await _refused(self._deployment.make_champion(version, author, request.reason))

    async def _resolve(self, version_or_alias: str) -> str:
        try:
            return await asyncio.to_thread(self._deployment.registry.resolve, version_or_alias)
        except ModelUnknownError as error:
            raise UnknownSubjectError(str(error)) from None
        except DeploymentError as error:
            raise ChangeRefusedError(str(error)) from None

    async def _known(self, version: str) -> pb.ModelVersion:
        registry, loaded = self._deployment.registry, await self.loaded()

        def described() -> pb.ModelVersion:
            return _model(registry.describe(version), registry.standing(version), self.aliases(), loaded)

        return await asyncio.to_thread(described)

    def _running(self) -> Canary:
        canary = self._rollout.canary
        if canary is None or not canary.running:
            raise ChangeRefusedError("no canary is under way")
        return canary

    def _expect(self, request: Asking) -> None:
        """Refuses a change that was meant for another state; what takes long is checked before it begins."""
        if request.HasField("expected_control_version") and request.expected_control_version != self._control.version:
            raise ControlChangedError(self._control.version, request.expected_control_version)

    async def _put(self, request: Asking, author: str, subject: str, value: str, unchanged: bool = False) -> pb.Change:
        """Changes the control state; with `unchanged` only if no server has changed it meanwhile."""
        expected = request.expected_control_version if request.HasField("expected_control_version") else None
        if expected is None and unchanged:
            expected = self._control.version
        return await self._control.change(
            Wanted(
                subject,
                value,
                author,
                request.reason,
                expected_version=expected,
                needs_all=unchanged,
                dry_run=request.dry_run,
            )
        )

    async def _beside(
        self,
        request: pb.LoadModelRequest | pb.SetModelAliasRequest,
        author: str,
        what: str,
        previous: str,
        value: str,
    ) -> pb.Change:
        """Records what was done to a model, or would be, that is no part of the control state."""
        what = qualified(self._model, what)
        change = pb.Change(
            subject=f"model/{what}",
            previous=previous,
            value=value,
            previous_version=self._control.version,
            version=self._control.version,
            diff=[f"model/{what}: {f'{previous} → ' if previous else ''}{value}"],
            author=author,
            reason=request.reason,
            dry_run=request.dry_run,
        )
        if not request.dry_run:
            change.change_id = self._new_id()
            await self._control.record(change)
        return change

    def _message(self, canary: Canary, checks: bool = True) -> pb.Canary:
        message = pb.Canary(
            canary_id=canary.canary_id,
            model_version=canary.model_version,
            champion_version=canary.champion_version,
            state=_STATES[canary.state],
            weight=canary.weight,
            steps=canary.steps,
            step=canary.step,
            held=canary.held,
            started_at=_instant(canary.started_at),
            step_started_at=_instant(canary.step_started_at),
            author=canary.author,
            reason=canary.reason,
            model="" if self._model == DEFAULT else self._model,
            instrument=canary.instrument,
            strategy=canary.strategy,
        )
        if canary.ended_at is not None:
            message.ended_at.CopyFrom(_instant(canary.ended_at))
        known = self._rollout.canary
        if known is not None and known.canary_id == canary.canary_id:
            evidence = self._rollout.evidence
            message.decisions = self._rollout.decisions
            message.flows, message.canary_flows = self._rollout.flows
            message.verdict = _VERDICTS[evidence.verdict]
            message.verdict_reason = canary.ending or evidence.reason
            if checks:
                message.checks.extend(_check(check) for check in evidence.checks.values())
        return message


async def _refused(work: Awaitable[T]) -> T:
    """What comes of it, or a refusal in the control state's words."""
    try:
        return await work
    except ModelUnknownError as error:
        raise UnknownSubjectError(str(error)) from error
    except (CanaryError, DeploymentError, LoadError, ModelUnusableError, OSError) as error:
        raise ChangeRefusedError(str(error)) from error


def _check(check: Check) -> pb.CanaryCheck:
    message = pb.CanaryCheck(
        name=check.name,
        verdict=_VERDICTS[check.verdict],
        limit=check.tolerance,
        samples=check.samples,
        minimum_samples=check.minimum,
        detail=str(check),
    )
    if check.samples:
        message.canary, message.champion = check.canary, check.champion
    return message


def _history(history: EvidenceHistory) -> pb.CanaryHistory | None:
    if not history.at_ns:
        return None
    checks = (
        pb.CanaryCheckHistory(name=name, samples=one.samples, canary=one.canary, champion=one.champion)
        for name, one in history.checks.items()
    )
    return pb.CanaryHistory(at_ns=history.at_ns, weight=history.weight, checks=checks)


def _aliases(registry: Registry, champion: str) -> dict[str, str]:
    """The aliases as they are true now, when this version decides without a canary; empty while none is known.

    The registry's alias `champion` only says what a model server is started with, and its candidate stays one when it
    has become the champion.
    """
    aliases = dict(registry.aliases())
    if champion:
        aliases["champion"] = champion
    if aliases.get(CANDIDATE) in (aliases.get("champion"), aliases.get("previous")):
        aliases.pop(CANDIDATE, None)
    return aliases


def _model(
    record: ModelRecord, standing: Standing, aliases: Mapping[str, str], loaded: Mapping[str, list[str]]
) -> pb.ModelVersion:
    message = pb.ModelVersion(
        model_version=record.version,
        name=record.name,
        aliases=[alias for alias, version in aliases.items() if version == record.version],
        loaded_on=[name for name, versions in loaded.items() if record.version in versions],
        feature_set=record.feature_set,
        threshold=record.threshold,
        created_at=_instant(record.created_at),
        problem=record.problem,
        kind=record.kind,
        standing=standing.text,
        card=str(standing.card or ""),
    )
    if record.expires_at:
        message.expires_at.CopyFrom(_instant(record.expires_at))
    return message


def _instant(seconds: float) -> Timestamp:
    message = Timestamp()
    message.FromNanoseconds(math.floor(seconds * 1e9))
    return message
