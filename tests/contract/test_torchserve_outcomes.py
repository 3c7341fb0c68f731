"""Every way in which the real TorchServe fails a call is provoked, and classed by what it means.

gRPC's client and the direct one, with which a replica is asked, hear the same. And the scripted peer, which stands in
for TorchServe where that cannot be made to misbehave, speaks as TorchServe does.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
import zipfile
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, Final, Protocol

import grpc
import pytest
from support.harness import eventually
from support.scripted_peer import PeerCall, ScriptedPeer, scored
from support.waiting import until

from feature_cache import features
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.wire.torchserve.inference_pb2 import PredictionResponse, PredictionsRequest
from pretrade.wire.torchserve.inference_pb2_grpc import InferenceAPIsServiceStub
from server.inference import wire
from server.inference.codec import TORCHSERVE
from server.inference.http2_client import Http2Client
from server.inference.http2_connection import UnusableError
from server.inference.outcome import BatchFailedError, Outcome, classify
from server.models.archive import content_version

pytestmark = pytest.mark.stack

# What the worker does is the request's choice; anything else is answered with OK.
_HANDLER: Final = """
import os, time
from ts.utils.util import PredictionException

class Handler:
    def initialize(self, context):
        pass

    def handle(self, requests, context):
        command = bytes(requests[0].get("input")).rstrip(b"\\0").decode()
        if command == "raise":
            raise ValueError("a handler's mistake")
        if command == "no list":
            return 1
        if command == "two answers":
            return [b"1", b"2"]
        if command == "unserialisable":
            return [object()]
        if command == "no memory":
            raise MemoryError
        if command == "not our fault":
            raise PredictionException("not so", 400)
        if command == "exit":
            os._exit(1)
        if command == "sleep":
            time.sleep(0.3)
        if command == "too large for us":
            return [bytes(200_000)]
        if command == "too large for it":
            return [bytes(5_000_000)]
        if command == "NaN":
            return [float("nan")]
        return [b"OK"]
