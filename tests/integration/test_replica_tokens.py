"""TorchServe's own tokens: shown by the server, of no use to others, read again after a restart."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest
from support.harness import eventually

from feature_cache.features import N_FEATURES
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.wire.torchserve import inference_pb2, inference_pb2_grpc, management_pb2, management_pb2_grpc
from server.inference.breaker import BreakerSettings
from server.inference.outcome import BatchFailedError
from server.inference.replica import Replica, ReplicaLimits, ReplicaSettings
from server.inference.token import ReplicaToken
from server.models.loading import ModelLoader
from server.security.private import write_private

pytestmark = pytest.mark.stack
_ROW = bytes(4 * N_FEATURES)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, model_store: Path) -> Iterator[Stack]:
    settings = LocalSettings(dir=tmp_path_factory.mktemp("tokens"), model_store=model_store, replica_tokens=True)
    with Stack(settings, parts={"challenger"}) as stack:
        yield stack


def code(stack: Stack, metadata: tuple[tuple[str, str], ...]) -> tuple[grpc.StatusCode, grpc.StatusCode]:
    """What a call for a score, and one for the models, end with."""
    codes = []
    request = inference_pb2.PredictionsRequest(model_name="challenger", input={"input": _ROW})
    look = management_pb2.DescribeModelRequest(model_name="challenger")
    with grpc.insecure_channel(str(stack.endpoints.challenger)) as channel:
        call = inference_pb2_grpc.InferenceAPIsServiceStub(channel).Predictions.future(
            request, timeout=10, metadata=metadata
        )
        codes.append(call.code())
    with grpc.insecure_channel(stack.endpoints.management["challenger"]) as channel:
        managed = management_pb2_grpc.ManagementAPIsServiceStub(channel).DescribeModel.future(
            look, timeout=10, metadata=metadata
        )
        codes.append(managed.code())
    return codes[0], codes[1]


@pytest.mark.long
async def test_the_server_shows_its_tokens_and_others_have_none(stack: Stack) -> None:
    path = Path(stack.endpoints.token_files["challenger"])
    denied, fine = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.OK
    token = ReplicaToken("challenger", path, lambda: 0.0)
    assert code(stack, ()) == (denied, denied)
    assert code(stack, (("authorization", "Bearer guess"),)) == (denied, denied)
    assert code(stack, token.inference) == (fine, denied)
    assert code(stack, token.management) == (denied, fine)
    assert token.problem == ""

    limits = ReplicaLimits(ReplicaSettings(probe_interval_seconds=0.1), breaker=BreakerSettings(slow_seconds=5.0))
    clock = asyncio.get_running_loop().time
    endpoint = str(stack.endpoints.challenger)
    opened = partial(Replica, "challenger", endpoint, "challenger", None, limits, clock=clock, random=lambda: 0.5)
    async with opened(token=token) as replica, opened() as stranger:
        await asyncio.wait_for(replica.proven.wait(), 30)
        loader = ModelLoader(stack.endpoints.management, "{version}.mar", timeout_seconds=60.0)
        assert replica.model is not None
        assert await loader.loaded(replica) == [replica.model.version]
        assert await loader.loaded(stranger) == []
        with pytest.raises(BatchFailedError, match="Token"):
            await stranger._score([_ROW])
        before = token.inference
        await asyncio.to_thread(stack.restart, "challenger")
        await asyncio.to_thread(
            eventually, lambda: token.inference != before and replica.healthy, bool, patience_seconds=60
        )
        assert code(stack, before) == (denied, denied), "the old ones are over"


@pytest.mark.long
def test_the_key_file_is_for_its_owner_alone(stack: Stack) -> None:
    assert Path(stack.endpoints.token_files["challenger"]).stat().st_mode & 0o077 == 0


def test_a_key_file_that_cannot_be_read_leaves_the_last_tokens(tmp_path: Path) -> None:
    path = tmp_path / "key_file.json"
    now = 1_800_000_001.0
    token = ReplicaToken("primary", path, lambda: now)
    assert (token.inference, token.problem) == ((), "no tokens of TorchServe: FileNotFoundError")
    entry = {"key": "k1", "expiration time": "2027-01-15T08:00:00.123456789Z"}
    keys = {"inference": entry, "management": entry | {"key": "k2"}, "API": {"key": "k3"}}
    write_private(path, json.dumps(keys))
    token.read()
    assert token.inference == (("authorization", "Bearer k1"),)
    assert token.management == (("authorization", "Bearer k2"),)
    assert "have expired" in token.problem
    for bad in ("", "{", "[]", '{"inference": 7}', json.dumps(keys | {"inference": {"key": 7}})):
        path.write_text(bad)
        token.read()
        assert token.inference == (("authorization", "Bearer k1"),)
        assert token.problem.startswith("no tokens"), bad
        assert "k1" not in token.problem
