"""Feature flags, evaluated through the OpenFeature SDK whenever something changed and never while deciding.

The default provider answers from the control state. The setting `control.flag_provider` replaces it by any other
provider for the SDK (flagd, LaunchDarkly, ConfigCat, …). Such a provider's flags are evaluated in a thread: when it
says that they changed, and once a second.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import structlog
from openfeature import api
from openfeature.evaluation_context import EvaluationContext
from openfeature.event import EventDetails, ProviderEvent
from openfeature.exception import FlagNotFoundError, TypeMismatchError
from openfeature.flag_evaluation import FlagResolutionDetails, FlagValueType, Reason
from openfeature.provider import AbstractProvider, FeatureProvider, Metadata

_log = structlog.get_logger(__name__)

FLAGS: Final = {
    "shadow": "Mirror decided rows to the challenger.",
    "cached_score": "Let the last good score answer when no model can.",
    "embedded": "Let the champion in the server's own process answer.",
    "out_of_domain": "Let no score trade whose features are not such as the model has seen.",
    "uncertain": "Let no score trade that lies in the model's conformal band.",
}
"""Every flag and what it does."""
OURS: Final = "control"
"""Name of our provider."""
_START_SECONDS: Final = 5.0
_EVALUATE_SECONDS: Final = 1.0
_domains: Final = (f"pretrade-{number}" for number in itertools.count())


class ControlProvider(AbstractProvider):
    """Boolean flags from the control state.

    Args:
        value_of: A flag's value; None for no such flag.
    """

    def __init__(self, value_of: Callable[[str], bool | None]) -> None:
        super().__init__()
        self._value_of = value_of

    def get_metadata(self) -> Metadata:
        """Our name."""
        return Metadata(name=OURS)

    def resolve_boolean_details(
        self, flag_key: str, default_value: bool, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[bool]:
        """The flag's value in force."""
        value = self._value_of(flag_key)
        if value is None:
            raise FlagNotFoundError(f"no flag {flag_key}")
        return FlagResolutionDetails(value, reason=Reason.STATIC, variant="on" if value else "off")

    def resolve_string_details(
        self, flag_key: str, default_value: str, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[str]:
        """Refused: every flag is a boolean."""
        raise TypeMismatchError(_BOOLEAN_ONLY)

    def resolve_integer_details(
        self, flag_key: str, default_value: int, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[int]:
        """Refused: every flag is a boolean."""
        raise TypeMismatchError(_BOOLEAN_ONLY)

    def resolve_float_details(
        self, flag_key: str, default_value: float, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[float]:
        """Refused: every flag is a boolean."""
        raise TypeMismatchError(_BOOLEAN_ONLY)

    def resolve_object_details(
        self,
        flag_key: str,
        default_value: Sequence[FlagValueType] | Mapping[str, FlagValueType],
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[Sequence[FlagValueType] | Mapping[str, FlagValueType]]:
        """Refused: every flag is a boolean."""
        raise TypeMismatchError(_BOOLEAN_ONLY)


_BOOLEAN_ONLY: Final = "every flag of pretrade is a boolean"


class Flags:
    """The flags' values in force, as a provider says.

    Args:
        defaults: Value of a flag that the provider does not know.
        provider: Ours, or another.
        on_change: Called with the new values when one of them differs.
        options: What the provider was made with. None of their texts is shown, even if the provider's error message has
            it.
    """

    def __init__(
        self,
        defaults: Mapping[str, bool],
        provider: FeatureProvider,
        on_change: Callable[[Mapping[str, bool]], None],
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._defaults = defaults
        self._options = options
        self._provider = provider
        self._on_change = on_change
        self._domain = next(_domains)
        self._client = api.get_client(self._domain)
        self.values: Mapping[str, bool] = dict(defaults)
        self.problem = ""
        """Why the provider does not say what a flag is; empty when it does."""
        if self.is_ours:
            api.set_provider_and_wait(provider, self._domain)  # answers at once
        else:
            # The SDK would log what the provider raises, whatever that names; what matters is in our own lines.
            logging.getLogger("openfeature").setLevel(logging.CRITICAL)

    @property
    def provider_name(self) -> str:
        """Who says what a flag is."""
        return self._provider.get_metadata().name

    @property
    def is_ours(self) -> bool:
        """True when the control state says what a flag is."""
        return isinstance(self._provider, ControlProvider)

    def evaluate(self) -> None:
        """Asks the provider for every flag. Ours answers at once; another one may block."""
        self._take(self._evaluated())

    async def run(self) -> None:
        """Follows a provider that is not ours, until cancelled."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def notify(_details: EventDetails) -> None:
            loop.call_soon_threadsafe(changed.set)

        while not await self._started():  # noqa: ASYNC110 - the provider's start is asked for, not waited for
            await asyncio.sleep(_EVALUATE_SECONDS)
        self._client.add_handler(ProviderEvent.PROVIDER_CONFIGURATION_CHANGED, notify)
        try:
            while True:
                self._take(await asyncio.to_thread(self._evaluated))
                changed.clear()
                try:
                    async with asyncio.timeout(_EVALUATE_SECONDS):
                        await changed.wait()
                except TimeoutError:
                    continue
        finally:
            self._client.remove_handler(ProviderEvent.PROVIDER_CONFIGURATION_CHANGED, notify)

    async def _started(self) -> bool:
        try:
            async with asyncio.timeout(_START_SECONDS):
                await asyncio.to_thread(api.set_provider_and_wait, self._provider, self._domain)
        except Exception as error:  # whatever another provider raises: flags stay as they are
            self._note(f"{self.provider_name}: {type(error).__name__}: {error}")
            return False
        return True

    def _evaluated(self) -> tuple[dict[str, bool], str]:
        values, problem = {}, ""
        for name, default in self._defaults.items():
            details = self._client.get_boolean_details(name, self.values.get(name, default))
            values[name] = details.value
            if details.error_code is not None:
                problem = f"{self.provider_name}: {name}: {details.error_code} {details.error_message or ''}".rstrip()
        return values, problem

    def _take(self, evaluated: tuple[dict[str, bool], str]) -> None:
        values, problem = evaluated
        self._note(problem)
        if values != self.values:
            self.values = values
            self._on_change(values)

    def _note(self, problem: str) -> None:
        problem = _without(self._options, problem)
        if problem and not self.problem:
            _log.warning("flags stay as they are", problem=problem)
        self.problem = problem


class FlagProviderError(Exception):
    """There is no such provider of flags."""


def _texts(options: Any) -> Iterator[str]:
    """Every text among the options of a provider: an SDK key may be any of them."""
    match options:
        case str():
            yield options
        case Mapping():
            for one in options.values():
                yield from _texts(one)
        case list() | tuple():
            for one in options:
                yield from _texts(one)


def _without(options: Any, text: str) -> str:
    """A text of the provider's, without the texts among the options."""
    # The longest first: if another option is part of a key, the rest of the key would be shown.
    for one in sorted(filter(None, _texts(options)), key=len, reverse=True):
        text = text.replace(one, "…")
    return text


def provider_from(path: str, options: Mapping[str, Any]) -> FeatureProvider:
    """The provider that `module:callable` makes with these options.

    Raises:
        FlagProviderError: There is no such callable, or it refuses.
    """
    module, _, name = path.partition(":")
    try:
        provider = getattr(importlib.import_module(module), name)(**options)
    except Exception as error:  # whatever somebody else's provider raises
        # From None: what it was given must not be in a traceback either.
        raise FlagProviderError(f"control.flag_provider: {path}: {_without(options, str(error))}") from None
    if not callable(getattr(provider, "resolve_boolean_details", None)):
        raise FlagProviderError(f"control.flag_provider: {path} makes no OpenFeature provider")
    return provider  # type: ignore[no-any-return]  # has what a provider has
