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

GIVEN: Final = "input__0"
"""What `scoring` calls the rows, in Triton's way."""
SCORES: Final = "output__0"
"""What it calls the scores."""
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
_WITHOUT_INPUTS: Final = 4
"""The format of this version is the first whose weights need not be named as inputs, too."""
_Node = tuple[str, list[str], str, dict[str, Any]]
"""Operator, inputs, output and attributes."""
_Held = dict[str, NDArray[Any]]
"""Constants of a graph by name."""


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


def scoring(metadata: Mapping[str, Any], weights: bytes) -> bytes:
    """A model in ONNX whose output is the calibrated score: `GIVEN` float32[n, features] → `SCORES` float32[n, 1].

    Its scores are those of the handler to 1e-6. The archive's canned rows are held against that.

    Args:
        metadata: Of the archive.
        weights: Of the same.

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
    model.ir_version = max(model.ir_version, _WITHOUT_INPUTS)
    before, filling = _defined(f"{_OF_MODEL}{scored['input']}", scored["fill"])
    after, calibrating = _scored(f"{_OF_MODEL}{scored['output']}", scored, metadata["calibration"])
    graph, features = model.graph, len(metadata["feature_names"])
    nodes = [*_made(before), *graph.node, *_made(after)]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in (filling | calibrating).items())
    graph.input.append(helper.make_tensor_value_info(GIVEN, TensorProto.FLOAT, ["n", features]))
    graph.output.append(helper.make_tensor_value_info(SCORES, TensorProto.FLOAT, ["n", 1]))
    content = bytes(model.SerializeToString(deterministic=True))
    _prove(content, metadata)
    return content


def _defined(given: str, fill: Sequence[float] | None) -> tuple[list[_Node], _Held]:
    """What leads from the rows to the input of that name, as `handler.filled` does."""
    if fill is None:
        return [("Identity", [GIVEN], given, {})], {}
    nodes: list[_Node] = [("IsNaN", [GIVEN], "undefined", {}), ("Where", ["undefined", "fill", GIVEN], given, {})]
    return nodes, {"fill": np.array(fill, np.float32)}


def _scored(output: str, scored: Mapping[str, Any], calibration: Mapping[str, float]) -> tuple[list[_Node], _Held]:
    """What leads from the output of that name to the scores, as `handler.margins_in` and `calibrated` do."""
    from onnx import TensorProto  # noqa: PLC0415 - as above

    held = {name: np.array(calibration[name]) for name in ("slope", "intercept")}
    held |= {"flat": np.array([-1]), "by_row": np.array([-1, 1])}
    nodes: list[_Node] = []
    if scored["column"]:  # of two; where there is one, the output may be flat
        held["column"] = np.array(scored["column"])
        nodes, output = [("Gather", [output, "column"], "chosen", {"axis": 1})], "chosen"
    nodes += [("Reshape", [output, "flat"], "single", {}), ("Cast", ["single"], "value", {"to": TensorProto.DOUBLE})]
    margin = "value"
    if scored["is_probability"]:
        margin = "odds"
        held |= {"least": np.array(LEAST_SHARE), "most": np.array(MOST_SHARE), "one": np.array(1.0)}
        nodes += [
            ("Max", ["value", "least"], "above", {}),
            ("Min", ["above", "most"], "share", {}),
            ("Sub", ["one", "share"], "rest", {}),
            ("Log", ["share"], "log_share", {}),
            ("Log", ["rest"], "log_rest", {}),
            ("Sub", ["log_share", "log_rest"], margin, {}),
        ]
    nodes += [
        ("Mul", [margin, "slope"], "sloped", {}),
        ("Add", ["sloped", "intercept"], "calibrated", {}),
        ("Sigmoid", ["calibrated"], "score", {}),
        ("Cast", ["score"], "scores", {"to": TensorProto.FLOAT}),
        ("Reshape", ["scores", "by_row"], SCORES, {}),
    ]
    return nodes, held


def _onnx_of(metadata: Mapping[str, Any], weights: bytes) -> tuple[bytes, Mapping[str, Any]]:
    """A model in ONNX and how its output is read. Raises ValueError where there is none."""
    runtime = runtime_of(metadata)
    if runtime == "onnx":
        return weights, metadata["scored"]
    if runtime == "torch" and (network := metadata.get(METADATA)):
        return base64.b64decode(network["model"]), network["scored"]
    raise ValueError(f"there is no ONNX of a model of the kind {metadata['kind']}: serve it by TorchServe")


def _prove(content: bytes, metadata: Mapping[str, Any]) -> None:
    """Holds a model's scores against the archive's own of its canned rows. Raises ValueError."""
    import onnxruntime  # noqa: PLC0415 - as above

    canned = metadata["canned"]
    rows = np.frombuffer(base64.b64decode(canned["rows"]), "<f4").reshape(-1, len(metadata["feature_names"]))
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {GIVEN: rows})
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
