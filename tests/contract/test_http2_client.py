"""The client of the call that scores, against a scripted peer over real sockets: a connection is lost, and found."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
import structlog.testing
from support.scripted_peer import PeerCall, Script, ScriptedPeer, scored
from support.tcp_proxy import BLACK_HOLE, TcpProxy
from support.waiting import until

from pretrade.wire.torchserve import inference_pb2
from server.inference.codec import TORCHSERVE
from server.inference.http2_client import Http2Client
from server.inference.http2_connection import UnusableError
from server.inference.wire import request

PATH = str(TORCHSERVE.method and TORCHSERVE.method.path)
ROW = request("champion", [bytes(4)]).SerializeToString()


@asynccontextmanager
async def client(address: str) -> AsyncIterator[Http2Client]:
    opened = Http2Client("primary", address, PATH, time.monotonic, random.random)
    opened.open()
    try:
        yield opened
    finally:
        await opened.close()


async def usable(opened: Http2Client) -> None:
    await until(lambda: opened.usable)


async def score(opened: Http2Client, seconds: float = 10.0) -> bytes:
    answer = await opened.call(ROW, seconds)
    return inference_pb2.PredictionResponse.FromString(answer).prediction


async def code_of(opened: Http2Client, seconds: float = 10.0) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await score(opened, seconds)
    code: grpc.StatusCode = failure.value.code()
    return code


def sound(call: PeerCall) -> None:
    call.reply(scored(1))


def cut_off(call: PeerCall) -> None:
    call.half_reply(scored(1))
    call.hang_up()


async def test_a_call_has_its_answer_and_many_at_once_have_theirs() -> None:
    with ScriptedPeer(sound) as peer:
        async with client(peer.address) as opened:
            await usable(opened)
            answers = await asyncio.gather(*(score(opened) for _ in range(50)))
            assert answers == [scored(1)] * 50
            assert opened.calls == peer.calls == 50


async def test_metadata_goes_along_however_long_it_is() -> None:
    with ScriptedPeer(sound) as peer:
        async with client(peer.address) as opened:
            await usable(opened)
            for length in (1, 126, 127, 128, 254, 255, 1_000, 5_000):
                await opened.call(ROW, 10.0, (("authorization", "t" * length), ("traceparent", "00")))
            assert peer.calls == 8


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (PeerCall.hang_up, grpc.StatusCode.UNAVAILABLE),
        (PeerCall.go_away, grpc.StatusCode.UNAVAILABLE),
        (cut_off, grpc.StatusCode.UNAVAILABLE),
    ],
    ids=["closed", "GOAWAY", "closed in the middle of an answer"],
)
async def test_a_connection_that_ends_fails_its_call_and_is_there_again(ends: Script, code: grpc.StatusCode) -> None:
    with ScriptedPeer(sound) as peer:
        async with client(peer.address) as opened:
            await usable(opened)
            peer.script = ends
            with structlog.testing.capture_logs() as logs:
                assert await code_of(opened) is code
                await until(lambda: not opened.usable or bool(logs))
                peer.script = sound
                await usable(opened)
                await until(lambda: len(logs) == 2)
            assert [one["log_level"] for one in logs] == ["warning", "info"]
            assert await score(opened) == scored(1)


@pytest.mark.parametrize(
    ("answers", "code"),
    [
        (lambda call: call.status(14, "Prediction failed"), grpc.StatusCode.UNAVAILABLE),
        (PeerCall.reset, grpc.StatusCode.INTERNAL),
    ],
    ids=["status", "RST_STREAM"],
)
async def test_a_call_that_fails_by_itself_leaves_the_connection(answers: Script, code: grpc.StatusCode) -> None:
    with ScriptedPeer(answers) as peer:
        async with client(peer.address) as opened:
            await usable(opened)
            assert await code_of(opened) is code
            assert opened.usable
            peer.script = sound
            assert await score(opened) == scored(1)


async def test_a_peer_that_breaks_the_protocol_is_not_asked_again_soon() -> None:
    with ScriptedPeer(PeerCall.garbage) as peer:
        async with client(peer.address) as opened:
            await usable(opened)
            assert await code_of(opened) is grpc.StatusCode.UNAVAILABLE
            peer.script = sound
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.0):  # a lost connection would be there again within a third of that
                    await usable(opened)
            with pytest.raises(UnusableError):
                await score(opened)


async def test_a_call_is_given_up_in_time() -> None:
    with ScriptedPeer(lambda call: None) as peer:
        async with client(peer.address) as opened:
            await usable(opened)
            assert await code_of(opened, seconds=0.05) is grpc.StatusCode.DEADLINE_EXCEEDED
            peer.script = sound
            assert await score(opened) == scored(1)


async def test_a_black_hole_is_found_and_left_behind() -> None:
    with ScriptedPeer(sound) as peer, TcpProxy(peer.address) as proxy:
        async with client(proxy.address) as opened:
            await usable(opened)
            await asyncio.to_thread(proxy.apply, BLACK_HOLE)
            assert await code_of(opened) is grpc.StatusCode.UNAVAILABLE
            await asyncio.to_thread(proxy.heal)
            await usable(opened)
            assert await score(opened) == scored(1)


async def test_nobody_who_calls_waits_for_a_connection() -> None:
    with ScriptedPeer(sound) as peer:
        address = peer.address
    async with client(address) as opened:  # nobody listens there any more
        with pytest.raises(UnusableError):
            await score(opened)


async def test_closing_ends_what_is_under_way() -> None:
    with ScriptedPeer(lambda call: None) as peer:
        async with client(peer.address) as opened:
            await usable(opened)
            under_way = asyncio.create_task(code_of(opened))
            await until(lambda: peer.calls == 1)
        assert await under_way is grpc.StatusCode.UNAVAILABLE
