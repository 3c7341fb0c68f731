"""gRPC's headers, frames and trailers, without a server."""

from __future__ import annotations

import gzip
import math
import zlib
from urllib.parse import unquote

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import PretradeError, ProtocolError
from server.rpc import status
from server.rpc.framing import (
    ARRIVED,
    call_headers,
    decompressed,
    framed,
    message_length,
    status_headers,
)


@given(st.binary(max_size=70_000))
def test_a_frame_says_how_long_its_message_is(message: bytes) -> None:
    frame = framed(message)
    assert frame[0] == 0
    assert frame[5:] == message
    assert message_length(frame) == len(message)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(b"1H", 3_600.0), (b"2M", 120.0), (b"3S", 3.0), (b"25m", 0.025), (b"7u", 7e-6), (b"9n", 9e-9), (b"0S", 0.0)],
)
def test_every_unit_of_a_timeout_is_known(value: bytes, seconds: float) -> None:
    found = call_headers([(b"grpc-timeout", value), (b"grpc-encoding", b"gzip"), (ARRIVED, b"1790000000.250000")])
    assert found.timeout == pytest.approx(seconds, rel=1e-12)
    assert (found.encoding, found.arrived) == (b"gzip", 1_790_000_000.25)


def test_a_call_without_such_headers_has_no_timeout_and_is_not_compressed() -> None:
    assert call_headers([(b"te", b"trailers")]) == (None, b"identity", None)


def test_a_timeout_beyond_all_numbers_has_no_end() -> None:
    assert call_headers([(b"grpc-timeout", b"9" * 400 + b"S")])[0] == math.inf


@given(st.binary(max_size=12).filter(lambda value: value[-1:] not in (b"H", b"M", b"S", b"m", b"u", b"n")))
def test_a_timeout_without_a_unit_is_none(value: bytes) -> None:
    with pytest.raises(ProtocolError):
        call_headers([(b"grpc-timeout", value)])


def test_both_encodings_are_read() -> None:
    assert decompressed(gzip.compress(b"one"), b"gzip", 10) == b"one"
    assert decompressed(zlib.compress(b"two"), b"deflate", 10) == b"two"


def test_a_bomb_is_unpacked_no_further_than_needed_to_know_it() -> None:
    assert len(decompressed(gzip.compress(bytes(10_000_000)), b"gzip", 1_000)) == 1_001


@pytest.mark.parametrize(
    ("payload", "encoding", "code"),
    [
        (b"x", b"identity", grpc.StatusCode.INTERNAL),
        (b"x", b"gzip", grpc.StatusCode.INTERNAL),
        (b"x", b"snappy", grpc.StatusCode.UNIMPLEMENTED),
    ],
)
def test_what_cannot_be_unpacked_has_its_status(payload: bytes, encoding: bytes, code: grpc.StatusCode) -> None:
    with pytest.raises(PretradeError) as refused:
        decompressed(payload, encoding, 10)
    assert status.of(refused.value)[0] is code


@given(st.text(min_size=1))
def test_a_message_in_any_script_survives_its_header(details: str) -> None:
    try:
        details.encode()
    except UnicodeEncodeError:
        return  # not text that protobuf could hold either
    headers = dict(status_headers(grpc.StatusCode.NOT_FOUND, details))
    assert headers[b"grpc-status"] == b"5"
    value = headers[b"grpc-message"]
    assert all(0x20 <= byte <= 0x7E for byte in value)
    assert unquote(value.decode()) == details


def test_binary_metadata_is_base64_without_padding() -> None:
    metadata = (("a-bin", b"\x00\x01"), ("b", "plain"))
    headers = status_headers(grpc.StatusCode.UNKNOWN, "", metadata)
    assert headers == [(b"grpc-status", b"2"), (b"a-bin", b"AAE"), (b"b", b"plain")]
