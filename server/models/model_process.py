"""Runs the handler of an unpacked model archive: `python -m server.models.model_process DIRECTORY VERSION`.

It is a child of the process that replays or explains. A request on standard input is a byte, SCORE or EXPLAIN, the
fingerprint of the rows' feature set (u32, looked at for SCORE alone), and a frame with the bytes that TorchServe would
hand to the handler as `input`. A frame is a little-endian u32 length and that many bytes. Each answer is a frame on
standard output: the handler's own answer, or its explanation as JSON. The process exits when its input ends, and when
the handler refuses the rows.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np

SCORE: Final = 0
EXPLAIN: Final = 1
_REQUEST: Final = struct.Struct("<BII")
_LENGTH: Final = struct.Struct("<I")


def main(directory: Path, version: str) -> None:
    """Answers frames until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    handler = _handler(directory, version)
    shutil.rmtree(directory)  # it is loaded; whichever process is killed, nothing stays behind
    while header := sys.stdin.buffer.read(_REQUEST.size):
        question, fingerprint, length = _REQUEST.unpack(header)
        rows = sys.stdin.buffer.read(length)
        if question == EXPLAIN:
            answer = _explanation(handler, rows)
        else:
            (answer,) = handler.handle([{"input": rows, "feature_set": b"%08x" % fingerprint}], None)
        answers.write(_LENGTH.pack(len(answer)) + answer)
        answers.flush()


def _explanation(handler: Any, row: bytes) -> bytes:
    return json.dumps(handler.explain(np.frombuffer(row, dtype="<f4"))).encode()


def _handler(directory: Path, version: str) -> Any:
    """The archive's handler, initialised as TorchServe's worker does it."""
    spec = importlib.util.spec_from_file_location("handler", directory / "handler.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handler = module.ModelHandler()
    handler.initialize(
        SimpleNamespace(system_properties={"model_dir": str(directory)}, manifest={"model": {"modelVersion": version}})
    )
    return handler


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