"""

CHANNEL_OPTIONS: Final = (("grpc.max_receive_message_length", 65_536), ("grpc.use_local_subchannel_pool", 1))


@pytest.fixture(scope="module")
def torchserve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A TorchServe whose handler does as it is told."""
    store = tmp_path_factory.mktemp("obedient")
    files = {"handler.py": _HANDLER.encode(), "metadata.json": b"{}", "weights.bin": b""}
    version = content_version(files.values())
    model = {"modelName": "champion", "handler": "handler.py", "modelVersion": version}
    manifest = {"createdOn": "01/01/1980 00:00:00", "runtime": "python", "model": model, "archiverVersion": "0.12.0"}
    with zipfile.ZipFile(store / "champion.mar", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
    settings = LocalSettings(dir=tmp_path_factory.mktemp("outcomes"), model_store=store)
    with Stack(settings, parts={"primary"}) as stack:
        yield stack


class Ask(Protocol):
    """Makes a call without waiting for its end."""

    def __call__(
        self, command: str, *, model: str = "champion", version: str = "", timeout: float = 10.0
    ) -> Callable[[], PredictionResponse]:
        """What waits for the answer; raises `grpc.RpcError`."""


def of_grpc(address: str, held: ExitStack) -> Ask:
    channel = held.enter_context(grpc.insecure_channel(address, options=CHANNEL_OPTIONS))
    stub = InferenceAPIsServiceStub(channel)

    def ask(
        command: str, *, model: str = "champion", version: str = "", timeout: float = 10.0
    ) -> Callable[[], PredictionResponse]:
        return stub.Predictions.future(asked(command, model, version), timeout=timeout).result

    return ask


def of_direct(address: str, held: ExitStack) -> Ask:
    """The direct client; as in `Replica`, gRPC's makes the calls that it cannot make now."""
    assert TORCHSERVE.method is not None
    path, read = TORCHSERVE.method
    by_grpc, loop = of_grpc(address, held), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    held.callback(loop.close)
    held.callback(thread.join)
    held.callback(loop.call_soon_threadsafe, loop.stop)
    client = Http2Client("primary", address, path, time.monotonic, random.random)

    def run(work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, loop)

    async def connect() -> None:
        client.open()
        await until(lambda: client.usable)

    run(connect()).result()
    held.callback(lambda: run(client.close()).result())

    def ask(
        command: str, *, model: str = "champion", version: str = "", timeout: float = 10.0
    ) -> Callable[[], PredictionResponse]:
        call = run(client.call(asked(command, model, version).SerializeToString(), timeout))

        def result() -> PredictionResponse:
            try:
                answer: PredictionResponse = read(call.result())
            except UnusableError:
                return by_grpc(command, model=model, version=version, timeout=timeout)()
            return answer

        return result

    return ask


def asked(command: str, model: str, version: str) -> PredictionsRequest:
    return PredictionsRequest(model_name=model, model_version=version, input={"input": command.encode()})


@pytest.fixture(params=[of_grpc, of_direct])
def ask(torchserve: Stack, request: pytest.FixtureRequest) -> Iterator[Ask]:
    """Calls it, once its worker is there."""
    with ExitStack() as held:
        ask: Ask = request.param(str(torchserve.endpoints.primary), held)
        eventually(lambda: ended(ask("well?")), lambda seen: seen[0] is grpc.StatusCode.OK)
        yield ask


def ended(call: Callable[[], PredictionResponse]) -> tuple[grpc.StatusCode, str]:
    """Status and first line of the message."""
    try:
        call()
    except (grpc.RpcError, grpc.aio.AioRpcError) as error:
        return error.code(), (error.details() or "").partition("\n")[0]
    return grpc.StatusCode.OK, ""


@pytest.mark.parametrize(
    ("command", "code", "message", "outcome"),
    [
        ("raise", "UNAVAILABLE", "Prediction failed", Outcome.MODEL_ERROR),
        ("no list", "UNAVAILABLE", "Invalid model predict output", Outcome.MODEL_ERROR),
        ("two answers", "UNAVAILABLE", "number of batch response mismatched", Outcome.MODEL_ERROR),
        ("unserialisable", "UNAVAILABLE", "Unsupported model output data type.", Outcome.MODEL_ERROR),
        ("no memory", "INTERNAL", "Out of resources", Outcome.MODEL_ERROR),
        ("not our fault", "INVALID_ARGUMENT", "not so", Outcome.MODEL_ERROR),
        ("exit", "INTERNAL", "Worker died.", Outcome.MODEL_ERROR),
        ("too large for it", "INTERNAL", "Worker died.", Outcome.MODEL_ERROR),
        ("too large for us", "RESOURCE_EXHAUSTED", "Received message larger than max", Outcome.BAD_ANSWER),
        ("x" * 5_000_000, "CANCELLED", "RST_STREAM", Outcome.TRANSPORT),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_call_that_fails_in_the_worker_is_classed_by_its_meaning(
    ask: Ask, command: str, code: str, message: str, outcome: Outcome
) -> None:
    status, told = ended(ask(command))
    assert (status.name, message in told) == (code, True), told
    assert classify(status, told) is outcome


@pytest.mark.parametrize(
    ("model", "version", "message"),
    [
        ("nope", "", "Model not found: nope"),
        ("", "", "Parameter model_name is required."),
        ("champion", "9", "Model version: 9 does not exist for model: champion"),
    ],
)
def test_a_model_that_is_not_there_is_a_model_error(ask: Ask, model: str, version: str, message: str) -> None:
    status, told = ended(ask("well?", model=model, version=version))
    assert (status, told) == (grpc.StatusCode.INTERNAL, message)
    assert classify(status, told) is Outcome.MODEL_ERROR


@pytest.mark.long
def test_a_full_queue_is_overload_and_refuses_at_once(ask: Ask) -> None:
    calls = [ask("sleep", timeout=30.0) for _ in range(40)]
    endings = [ended(call) for call in calls]
    refused = {(status, told) for status, told in endings if status is not grpc.StatusCode.OK}
    assert 0 < len([status for status, _ in endings if status is grpc.StatusCode.OK]) < 40
    assert {status for status, _ in refused} == {grpc.StatusCode.INTERNAL}
    assert {classify(status, told) for status, told in refused} == {Outcome.OVERLOAD}


def test_a_deadline_is_a_timeout(ask: Ask) -> None:
    asked = time.monotonic()
    status, told = ended(ask("sleep", timeout=0.05))
    # Its time is up for both sides, and the one that says so first is heard.
    assert classify(status, told, is_over=time.monotonic() - asked >= 0.05) is Outcome.TIMEOUT


def test_a_float_of_nan_comes_as_text_and_is_a_bad_answer(ask: Ask) -> None:
    answer = ask("NaN")()
    assert answer.prediction == b"NaN"
    with pytest.raises(BatchFailedError) as failure:
        wire.parse_answer("champion", 1, answer.prediction)
    assert failure.value.outcome is Outcome.BAD_ANSWER


@pytest.mark.long
def test_an_idle_worker_that_was_killed_and_a_dead_jvm(torchserve: Stack, ask: Ask) -> None:
    worker = next(process for process in torchserve["primary"].tree() if "python" in process.name())
    worker.kill()
    status, told = ended(ask("well?"))
    # Whether it noticed before the call decides between the two.
    assert status is grpc.StatusCode.OK or classify(status, told) is Outcome.MODEL_ERROR
    eventually(lambda: ended(ask("well?")), lambda seen: seen[0] is grpc.StatusCode.OK)
    call = ask("sleep")
    torchserve["primary"].kill()
    assert classify(*ended(call)) is Outcome.TRANSPORT
    assert classify(*ended(ask("well?"))) is Outcome.TRANSPORT
    torchserve.restart("primary")


def sound(call: PeerCall) -> None:
    call.reply(scored(call.rows))


def of_peer(replica_stack: Stack) -> Iterator[str]:
    with ScriptedPeer(sound) as peer:
        yield peer.address


def of_torchserve(replica_stack: Stack) -> Iterator[str]:
    yield str(replica_stack.endpoints.primary)


@pytest.mark.parametrize("address_of", [of_peer, of_torchserve])
def test_the_scripted_peers_sound_answer_is_like_torchserves(
    replica_stack: Stack, address_of: Callable[[Stack], Iterator[str]]
) -> None:
    for address in address_of(replica_stack):
        with grpc.insecure_channel(address) as channel:
            request = wire.request("champion", [bytes(features.MF1.row_bytes)] * 3)
            answer = InferenceAPIsServiceStub(channel).Predictions(request, timeout=5.0)
        batch = wire.parse_answer("champion", 3, answer.prediction)
        assert batch.scores.shape == (3,)
        assert ((batch.scores >= 0) & (batch.scores <= 1)).all()
        assert len(batch.model.version) == 16
        assert len(features.NAMES) * 4 == features.MF1.row_bytes


@pytest.mark.parametrize("client", [of_grpc, of_direct])
def test_the_scripted_peers_failure_is_like_torchserves(ask: Ask, client: Callable[[str, ExitStack], Ask]) -> None:
    real = ended(ask("raise"))
    with ScriptedPeer(lambda call: call.status(14, "Prediction failed")) as peer, ExitStack() as held:
        assert ended(client(peer.address, held)("raise")) == real
