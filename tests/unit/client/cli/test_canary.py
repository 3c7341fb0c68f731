"""The list of models fits 80 columns, cuts nothing off, and says which version decides and how good it is."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from pretrade.admin.v1 import admin_pb2
from pretrade.client.cli.canary import _print_models


def model(version: str, *aliases: str, **more: Any) -> admin_pb2.ModelVersion:
    said: dict[str, Any] = {"kind": "xgboost", "standing": "does not beat the rules"}
    return admin_pb2.ModelVersion(
        model_version=version, name="champion", aliases=aliases, created_at=Timestamp(seconds=1), **(said | more)
    )


def test_only_the_version_that_decides_is_called_champion(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    loaded = ["primary", "secondary", "challenger"]
    _print_models(
        [
            model("aa" * 8, "candidate", standing="no card says how good it is"),
            model("bb" * 8, "champion", loaded_on=loaded, card="models/cards/bb/card.md"),
            model("cc" * 8, problem="unreadable: [no] zip"),
            model("dd" * 8, standing="does not beat always trading and logistic regression"),
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == f"{'aa' * 8}  candidate   xgboost  not loaded"
    assert lines[1].endswith("no card says how good it is")
    assert lines[2] == f"{'bb' * 8}  champion    xgboost  on primary, secondary, challenger"
    assert lines[3].endswith("does not beat the rules")
    assert lines[4].split()[:2] == ["cc" * 8, "–"]
    assert lines[5].endswith("unreadable: [no] zip")
    assert lines[7].endswith("  does not beat always trading and logistic regression")
    assert lines[8] == "champion bbbbbbbb: does not beat the rules; card: models/cards/bb/card.md"
    assert "champion" not in lines[0] + lines[1] + lines[4] + lines[5]
