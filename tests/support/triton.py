"""A scripted Triton: a real gRPC server that loads, unloads and refuses models as Triton documents it.

Its models are real ones, run by the library that Triton's backends run them by: XGBoost's JSON in
`REPOSITORY/NAME/NUMBER/xgboost.json`, ONNX in `model.onnx`. Triton itself is not run in any test.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray

from pretrade.wire.oip import repository_pb2 as pb
from pretrade.wire.oip.inference_pb2 import ModelInferRequest, ModelInferResponse

SERVICE = "inference.GRPCInferenceService"
OLDER_SERVICE = "inference.model_repository.ModelRepositoryService"


class Model(NamedTuple):
    """A version that is served."""

    features: int
    scores: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    """float32[n, features] → float32[n] or [n, 1]"""


Models = dict[int, Model]
"""Those of a model by version."""


class RefusedError(Exception):
    """A call that ends with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, said: str) -> None:
        super().__init__(said)
        self.code = code


@dataclass
class Triton:
    """The server, as a test sees it.

    A version is READY while it is in `served`, and UNAVAILABLE ("unloaded") when it once was.
    """

    repository: Path
    polling: bool = False
    """Loads of clients are refused, as in the modes NONE and POLL."""
    port: int = 0
    served: dict[str, Models] = field(default_factory=dict)
    known: dict[str, set[int]] = field(default_factory=dict)
    loads: list[pb.RepositoryModelLoadRequest] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Name and version of every row that was asked for, as the caller named them."""
    factor: float = 1.0
    """Of all scores."""

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def versions(self, name: str) -> list[int]:
        """The numbers that are served, in order."""
        return sorted(self.served.get(name, ()))

    def load(self, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        """All or nothing: what is served stays as it is when a version cannot be loaded."""
        self.loads.append(request)
        name = request.model_name
        if self.polling:
            raise RefusedError(
                grpc.StatusCode.UNAVAILABLE, "explicit model load / unload is not allowed if polling is enabled"
            )
        folder = self.repository / name
        if not folder.is_dir():
            raise RefusedError(
                grpc.StatusCode.INVALID_ARGUMENT, f"failed to load '{name}', failed to poll from model repository"
            )
        policy = _policy(request.parameters["config"].string_param) if request.parameters else {"all": {}}
        there = {int(one.name) for one in folder.iterdir() if one.name.isdigit()}
        if "specific" in policy:  # without a word about those that are not there
            wanted = there & set(policy["specific"]["versions"])
        else:
            wanted = there if "all" in policy else set(sorted(there)[-1:])
        if not wanted:
            said = f"at least one version must be available under the version policy of model '{name}'"
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, said)
        self.served[name] = {version: _loaded(folder, name, version) for version in wanted}
        self.known.setdefault(name, set()).update(wanted)
        return pb.RepositoryModelLoadResponse()

    def unload(self, request: pb.RepositoryModelUnloadRequest) -> pb.RepositoryModelUnloadResponse:
        """Of all versions."""
        self.served.pop(request.model_name, None)
        return pb.RepositoryModelUnloadResponse()

    def index(self, _request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        """Every version that was ever loaded, and the names of what never was."""
        answer = pb.RepositoryIndexResponse()
        for folder in sorted(one for one in self.repository.iterdir() if one.is_dir()):
            for version in sorted(self.known.get(folder.name, ())):
                ready = version in self.served.get(folder.name, {})
                state, reason = ("READY", "") if ready else ("UNAVAILABLE", "unloaded")
                answer.models.add(name=folder.name, version=str(version), state=state, reason=reason)
            if folder.name not in self.known:
                answer.models.add(name=folder.name)
        return answer

    def ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """False for what is not there, too."""
        return pb.ModelReadyResponse(ready=_number(request.version) in self.served.get(request.name, {}))

    def infer(self, request: ModelInferRequest) -> ModelInferResponse:
        """Scores FP32 rows; without a version, with the greatest."""
        name = request.model_name
        self.asked.append((name, request.model_version))
        served = self.served.get(name)
        if not served:
            raise RefusedError(
                grpc.StatusCode.UNAVAILABLE, f"Request for unknown model: '{name}' has no available versions"
            )
        version = _number(request.model_version) if request.model_version else max(served)
        if version not in served:
            gone = version in self.known[name]
            said = (
                f"Request for unknown model: '{name}' version {version} is not {'at ready state' if gone else 'found'}"
            )
            raise RefusedError(grpc.StatusCode.UNAVAILABLE if gone else grpc.StatusCode.NOT_FOUND, said)
        (tensor,) = request.inputs
        if tensor.name != "input__0" or any(one.name != "output__0" for one in request.outputs):
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"unexpected inference input for model '{name}'")
        rows = np.frombuffer(request.raw_input_contents[0], "<f4").reshape(tuple(tensor.shape))
        model = served[version]
        if rows.shape[1] != model.features:
            said = f"unexpected shape for input 'input__0' for model '{name}'. Expected [-1,{model.features}]"
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"{said}, got [{len(rows)},{rows.shape[1]}]")
        scores = (self.factor * model.scores(rows)).astype("<f4")
        answer = ModelInferResponse(model_name=name, model_version=str(version))
        answer.outputs.add(name="output__0", datatype="FP32", shape=(len(rows), 1))
        answer.raw_output_contents.append(scores.tobytes())
        return answer


@asynccontextmanager
async def triton(
    repository: Path,
    *names: str,
    credentials: grpc.ServerCredentials | None = None,
    older: bool = False,
) -> AsyncIterator[Triton]:
    """Serves a repository while the context is open.

    Args:
        repository: Folder of its models.
        names: The models that it starts with, as `--load-model` names them.
        credentials: Has it speak TLS.
        older: Has the repository API in the service that MLServer once had it in.
    """
    made = Triton(repository)
    for name in names:
        made.load(pb.RepositoryModelLoadRequest(model_name=name))
    made.loads.clear()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                SERVICE,
                {
                    "ModelInfer": _method(made.infer, ModelInferRequest),
                    "ModelReady": _method(made.ready, pb.ModelReadyRequest),
                },
            ),
            grpc.method_handlers_generic_handler(
                OLDER_SERVICE if older else SERVICE,
                {
                    "RepositoryIndex": _method(made.index, pb.RepositoryIndexRequest),
                    "RepositoryModelLoad": _method(made.load, pb.RepositoryModelLoadRequest),
                    "RepositoryModelUnload": _method(made.unload, pb.RepositoryModelUnloadRequest),
                },
            ),
        )
    )
    address = "127.0.0.1:0"
    made.port = (
        server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    )
    await server.start()
    try:
        yield made
    finally:
        await server.stop(0)


@contextmanager
def tritons(repository: Path, roles: Iterable[str], *names: str) -> Iterator[dict[str, Triton]]:
    """One server for each role, over one repository, in a thread with an event loop of its own."""
    made: dict[str, Triton] = {}
    ready, over = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with AsyncExitStack() as stack:
            for role in roles:
                made[role] = await stack.enter_async_context(triton(repository, *names))
            ready.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(30)
        yield made
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


def _method(answer: Callable[[Any], Any], request: Any) -> grpc.RpcMethodHandler[Any, Any]:
    async def handle(message: Any, context: Any) -> Any:
        try:
            return answer(message)
        except RefusedError as refused:
            await context.abort(refused.code, str(refused))

    return grpc.unary_unary_rpc_method_handler(
        handle,
        request_deserializer=request.FromString,
        response_serializer=lambda answered: answered.SerializeToString(),
    )


def _policy(config: str) -> dict[str, Any]:
    """The version policy of a configuration that came with a load request."""
    try:
        read = json.loads(config)
    except ValueError as error:
        raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"failed to parse the model config: {error}") from error
    if "backend" not in read:
        raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "must specify 'platform' or 'backend'")
    policy: dict[str, Any] = read.get("version_policy", {"latest": {}})
    return policy


def _loaded(folder: Path, name: str, version: int) -> Model:
    path = folder / str(version)
    try:
        return _onnx(path / "model.onnx") if (path / "model.onnx").exists() else _trees(path / "xgboost.json")
    except Exception as error:  # whatever the library says of a file that is no model
        said = f"failed to load '{name}', version {version} is at UNAVAILABLE state: {error}"
        raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, said.partition("\n")[0]) from error


def _trees(path: Path) -> Model:
    import xgboost  # noqa: PLC0415  most tests need none

    booster = xgboost.Booster({"nthread": 1}, model_file=str(path))
    return Model(booster.num_features(), lambda rows: booster.inplace_predict(rows, missing=np.nan))


def _onnx(path: Path) -> Model:
    import onnxruntime  # noqa: PLC0415  as above

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (output,) = session.get_inputs(), session.get_outputs()
    assert (given.name, output.name, output.shape[1]) == ("input__0", "output__0", 1), "as the configuration says"
    return Model(given.shape[1], lambda rows: session.run(None, {"input__0": rows})[0])


def _number(version: str) -> int:
    try:
        return int(version)
    except ValueError as error:
        said = f"failed to get model version from specified version string '{version}'"
        raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, said) from error
