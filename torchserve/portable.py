"""Models as ONNX, for runtimes that are not the archive's own: the embedded stage, and Triton.

A network that Torch scores is written as ONNX when its archive is made, and is part of the metadata, so that the
version's hash covers it. What is served by TorchServe stays Torch; a server that loads the other one holds it against
the archive's reference scores first.

A server that knows nothing of pretrade gives a model's output as it is. For such a server `scoring` puts all that the
handler does besides into the model: undefined features, the column, log odds, and the calibration.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from torchserve.handler import LEAST_SHARE, MOST_SHARE, runtime_of

INPUT: Final = "rows"
MARGIN: Final = "margin"
METADATA: Final = "onnx"
"""Where the metadata have the network: `model`, base64, and `scored`, as of a model that was brought in ONNX."""
_OPSET: Final = 17
_IR_VERSION: Final = 9
"""Of the year of the opset: what runtimes of the last years read."""
_LEAST_OPSET: Final = 9
"""From this one on, the operators that `scoring` adds are what they are today."""
_OF_MODEL: Final = "model/"
"""Before all names of the model that `scoring` adds to."""
_NEAR: Final = 1e-6
"""How far a score may be from that of the archive's handler."""
_Node = tuple[str, list[str], str, dict[str, Any]]
"""Operator, inputs, output and attributes."""


def described(weights: bytes, network: Mapping[str, Any]) -> dict[str, Any]:
    """What an archive's metadata say of a network's form in ONNX.

    Args:
        weights: As in the archive.
        network: As in its metadata.
    """
    scored = {"input": INPUT, "output": MARGIN, "column": 0, "is_probability": False, "fill": None}
    return {"model": base64.b64encode(network_as_onnx(weights, network)).decode(), "scored": scored}


def network_as_onnx(weights: bytes, network: Mapping[str, Any]) -> bytes:
    """The multilayer perceptron that `handler.torch_margin` computes: `rows` float32[n, features] → `margin` [n, 1]."""
    import torch  # noqa: PLC0415 - who makes trees alone needs none

    state = torch.load(io.BytesIO(weights), weights_only=True)
    held = {name: np.array(network[name], dtype=np.float32) for name in ("median", "mean", "scale")}
    held |= {name: np.array(sign * network["clip"], dtype=np.float32) for name, sign in (("least", -1), ("most", 1))}
    nodes: list[_Node] = [
        ("IsNaN", [INPUT], "undefined", {}),
        ("Where", ["undefined", "median", INPUT], "defined", {}),
        ("Sub", ["defined", "mean"], "centred", {}),
        ("Div", ["centred", "scale"], "scaled", {}),
        ("Clip", ["scaled", "least", "most"], "layer_0", {}),
    ]
    layers = len(network["layers"]) - 1
    for place in range(layers):
        for part in ("weight", "bias"):
            held[f"{part}_{place}"] = state[f"{2 * place}.{part}"].numpy()
        given, sum_ = f"layer_{place}", MARGIN if place == layers - 1 else f"sum_{place + 1}"
        nodes.append(("Gemm", [given, f"weight_{place}", f"bias_{place}"], sum_, {"transB": 1}))
        if place < layers - 1:
            nodes.append(("Relu", [sum_], f"layer_{place + 1}", {}))
    return _model(nodes, held, network["layers"][0])


