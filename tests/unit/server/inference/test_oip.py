"""The Open Inference Protocol as pretrade speaks it: sound answers are read, anything else is a bad answer."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.guest_sets import MIXED, REGISTERED, know

from feature_cache import feature_sets, features
from feature_cache.features import MF1
from pretrade.wire.oip.inference_pb2 import ModelInferRequest, ModelInferResponse
from server.inference.endpoints import ReplicaEndpoints
from server.inference.oip import ModelDescription, OpenInference, OpenInferenceSettings
from server.inference.outcome import BatchFailedError, Outcome
from server.inference.wire import ModelIdentity
from server.settings import Settings, load

VERSION = "0123456789abcdef"
DESCRIPTION = {
    "version": VERSION,
    "threshold": 0.75,
    "feature_set_fingerprint": features.MF1.fingerprint,
    "expires_at": 9,
}
MODEL = ModelDescription.model_validate(DESCRIPTION)
OIP = OpenInference(OpenInferenceSettings(), MODEL)
NAMED = OpenInference(OpenInferenceSettings(input_name="input__0", output_name="score"), MODEL)
FLOAT32 = np.array([0.25, 1.0, 0.125], dtype="<f4")


def answer(
    values: Any = FLOAT32,
    *,
    shape: tuple[int, ...] = (3,),
    datatype: str = "FP32",
    raw: bool = True,
    version: str = VERSION,
    name: str = "predict",
) -> ModelInferResponse:
    response = ModelInferResponse(model_name="champion", model_version=version)
    output = response.outputs.add(name=name, datatype=datatype, shape=shape)
    if raw:
        response.raw_output_contents.append(np.asarray(values).tobytes())
    elif datatype == "FP32":
        output.contents.fp32_contents.extend(values)
    else:
        output.contents.fp64_contents.extend(values)
    return response


def test_a_request_is_one_tensor_of_the_rows() -> None:
    rows = [bytes([number]) * MF1.row_bytes for number in (1, 2)]
    request = NAMED.request("champion", rows, "", MF1)
    (tensor,) = request.inputs
    assert (request.model_name, request.model_version) == ("champion", VERSION), "the one described, if none is named"
    assert (tensor.name, tensor.datatype) == ("input__0", "FP32")
    assert list(tensor.shape) == [2, features.N_FEATURES]
    assert list(request.raw_input_contents) == [b"".join(rows)]
    assert [output.name for output in request.outputs] == ["score"]


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(("datatype", "dtype"), [("FP32", "<f4"), ("FP64", "<f8")])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_a_sound_answer_is_read_back(raw: bool, datatype: str, dtype: str, shape: tuple[int, ...]) -> None:
    batch = OIP.parse("champion", 3, answer(FLOAT32.astype(dtype), shape=shape, datatype=datatype, raw=raw))
    assert batch.model == ModelIdentity("champion", VERSION, 0.75, 9)
    assert batch.scores.dtype == np.float32
    np.testing.assert_array_equal(batch.scores, FLOAT32)


def test_of_two_classes_the_second_is_the_score() -> None:
    probabilities = np.stack([1 - FLOAT32, FLOAT32], axis=1)
    np.testing.assert_array_equal(OIP.parse("champion", 3, answer(probabilities, shape=(3, 2))).scores, FLOAT32)


def test_the_output_that_was_named_is_taken_wherever_it_is() -> None:
    response = answer(np.zeros(3, "<f4"), name="class")
    response.outputs.add(name="score", datatype="FP32", shape=(3,))
    response.raw_output_contents.append(FLOAT32.tobytes())
    np.testing.assert_array_equal(NAMED.parse("champion", 3, response).scores, FLOAT32)


def test_a_server_may_have_its_own_name_for_the_version() -> None:
    described = ModelDescription.model_validate({**DESCRIPTION, "served_version": "1"})
    codec = OpenInference(OpenInferenceSettings(), described)
    assert codec.request("champion", [bytes(MF1.row_bytes)], VERSION, MF1).model_version == "1"
    assert (
        codec.request("champion", [bytes(MF1.row_bytes)], "fedcba9876543210", MF1).model_version == "fedcba9876543210"
    )
    assert codec.parse("champion", 3, answer(version="1")).model.version == VERSION
    with pytest.raises(BatchFailedError, match="model version"):
        codec.parse("champion", 3, answer(version=VERSION))


def test_a_version_that_was_learnt_is_asked_for_by_the_servers_name_and_answers_as_what_it_is() -> None:
    codec = OpenInference(OpenInferenceSettings(version_names="number"), MODEL)
    other = ModelIdentity("champion", "fedcba9876543210", 0.5, 7, MIXED)
    number = str(0xFEDCBA987654321)
    with pytest.raises(BatchFailedError, match=f"model version '{number}', described are '{0x0123456789ABCDE}'"):
        codec.parse("champion", 3, answer(version=number))
    codec.learn(other)
    assert codec.request("champion", [bytes(MIXED.row_bytes)], other.version, MIXED).model_version == number
    assert codec.parse("champion", 3, answer(version=number)).model == other
    assert codec.parse("champion", 3, answer(version=str(0x0123456789ABCDE))).model.version == VERSION
    assert (codec.version_of(number), codec.version_of("9")) == (other.version, "9")
    assert (codec.feature_set_of(other.version), codec.feature_set_of(VERSION)) == (MIXED, MF1)
    assert codec.feature_set_of("primary") is MF1, "what nobody knows yet is asked for as the one described"


def test_the_name_in_a_description_comes_before_the_computed_one() -> None:
    described = ModelDescription.model_validate({**DESCRIPTION, "served_version": "1"})
    codec = OpenInference(OpenInferenceSettings(version_names="number"), described)
    assert codec.served_name(VERSION) == "1"
    assert codec.version_of("1") == VERSION


@pytest.mark.parametrize(
    ("response", "what"),
    [
        (ModelInferResponse(model_version=VERSION), "no output"),
        (answer(version="fedcba9876543210"), "model version 'fedcba9876543210'"),
        (answer(version=""), "model version ''"),
        (answer(shape=(2,)), r"FP32 \[2\] for 3 rows"),
        (answer(shape=(3, 3)), r"FP32 \[3, 3\] for 3 rows"),
        (answer(shape=()), r"FP32 \[\] for 3 rows"),
        (answer(shape=(3, 1, 1)), r"FP32 \[3, 1, 1\] for 3 rows"),
        (answer(datatype="INT64"), "INT64"),
        (answer(FLOAT32[:2]), "8 bytes"),
        (answer(FLOAT32, shape=(3, 2)), "12 bytes"),
        (answer(FLOAT32, datatype="FP64"), "12 bytes"),
        (answer(FLOAT32[:2], raw=False), "2 values"),
        (answer([], raw=False), "0 values"),
    ],
)
def test_a_wrong_answer_says_what_is_wrong(response: ModelInferResponse, what: str) -> None:
    with pytest.raises(BatchFailedError, match=what) as caught:
        OIP.parse("champion", 3, response)
    assert caught.value.outcome is Outcome.BAD_ANSWER


@given(data=st.data())
def test_a_changed_byte_gives_a_bad_answer_or_well_formed_scores(data: st.DataObject) -> None:
    packed = bytearray(answer().SerializeToString())
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        response = ModelInferResponse.FromString(bytes(packed))
    except Exception:
        return  # refused by the transport
    try:
        outcome, shape = Outcome.SUCCESS, OIP.parse("champion", 3, response).scores.shape
    except BatchFailedError as failure:
        outcome, shape = failure.outcome, (3,)
    assert outcome in (Outcome.SUCCESS, Outcome.BAD_ANSWER)
    assert shape == (3,)


def test_the_wire_is_that_of_the_protocol() -> None:
    # Field numbers of the published protocol: what another implementation would send and read.
    request = OIP.request("m", [bytes(MF1.row_bytes)], "", MF1)
    packed = request.SerializeToString()
    assert packed.startswith(b"\x0a\x01m")  # 1: model_name
    assert b"\x2a" + bytes([len(request.inputs[0].SerializeToString())]) in packed  # 5: inputs
    assert packed.endswith(b"\x3a" + bytes([MF1.row_bytes]) + bytes(MF1.row_bytes))  # 7: raw_input_contents
    assert ModelInferRequest.FromString(packed) == request
    raw = b"\x12\x10" + VERSION.encode() + b"\x2a\x0d\x0a\x01s\x12\x04FP32\x1a\x02\x01\x01"
    response = ModelInferResponse.FromString(raw + b"\x32\x04" + struct.pack("<f", 0.5))
    assert OIP.parse("m", 1, response).scores.tolist() == [0.5]


def settings_with(path: Path) -> Settings:
    return Settings(
        replicas=ReplicaEndpoints(primary_protocol="oip"), oip=OpenInferenceSettings.model_validate({"champion": path})
    )


def test_a_description_is_read_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "champion.json"
    path.write_text(json.dumps({**DESCRIPTION, "name": "champion", "metrics": {}}))
    assert ModelDescription.read(path) == MODEL
    assert settings_with(path).oip.champion == path


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": "latest"},
        {"threshold": 1.5},
        {"feature_set_fingerprint": None},
        {"expires_at": 2**63},
    ],
)
def test_a_wrong_description_refuses_to_start(wrong: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "champion.json"
    path.write_text(json.dumps(DESCRIPTION | wrong))
    with pytest.raises(ValidationError, match=r"champion\.json"):
        settings_with(path)


def test_a_model_of_a_set_that_is_not_known_refuses_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "champion.json"
    path.write_text(json.dumps({**DESCRIPTION, "feature_set_fingerprint": MIXED.fingerprint}))
    monkeypatch.setenv("PRETRADE_OIP__CHAMPION", str(path))
    monkeypatch.setattr(feature_sets, "_loaded", {})
    unknown = f"feature set {MIXED.fingerprint:08x} is not known here: {MF1.version}"
    with pytest.raises(ValueError, match=rf"oip\.champion: .*champion\.json: {unknown}"):
        load()
    monkeypatch.setattr(feature_sets, "load", lambda file: know(monkeypatch, REGISTERED))
    assert load().oip.champion == path
    assert OpenInference(OpenInferenceSettings(), ModelDescription.read(path)).feature_set_of(VERSION) is MIXED


@pytest.mark.parametrize(
    ("content", "names", "what"),
    [
        ("[1]", "number", "champion: .*config.json does not hold one JSON object"),
        ("{", "number", "champion: .*config.json: Expecting property name"),
        ("{}", "hash", "triton_configs: needs version_names=number"),
    ],
)
def test_a_wrong_configuration_for_triton_refuses_to_start(content: str, names: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    settings = {"triton_configs": {"champion": path}, "version_names": names}
    with pytest.raises(ValidationError, match=what):
        OpenInferenceSettings.model_validate(settings)


def test_a_pinned_version_must_be_the_one_described(tmp_path: Path) -> None:
    path = tmp_path / "champion.json"
    path.write_text(json.dumps(DESCRIPTION))
    oip = OpenInferenceSettings.model_validate({"champion": path})

    def pinned(version: str) -> Settings:
        return Settings(replicas=ReplicaEndpoints(primary_protocol="oip", champion_version=version), oip=oip)

    assert pinned(VERSION).replicas.champion_version == VERSION
    with pytest.raises(ValidationError, match=f"champion_version: {'f' * 16}, but oip.champion is {VERSION}"):
        pinned("f" * 16)


def test_a_replica_that_speaks_it_needs_a_description() -> None:
    with pytest.raises(ValidationError, match=r"oip\.champion"):
        Settings(replicas=ReplicaEndpoints(secondary_protocol="oip"))
    with pytest.raises(ValidationError, match=r"oip\.challenger"):
        Settings(replicas=ReplicaEndpoints(challenger_protocol="oip"))


def test_without_a_description_only_versions_count_that_were_learnt() -> None:
    codec = OpenInference(OpenInferenceSettings(), None)
    assert codec.feature_set_of(VERSION) is None
    assert codec.request("m", [bytes(MF1.row_bytes)], "", MF1).model_version == ""
    answer = ModelInferResponse(model_name="m", model_version=VERSION)
    answer.outputs.add(name="predict", datatype="FP32", shape=[1]).contents.fp32_contents.append(0.5)
    with pytest.raises(BatchFailedError, match="described are none"):
        codec.parse("m", 1, answer)
    codec.learn(ModelIdentity("", VERSION, 0.25, 0, MF1))
    assert codec.parse("m", 1, answer).model == ModelIdentity("m", VERSION, 0.25, 0, MF1)
    assert codec.feature_set_of(VERSION) is MF1
