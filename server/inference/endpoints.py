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
    """`host:port` of the secondary's gRPC inference service."""
    challenger: Endpoint = "127.0.0.1:7270"
    """`host:port` of the challenger's gRPC inference service. The challenger only scores shadow rows and canaries."""
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
    management: Mapping[ReplicaName, Endpoint] = {}
    """`host:port` of each TorchServe's gRPC management service, as a JSON object by replica (`primary`, `secondary`,
    `challenger`). The server loads versions there; if the name has several addresses, at each of them. Set it for
    canaries and promotions. The server loads nothing into a replica that is not named."""
    tls: Mapping[ReplicaName, ClientTlsSettings] = {}
    """TLS to inference and management service: a JSON object by replica, whose values are objects of `ca`,
    `certificate`, `key` (paths) and `server_name`. Set it for every replica outside this machine or pod. A replica that
    is not named is called without TLS."""
    token_files: Mapping[ReplicaName, Path] = {}
    """The `key_file.json` of each TorchServe that requires its tokens, as a JSON object by replica."""
