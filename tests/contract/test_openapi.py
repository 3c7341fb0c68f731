"""schemathesis calls every path of the OpenAPI document with what it allows and what it does not.

The server is a real one, alone on its loopback: calls that halt or change it are among them. Each call has a deadline
that no machine misses, and so has each order, as one that has passed is answered 504 by contract. What is watched ends
at its deadline alone, which is therefore short. Envoy's decision port has a document of its own, of what it answers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import pytest
from support.harness import INSTRUMENTS
from support.server_group import server_group

from local.stack.ports import free_ports
from pretrade.client import operator_token

pytestmark = pytest.mark.stack
_SEED: Final = 20_260_105
_CHECKS: Final = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@dataclass
class Served:
    """A server, and who may do everything to it."""

    url: str
    token: str


_WATCHED: Final = "/events$"
"""The paths of what is watched."""
_OF_SECONDS: Final = r"^(-?[1-9][0-9]{0,11}(\.[0-9]{1,9})?|-?0)s$"
"""An order's own time: a second at least, or none or less, which is refused."""


@pytest.fixture(params=[pytest.param("http port", marks=pytest.mark.long), "envoy"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    (port,) = free_ports(1)
    edge = "envoy" if request.param == "envoy" else "grpcio"
    # A machine with other work may stop for longer than a decision may take, which would be a 504.
    settings = {"PRETRADE_GRPC__EDGE": edge, "PRETRADE_HTTP__PORT": str(port), "PRETRADE_BUDGET__CAP_SECONDS": "5"}
    with server_group(tmp_path, 1, **settings) as group:
        at = group.decision if edge == "envoy" else f"127.0.0.1:{port}"
        yield Served(f"http://{at}", operator_token.path_from(group.env).read_text().strip())


def called(served: Served, directory: Path, timeout: str, *arguments: str) -> tuple[int, str]:
    """Calls every path with this deadline; schemathesis' exit code and what it prints."""
    described = json.loads(httpx.get(f"{served.url}/openapi.json").text.replace("BTCUSDT.BINANCE", INSTRUMENTS[0]))
    of_an_order = described["components"]["schemas"]["pretrade.decision.v1.Order"]["properties"]["timeout"]
    of_an_order |= {"pattern": _OF_SECONDS, "examples": ["60s"]}
    document = directory / "openapi.json"
    document.write_text(json.dumps(described).replace('"timeout": "0.5s"', '"timeout": "60s"'))
    command = [str(Path(sys.executable).with_name("schemathesis")), "--no-color", "run", str(document)]
    command += ["--url", served.url, "--seed", str(_SEED), "--checks", ",".join(_CHECKS), "--continue-on-failure"]
    command += ["--header", f"Authorization: Bearer {served.token}", "--header", f"grpc-timeout: {timeout}"]
    command += ["--generation-database", "none", "--no-shrink", "--request-timeout", "90", *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.long
def test_no_call_that_the_document_allows_or_forbids_ends_with_a_fault_of_the_server(
    served: Served, tmp_path: Path
) -> None:
    check(served, tmp_path, "--phases", "fuzzing", "--max-examples", "5")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_nor_does_any_of_thousands(served: Served, tmp_path: Path) -> None:
    check(served, tmp_path, "--phases", "examples,coverage,fuzzing", "--max-examples", "25")


def check(served: Served, directory: Path, *arguments: str) -> None:
    """Calls every path, and fails unless all answers are such as the document says."""
    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    watched = [path for path in paths if re.search(_WATCHED, path)]
    others = sum(len(item) for item in paths.values()) - len(watched)
    for path in watched:  # the first one waits for the process that reads the audit
        shown = {"authorization": f"Bearer {served.token}"}
        with httpx.stream("GET", f"{served.url}{path}", headers=shown, timeout=60.0) as answer:
            assert next(answer.iter_lines()) == "retry: 1000"
    for tested, timeout, which in ((others, "60S", "exclude"), (len(watched), "1S", "include")):
        if not tested:
            continue
        code, printed = called(served, directory, timeout, f"--{which}-path-regex", _WATCHED, *arguments)
        print(printed[printed.rfind("SUMMARY") :])  # pytest shows it with -rP
        assert code == 0, printed
        assert f"Tested: {tested}" in printed, printed
