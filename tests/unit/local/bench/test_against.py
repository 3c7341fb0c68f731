"""An older commit runs by itself, with today's dependencies and modules compiled from its own sources."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from local.bench.against import interpreter_of

COMPILES = "from pathlib import Path; Path('server/compiled.py').write_text(\"FROM = %r\")"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits, each of which says which one it is."""
    root = tmp_path / "repository"
    (root / "server").mkdir(parents=True)
    git(root, "init", "--quiet")
    for version in ("old", "new"):
        (root / "server" / "__init__.py").write_text(f"VERSION = {version!r}\n")
        (root / "hatch_compile.py").write_text(COMPILES % version)
        git(root, "add", ".")
        git(root, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", version)
        git(root, "tag", version)
    return root


def git(root: Path, *arguments: str) -> str:
    argv = ["git", "-C", str(root), *arguments]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def test_an_older_commit_runs_as_it_was_and_leaves_nothing(repository: Path, tmp_path: Path) -> None:
    says = "import server, server.compiled, numpy; print(server.VERSION, server.compiled.FROM)"
    with interpreter_of("old", tmp_path / "older", repository) as python:
        done = subprocess.run([python, "-c", says], check=True, capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.split() == ["old", "old"]
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert not (tmp_path / "older" / "checkout").exists()


def test_a_commit_that_is_not_there_is_named(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nowhere"), interpreter_of("nowhere", tmp_path / "older", repository):
        pass
