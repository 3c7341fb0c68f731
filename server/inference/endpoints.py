"""Where the models are served, and in which protocol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.inference.codec import ProtocolName
from server.security.settings import ClientTlsSettings

Endpoint = Annotated[str, Field(pattern=r"^(dns://[^\s/@]+/)?[^\s:/@]+:\d{1,5}$")]
"""`host:port`, or `dns://server:port/host:port` to ask a name server other than the machine's."""
ReplicaName = Literal["primary", "secondary", "challenger"]


class OtherChallenger(BaseModel):
    """A challenger besides the first, which gets shadow rows and nothing else."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    endpoint: Endpoint
    """`host:port` of its gRPC inference service."""
    model: str = Field(default="challenger", pattern="^[!-~]{1,64}$")
    """Name of its model."""
    tls: ClientTlsSettings | None = None
    """TLS to it, with the fields of `replicas.tls`; unset: none."""


class ReplicaEndpoints(BaseModel):
    """Where the models are served."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    primary: Endpoint = "127.0.0.1:7070"
    """`host:port` of the primary's gRPC inference service; `dns://server/host:port` asks another name server."""
    secondary: Endpoint = "127.0.0.1:7170"
    """`host:port` of the secondary's."""
    challenger: Endpoint = "127.0.0.1:7270"
    """`host:port` of the challenger's."""
    primary_protocol: ProtocolName = "torchserve"
    """What the primary speaks: `torchserve`, or `oip`, the Open Inference Protocol of Triton, KServe and MLServer; see
    the section `oip`."""
    secondary_protocol: ProtocolName = "torchserve"
    """What the secondary speaks."""
    challenger_protocol: ProtocolName = "torchserve"
    """What the challenger speaks."""
    champion_model: str = Field(default="champion", pattern="^[!-~]{1,64}$")
    """Name of the model on primary and secondary."""
    challenger_model: str = Field(default="challenger", pattern="^[!-~]{1,64}$")
    """Name of the model on the challenger."""
    other_challengers: Mapping[Annotated[str, Field(pattern="^challenger-[a-z0-9-]{1,32}$")], OtherChallenger] = {}
    """Further challengers by name, `challenger-…`; a JSON object."""
    champion_version: str | None = Field(default=None, pattern="^[0-9a-f]{16}$")
    """The only champion version whose scores are used: 16 hex digits. Unset: what was promoted last, or else what the
    replicas serve."""
    management: Mapping[ReplicaName, Endpoint] = {}
    """`host:port` of the gRPC management service of TorchServe, as a JSON object by replica (`primary`, `secondary`,
    `challenger`): where versions are loaded while it runs, at each address where a name has several. One that is not
    named is loaded by somebody else."""
    tls: Mapping[ReplicaName, ClientTlsSettings] = {}
    """TLS to inference and management service, as a JSON object by replica, of objects of `ca`, `certificate`, `key`
    (paths) and `server_name`. One that is not named is called in the open, as fits the loopback of a pod."""
    token_files: Mapping[ReplicaName, Path] = {}
    """The `key_file.json` of each TorchServe that asks for its tokens, as a JSON object by replica."""
