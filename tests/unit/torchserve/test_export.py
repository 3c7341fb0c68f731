"""Archives repeat byte for byte and are what TorchServe's own archiver would make."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from feature_cache import features
from torchserve.dataset import Samples
from torchserve.export import metadata_of, write_archive
from torchserve.training import KINDS, TrainedModel, TrainingSettings, train


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_the_same_samples_give_the_same_archive(
    name: str, samples: Samples, settings: TrainingSettings, tmp_path: Path
) -> None:
    archives = []
    for directory in (tmp_path / "once", tmp_path / "again"):
        model = train(name, samples, settings)
        write_archive(model, metadata_of(model, samples, settings), directory)
        archives.append({path.name: path.read_bytes() for path in directory.glob("*.*")})
    assert archives[0] == archives[1]
    assert set(archives[0]) == {f"{name}.mar", f"{name}.json"}


def test_the_layout_is_that_of_the_model_archiver(store: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(store / "champion.mar") as ours:
        ours.extractall(tmp_path / "unpacked")
        our_names, our_manifest = set(ours.namelist()), json.loads(ours.read("MAR-INF/MANIFEST.json"))
    unpacked = tmp_path / "unpacked"
    command = [str(Path(sys.executable).with_name("torch-model-archiver")), "--model-name", "champion"]
    command += ["--version", our_manifest["model"]["modelVersion"], "--handler", str(unpacked / "handler.py")]
    command += ["--serialized-file", str(unpacked / "weights.bin"), "--extra-files", str(unpacked / "metadata.json")]
    subprocess.run([*command, "--export-path", str(tmp_path)], check=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    with zipfile.ZipFile(tmp_path / "champion.mar") as theirs:
        assert set(theirs.namelist()) == our_names
        for name in our_names - {"MAR-INF/MANIFEST.json"}:
            assert theirs.read(name) == (unpacked / name).read_bytes()
        their_manifest = json.loads(theirs.read("MAR-INF/MANIFEST.json"))
    assert their_manifest | {"createdOn": None} == our_manifest | {"createdOn": None}


def test_the_version_changes_with_all_that_can_change_a_score(
    models: dict[str, TrainedModel], samples: Samples, settings: TrainingSettings, tmp_path: Path
) -> None:
    model = models["champion"]
    known = metadata_of(model, samples, settings)
    changed = [
        (model, known),
        (replace(model, weights=models["challenger"].weights), known),
        *(
            (one, metadata_of(one, samples, settings))
            for one in (replace(model, slope=model.slope + 1e-9), replace(model, threshold=0.5))
        ),
        (model, known | {"kind": "torch"}),
    ]
    versions = [write_archive(one, metadata, tmp_path) for one, metadata in changed]
    versions.append(write_archive(model, metadata_of(model, samples, settings) | {"expires_at": 1}, tmp_path))
    assert len(set(versions)) == len(versions)


def test_an_archive_that_is_replaced_is_kept_by_its_version(
    models: dict[str, TrainedModel], samples: Samples, settings: TrainingSettings, tmp_path: Path
) -> None:
    model = models["champion"]
    before = write_archive(model, metadata_of(model, samples, settings), tmp_path)
    content = (tmp_path / "champion.mar").read_bytes()
    after = write_archive(model, metadata_of(model, samples, settings) | {"expires_at": 1}, tmp_path)
    assert {path.stem for path in (tmp_path / "versions").iterdir()} == {before, after}
    assert (tmp_path / "versions" / f"{before}.mar").read_bytes() == content


def test_the_metadata_beside_an_archive_says_what_it_is(store: Path, samples: Samples) -> None:
    described = json.loads((store / "champion.json").read_text())
    with zipfile.ZipFile(store / "champion.mar") as archive:
        inside = json.loads(archive.read("metadata.json"))
        manifest = json.loads(archive.read("MAR-INF/MANIFEST.json"))
    assert described == {"version": manifest["model"]["modelVersion"], **inside}
    assert len(bytes.fromhex(described["version"])) == 8
    assert described["name"] == "champion"
    assert described["feature_set_fingerprint"] == features.MF1.fingerprint
    assert described["label"] == samples.label.model_dump() | {"text": samples.label.text}
    assert described["data"] == {
        "source": "simulated for tests",
        "source_sha256": "",
        "samples": len(samples.rows),
        "sha256": samples.sha256(),
    }
    assert set(described["metrics"]) == {"threshold", "test"}
    assert set(described["reference"]) == {*features.NAMES, "score"}


def test_a_version_that_is_not_installed_leaves_what_the_stack_starts_with(
    models: dict[str, TrainedModel], samples: Samples, settings: TrainingSettings, tmp_path: Path
) -> None:
    model = models["champion"]
    installed = write_archive(model, metadata_of(model, samples, settings), tmp_path)
    metadata = metadata_of(model, samples, settings) | {"expires_at": 1}
    published = write_archive(model, metadata, tmp_path, install=False)
    assert json.loads((tmp_path / "champion.json").read_text())["version"] == installed != published
    described = json.loads((tmp_path / "versions" / f"{published}.json").read_text())
    assert described == json.loads(json.dumps({"version": published, **metadata}))
