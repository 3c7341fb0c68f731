"""Where the models are served, and in which protocol."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from server.inference.codec import ProtocolName
from server.inference.oip import OpenInferenceSettings
from server.security.settings import ClientTlsSettings

_ENDPOINT = r"(dns://[^\s/@,]+/)?[^\s:/@,]+:\d{1,5}"
Endpoint = Annotated[str, Field(pattern=rf"^{_ENDPOINT}$")]
"""`host:port`, or `dns://server:port/host:port` to ask a name server other than the machine's."""
EACH: Final = "each://"
_LIST = rf"{_ENDPOINT}(,{_ENDPOINT})*"
_SEVERAL = rf"({EACH}[^\s:/@,]+:\d{{1,5}}|{_LIST})"
Endpoints = Annotated[str, Field(pattern=rf"^{_SEVERAL}$")]
"""One endpoint, or several with commas between them, or `each://host:port` for every address of a name."""
ListedEndpoints = Annotated[str, Field(pattern=rf"^{_LIST}$")]
"""One endpoint, or several with commas between them."""
ReplicaName = Literal["primary", "secondary", "challenger"]
EndpointName = Annotated[str, Field(pattern=r"^(primary|secondary|challenger)(-\d{1,2})?$")]
"""A role, or one of its endpoints: `primary-2`."""
_ROLES: tuple[ReplicaName, ...] = get_args(ReplicaName)
_T = TypeVar("_T")