def scoring(metadata: Mapping[str, Any], weights: bytes, input_name: str, output_name: str) -> bytes:
    """A model in ONNX whose output is the calibrated score: float32[n, features] → float32[n, 1].

    Its scores are those of the handler to 1e-6. The archive's canned rows are held against that.

    Args:
        metadata: Of the archive.
        weights: Of the same.
        input_name: What the rows are to be called.
        output_name: What the scores are to be called.

    Raises:
        ValueError: There is no ONNX of this model, or this cannot be added to it; the message says what to do.
    """
    import onnx  # noqa: PLC0415 - as above
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415 - as above

    content, scored = _onnx_of(metadata, weights)
    model = onnx.compose.add_prefix(onnx.load_from_string(content), _OF_MODEL)
    opset = max((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), default=0)
    if opset < _LEAST_OPSET:
        raise ValueError(f"its opset is {opset}: export it with {_LEAST_OPSET} or a later one")
    given, output = f"{_OF_MODEL}{scored['input']}", f"{_OF_MODEL}{scored['output']}"
    calibration = metadata["calibration"]
    held: dict[str, NDArray[Any]] = {
        "flat": np.array([-1], np.int64),
        "slope": np.array(calibration["slope"], np.float64),
        "intercept": np.array(calibration["intercept"], np.float64),
        "by_row": np.array([-1, 1], np.int64),
    }
    before: list[_Node] = [("Identity", [input_name], given, {})]
    if scored["fill"] is not None:
        held["fill"] = np.array(scored["fill"], np.float32)
        before = [("IsNaN", [input_name], "undefined", {}), ("Where", ["undefined", "fill", input_name], given, {})]
    of_double = {"to": TensorProto.DOUBLE}
    after: list[_Node] = []
    if scored["column"]:  # of two; where there is one, its output may be flat
        held["column"] = np.array(scored["column"], np.int64)
        after, output = [("Gather", [output, "column"], "chosen", {"axis": 1})], "chosen"
    after += [
        ("Reshape", [output, "flat"], "single", {}),
        ("Cast", ["single"], "given", of_double),
    ]
    margin = "given"
    if scored["is_probability"]:
        margin = "odds"
        held |= {name: np.array(share) for name, share in (("least", LEAST_SHARE), ("most", MOST_SHARE), ("one", 1.0))}
        after += [
            ("Max", ["given", "least"], "above", {}),
            ("Min", ["above", "most"], "share", {}),
            ("Sub", ["one", "share"], "rest", {}),
            ("Log", ["share"], "log_share", {}),
            ("Log", ["rest"], "log_rest", {}),
            ("Sub", ["log_share", "log_rest"], margin, {}),
        ]
    after += [
        ("Mul", [margin, "slope"], "sloped", {}),
        ("Add", ["sloped", "intercept"], "calibrated", {}),
        ("Sigmoid", ["calibrated"], "score", {}),
        ("Cast", ["score"], "scores", {"to": TensorProto.FLOAT}),
        ("Reshape", ["scores", "by_row"], output_name, {}),
    ]
    graph, features = model.graph, len(metadata["feature_names"])
    nodes = [*_made(before), *graph.node, *_made(after)]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in held.items())
    graph.input.append(helper.make_tensor_value_info(input_name, TensorProto.FLOAT, ["n", features]))
    graph.output.append(helper.make_tensor_value_info(output_name, TensorProto.FLOAT, ["n", 1]))
    content = bytes(model.SerializeToString(deterministic=True))
    _prove(content, metadata, input_name)
    return content


def _onnx_of(metadata: Mapping[str, Any], weights: bytes) -> tuple[bytes, Mapping[str, Any]]:
    """A model in ONNX and how its output is read. Raises ValueError where there is none."""
    runtime = runtime_of(metadata)
    if runtime == "onnx":
        return weights, metadata["scored"]
    if runtime == "torch" and (network := metadata.get(METADATA)):
        return base64.b64decode(network["model"]), network["scored"]
    raise ValueError(f"there is no ONNX of a model of the kind {metadata['kind']}: serve it by TorchServe")


def _prove(content: bytes, metadata: Mapping[str, Any], input_name: str) -> None:
    """Holds a model's scores against the archive's own of its canned rows. Raises ValueError."""
    import onnxruntime  # noqa: PLC0415 - as above

    canned = metadata["canned"]
    rows = np.frombuffer(base64.b64decode(canned["rows"]), "<f4").reshape(-1, len(metadata["feature_names"]))
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {input_name: rows})
    off = float(np.max(np.abs(scores[:, 0] - np.array(canned["scores"], np.float32))))
    if not off <= _NEAR:
        raise ValueError(f"as ONNX its scores are up to {off:.3g} from those of its archive")


def _made(nodes: Sequence[_Node]) -> list[Any]:
    """The nodes as ONNX has them."""
    from onnx import helper  # noqa: PLC0415 - as above

    return [helper.make_node(operator, given, [output], **attributes) for operator, given, output, attributes in nodes]


def _model(
    nodes: list[_Node],
    held: Mapping[str, NDArray[np.float32] | np.float32],
    features: int,
) -> bytes:
    """A model of these nodes."""
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415 - as above

    graph = helper.make_graph(
        _made(nodes),
        "model",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["n", features])],
        [helper.make_tensor_value_info(MARGIN, TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in held.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION, producer_name="pretrade"
    )
    return bytes(model.SerializeToString(deterministic=True))
