"""`python -m fuzz TARGET SECONDS`: one target, for so long, from its corpus. `make fuzz` runs each."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Final

import atheris

HERE: Final = Path(__file__).parent
CORPUS: Final = HERE / "corpus"
CRASHES: Final = HERE / "crashes"
_MAX_BYTES: Final = 512


def main() -> None:
    """Fuzzes; ends the process, with another code than 0 when an input broke a promise."""
    target, seconds = sys.argv[1], sys.argv[2]
    with atheris.instrument_imports(include=["server.http", "server.rpc", "feature_cache.features", "fuzz.targets"]):
        from fuzz.targets import TARGETS  # noqa: PLC0415 - instrumented while it is imported
    crashes = CRASHES / target
    crashes.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as found:  # what it learns stays out of the corpus that we keep
        options = [
            f"-max_total_time={seconds}",
            f"-max_len={_MAX_BYTES}",
            "-timeout=10",
            "-print_final_stats=1",
            f"-artifact_prefix={crashes}/",
        ]
        atheris.Setup([sys.argv[0], *options, found, str(CORPUS / target)], TARGETS[target])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