class OtherChallenger(BaseModel):
    """A challenger besides the first, which gets shadow rows and nothing else."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint: Endpoint
    """`host:port` of its gRPC inference service."""
    model: str = Field(default="challenger", pattern="^[!-~]{1,64}$")
    """Name of its model."""
    tls: ClientTlsSettings | None = None
    """TLS to it, with the fields of `replicas.tls`; unset: none."""


class ReplicaEndpoints(BaseModel):
    """Where the models are served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    primary: Endpoints = "127.0.0.1:7070"
    """`host:port` of the primary's gRPC inference service; `dns://server/host:port` asks another name server. Several
    with commas between them are a pool: orders go to whichever is quickest, past those that are dead or slow.
    `each://host:port` is a pool of all addresses that the host has, looked up again every five seconds."""
    secondary: Annotated[str, Field(pattern=rf"^{_SEVERAL}?$")] = "127.0.0.1:7170"
    """`host:port` of the secondary's gRPC inference service, or several. Empty: none, where the primary has several."""
    challenger: Endpoints = "127.0.0.1:7270"
    """`host:port` of the challenger's gRPC inference service, or several. The challenger only scores shadow rows and
    canaries."""
    primary_protocol: ProtocolName = "torchserve"
    """Protocol of the primary: `torchserve`, or `oip`, the Open Inference Protocol of Triton, KServe and MLServer; see
    the section `oip`."""
    secondary_protocol: ProtocolName = "torchserve"
    """Protocol of the secondary, likewise."""
    challenger_protocol: ProtocolName = "torchserve"
    """Protocol of the challenger, likewise."""
    champion_model: str = Field(default="champion", pattern="^[!-~]{1,64}$")
    """Name of the model on primary and secondary."""
    challenger_model: str = Field(default="challenger", pattern="^[!-~]{1,64}$")
    """Name of the model on the challenger."""
    other_challengers: Mapping[Annotated[str, Field(pattern="^challenger-[a-z0-9-]{1,32}$")], OtherChallenger] = {}
    """Further challengers by name, `challenger-…`; a JSON object. Set it to compare several models on the same
    orders."""
    champion_version: str | None = Field(default=None, pattern="^[0-9a-f]{16}$")
    """The only champion version whose scores are used, 16 hex digits. Set it to pin a version. Unset: the version that
    was promoted last, or else the one that the replicas serve."""
    management: Mapping[ReplicaName, ListedEndpoints] = {}
    """`host:port` of each TorchServe's gRPC management service, as a JSON object by replica (`primary`, `secondary`,
    `challenger`); of a replica with several endpoints as many, in the same order. Of a replica that speaks `oip` it is
    its gRPC service again, which has the model repository API. Of one that is `each://host:port` only the port counts,
    at the address of each endpoint. The server loads versions there; if the name has several addresses, at each of
    them. Set it for canaries and promotions. The server loads nothing into a replica that is not named."""
    tls: Mapping[ReplicaName, ClientTlsSettings] = {}
    """TLS to inference and management service: a JSON object by replica, whose values are objects of `ca`,
    `certificate`, `key` (paths) and `server_name`. Set it for every replica outside this machine or pod. A replica that
    is not named is called without TLS."""
    token_files: Mapping[EndpointName, Path] = {}
    """The `key_file.json` of each TorchServe that requires its tokens, as a JSON object by replica; of a replica with
    several endpoints `primary-1`, `primary-2` and so on."""

    @model_validator(mode="after")
    def _pools_fit(self) -> ReplicaEndpoints:
        for role in _ROLES:
            addresses = list(self.named(role).values())
            if twice := {one for one in addresses if addresses.count(one) > 1}:
                raise ValueError(f"{role}: {', '.join(sorted(twice))} is named twice")
            managed, each = self.management.get(role), self.each(role)
            named = 1 if each else len(addresses)
            if managed is not None and managed.count(",") + 1 != named:
                raise ValueError(f"management: {role} has {named} endpoints, and must have as many here")
            if each and any(name.partition("-")[0] == role for name in self.token_files):
                raise ValueError(f"token_files: {role} is {EACH}{each}, whose servers cannot each have a file")
        if not self.secondary and len(self.named("primary")) < 2 and not self.each("primary"):
            raise ValueError("secondary: may be empty only where primary has several endpoints")
        return self

    def each(self, role: ReplicaName) -> str:
        """The `host:port` whose addresses serve a role; empty where its endpoints are listed."""
        endpoints: str = getattr(self, role)
        return endpoints.removeprefix(EACH) if endpoints.startswith(EACH) else ""

    def named(self, role: ReplicaName) -> dict[str, str]:
        """The endpoints of a role by name: the role's own, or `primary-1`, `primary-2` and so on where it has more.

        None where they have to be looked up.
        """
        return _named(role, getattr(self, role))

    def managed(self) -> dict[str, str]:
        """The management services by the names of the endpoints; none of those that have to be looked up."""
        listed = {role: all_ for role, all_ in self.management.items() if not self.each(role)}
        return {name: one for role, all_ in listed.items() for name, one in _named(role, all_).items()}

    def loaded_as(self) -> set[tuple[str, str]]:
        """Where versions are loaded and unloaded: each management service, and what the model is called there."""
        return {
            (f"{self.each(role)} ({one})" if self.each(role) else one, name)
            for role, services in self.management.items()
            for name in (self.challenger_model if role == "challenger" else self.champion_model,)
            for one in services.split(",")
        }


