"""Models as ONNX, for runtimes that are not the archive's own: the embedded stage, Triton and MLServer.

A network that Torch scores is written as ONNX when its archive is made, and is part of the metadata, so that the
version's hash covers it. What is served by TorchServe stays Torch; a server that loads the other one holds it against
the archive's reference scores first.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

INPUT: Final = "rows"
MARGIN: Final = "margin"
METADATA: Final = "onnx"
"""Where the metadata have the network: `model`, base64, and `scored`, as of a model that was brought in ONNX."""
_OPSET: Final = 17
_IR_VERSION: Final = 9
"""Of the year of the opset: what runtimes of the last years read."""


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
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = [
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


def _model(
    nodes: list[tuple[str, list[str], str, dict[str, Any]]],
    held: Mapping[str, NDArray[np.float32] | np.float32],
    features: int,
) -> bytes:
    """A model of these nodes, each with its operator, inputs, output and attributes."""
    from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415 - as above

    graph = helper.make_graph(
        [helper.make_node(operator, given, [output], **attributes) for operator, given, output, attributes in nodes],
        "model",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["n", features])],
        [helper.make_tensor_value_info(MARGIN, TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in held.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION, producer_name="pretrade"
    )
    return bytes(model.SerializeToString(deterministic=True))
