"""A batch's call to the model server carries the trace of its first order, and every order learns whose it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
from support.scripted_peer import scored

from feature_cache.features import MF1
from pretrade.wire.torchserve import inference_pb2, inference_pb2_grpc
from server.inference.batcher import BatcherSettings
from server.inference.replica import Replica, ReplicaLimits
from server.inference.rows import Scored

PARENTS = [f"00-{number:032x}-{number:016x}-01" for number in (1, 2, 3)]


class ModelServer(inference_pb2_grpc.InferenceAPIsServiceServicer):
    """A real gRPC server that notes what its callers sent along."""

    def __init__(self) -> None:
        self.traces: list[str] = []

    async def Predictions(
        self,
        request: inference_pb2.PredictionsRequest,
        context: grpc.aio.ServicerContext[inference_pb2.PredictionsRequest, inference_pb2.PredictionResponse],
    ) -> inference_pb2.PredictionResponse:
        metadata = dict(context.invocation_metadata() or ())
        rows = len(request.input["input"]) // MF1.row_bytes
        self.traces.append(str(metadata.get("traceparent", "")))
        return inference_pb2.PredictionResponse(prediction=scored(rows))


@asynccontextmanager
async def served() -> AsyncIterator[tuple[ModelServer, Replica]]:
    model, server = ModelServer(), grpc.aio.server()
    inference_pb2_grpc.add_InferenceAPIsServiceServicer_to_server(model, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    clock = asyncio.get_running_loop().time
    # Not about time: other work on the machine must not have an answer given up.
    limits = ReplicaLimits(batcher=BatcherSettings(min_patience_seconds=10, max_patience_seconds=10))
    made = Replica("primary", f"127.0.0.1:{port}", "champion", None, limits, clock=clock, random=lambda: 0.5)
    try:
        async with made as replica:
            await asyncio.wait_for(replica.proven.wait(), 30)
            yield model, replica
    finally:
        await server.stop(None)  # one that is left running would keep the process of the tests from ending


async def test_the_call_of_a_batch_carries_its_first_orders_trace_and_all_learn_it() -> None:
    async with served() as (model, replica):
        deadline = asyncio.get_running_loop().time() + 30
        row = bytes(MF1.row_bytes)
        answers = await asyncio.gather(*(replica.batcher.submit(row, deadline, traceparent=p) for p in PARENTS))
    assert PARENTS[0] in model.traces
    assert not set(PARENTS[1:]) & set(model.traces)
    assert [answer.call_parent for answer in answers if isinstance(answer, Scored)] == [PARENTS[0]] * 3
    assert all(isinstance(answer, Scored) and answer.queued_seconds >= 0 for answer in answers)


async def test_probes_and_untraced_orders_carry_none() -> None:
    async with served() as (model, replica):
        answer = await replica.batcher.submit(bytes(MF1.row_bytes), asyncio.get_running_loop().time() + 30)
    assert isinstance(answer, Scored)
    assert set(model.traces) == {""}