class NamedModel(BaseModel):
    """A model besides the default one, which the model map gives orders to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    primary: Endpoints | None = None
    """`host:port` of its primary's gRPC inference service, or several. Unset: the primary of the section `replicas`,
    whose model servers then host both models."""
    secondary: Annotated[str, Field(pattern=rf"^{_SEVERAL}?$")] | None = None
    """The same for its secondary."""
    challenger: Endpoints | None = None
    """The same for its challenger, where its canaries are served."""
    primary_protocol: ProtocolName | None = None
    """Protocol of its own primary, as `replicas.primary_protocol`; unset: `torchserve`. One that it shares speaks what
    `replicas` says."""
    secondary_protocol: ProtocolName | None = None
    """Protocol of its own secondary, likewise."""
    challenger_protocol: ProtocolName | None = None
    """Protocol of its own challenger, likewise."""
    oip: OpenInferenceSettings = OpenInferenceSettings()
    """As the section `oip`, for this model alone: what is left out is as that section says, but for the descriptions.
    The challenger's is that of the champion, unless it is given. Without any its versions are those of the registry,
    and the first one is named by `pretrade models alias champion`."""
    served_as: str | None = Field(default=None, pattern="^[!-~]{1,64}$")
    """Its name on its model servers, which decisions bear; unset: its name in these settings. Where versions are loaded
    (`management`), no other model may have it: each would unload the versions of the other."""
    champion_version: str | None = Field(default=None, pattern="^[0-9a-f]{16}$")
    """As `replicas.champion_version`."""
    management: Mapping[ReplicaName, ListedEndpoints] = {}
    """As `replicas.management`, which holds for the replicas that it shares."""
    tls: Mapping[ReplicaName, ClientTlsSettings] = {}
    """As `replicas.tls`, likewise."""
    token_files: Mapping[EndpointName, Path] = {}
    """As `replicas.token_files`, likewise."""

    def endpoints(self, name: str, shared: ReplicaEndpoints) -> ReplicaEndpoints:
        """Where it is served: at endpoints of its own, or at those that the default model has.

        Raises:
            ValueError: That does not fit together.
        """
        own = {role for role in _ROLES if getattr(self, role) is not None}
        served_as = self.served_as or name
        fields: dict[str, Any] = {role: getattr(self if role in own else shared, role) for role in _ROLES}
        fields |= {f"{role}_protocol": self._protocol(role, shared) for role in _ROLES}
        fields |= {
            "champion_model": served_as,
            "challenger_model": served_as,
            "champion_version": self.champion_version,
            "management": _shared(shared.management, own) | dict(self.management),
            "tls": _shared(shared.tls, own) | dict(self.tls),
            "token_files": _shared(shared.token_files, own) | dict(self.token_files),
        }
        return ReplicaEndpoints.model_validate(fields)

    def open_inference(self, name: str, shared: OpenInferenceSettings) -> OpenInferenceSettings:
        """What its replicas that speak the Open Inference Protocol need.

        The default model's descriptions say nothing of this model, nor do Triton's configurations of other models.

        Raises:
            ValueError: That does not fit together.
        """
        served_as = self.served_as or name
        configs = {model: path for model, path in shared.triton_configs.items() if model == served_as}
        described = {"champion": None, "challenger": self.oip.champion}
        others = {**shared.model_dump(), **described, "triton_configs": configs}
        return OpenInferenceSettings.model_validate(others | self.oip.model_dump(exclude_unset=True))

    def _protocol(self, role: ReplicaName, shared: ReplicaEndpoints) -> ProtocolName:
        own: ProtocolName | None = getattr(self, f"{role}_protocol")
        if getattr(self, role) is not None:
            return own or "torchserve"
        spoken: ProtocolName = getattr(shared, f"{role}_protocol")
        if own not in (None, spoken):
            raise ValueError(f"{role}_protocol: {own}, but its {role} is that of replicas, which speaks {spoken}")
        return spoken


def _shared(by_replica: Mapping[Any, _T], own: Collection[str]) -> dict[Any, _T]:
    """What is said of replicas whose roles are not among these."""
    kept: dict[Any, _T] = {name: one for name, one in by_replica.items() if name.partition("-")[0] not in own}
    return kept


def role_of(replica: str) -> str:
    """The role of a replica by its name: `primary` for `primary-2` and for `scalper/primary`."""
    name = replica.rpartition("/")[2]
    role, _, number = name.rpartition("-")
    return role if number.isdecimal() else name


def _named(role: str, endpoints: str) -> dict[str, str]:
    if endpoints.startswith(EACH):
        return {}
    several = endpoints.split(",") if endpoints else []
    if len(several) == 1:
        return {role: endpoints}
    return {f"{role}-{number}": endpoint for number, endpoint in enumerate(several, 1)}
