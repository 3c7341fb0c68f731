"""The part of the OpenAPI document that a port serves."""

from __future__ import annotations

import json

from openapi_spec_validator import OpenAPIV31SpecValidator

from server.http.document import FILE, document_of


def test_a_port_describes_its_own_paths_and_what_they_need() -> None:
    served = json.loads(document_of({"/v1/decide", "/health", "/unknown"}))
    OpenAPIV31SpecValidator(served).validate()
    assert set(served["paths"]) == {"/v1/decide", "/health"}
    assert [tag["name"] for tag in served["tags"]] == ["DecisionService", "Server"]
    schemas = served["components"]["schemas"]
    assert "pretrade.decision.v1.StageUse" in schemas, "a part of a part of the answer"
    assert not [name for name in schemas if ".admin." in name]


def test_a_port_with_every_path_describes_all() -> None:
    whole = json.loads(FILE.read_text())
    assert json.loads(document_of(set(whole["paths"]))) == whole
