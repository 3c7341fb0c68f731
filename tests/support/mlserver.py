"""A real MLServer, from its own environment: `make mlserver` makes it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from local.stack.ports import free_ports

MLSERVER: Final = (
    Path(os.environ.get("MLSERVER_VENV", Path(__file__).parents[2] / ".venv-mlserver")) / "bin" / "mlserver"
)


@contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process of one that serves the models in `folder`, and its `HOST:PORT` for gRPC. It writes `mlserver.log`."""
    http, grpc_port, metrics = free_ports(3)
    ports: dict[str, Any] = {"host": "127.0.0.1", "http_port": http, "grpc_port": grpc_port, "metrics_port": metrics}
    alone = {"parallel_workers": 0, "environments_dir": str(folder)}
    (folder / "settings.json").write_text(json.dumps(ports | alone))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (folder / "mlserver.log").open("wb") as log:
        process = subprocess.Popen(
            [str(MLSERVER), "start", str(folder)], env=environment, cwd=folder, stdout=log, stderr=log
        )
    try:
        yield process, f"127.0.0.1:{grpc_port}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()
