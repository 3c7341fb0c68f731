"""Sockets lie where their paths fit, for one user alone, and a supervisor that was killed leaves none of them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from server.process import short_paths
from server.process.private_directory import private_directory
from server.process.short_paths import short_directory


@pytest.fixture
def lock(tmp_path: Path) -> int:
    return os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT, 0o600)


def test_a_supervisor_that_ends_leaves_no_files(lock: int) -> None:
    with private_directory(lock) as directory:
        (directory / "secret").write_text("key")
        assert directory.stat().st_mode & 0o077 == 0
    assert not directory.exists()


def test_the_next_supervisor_removes_what_one_that_was_killed_left(lock: int) -> None:
    killed = private_directory(lock)
    left = killed.__enter__()
    (left / "secret").write_text("key")
    with private_directory(lock) as directory:
        assert directory != left
        assert not left.exists()


def test_nothing_but_such_a_directory_is_ever_removed(lock: int, tmp_path: Path) -> None:
    os.pwrite(lock, os.fsencode(tmp_path), 0)
    with private_directory(lock):
        assert tmp_path.exists()


def test_a_folder_for_temporary_files_with_a_long_path_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lock: int
) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with private_directory(lock) as directory:
        assert not directory.is_relative_to(long)
        assert len(os.fsencode(directory / "admin-12.sock")) < 104
    monkeypatch.setattr(short_paths, "_SHORT", ("/nowhere",))
    with pytest.raises(OSError, match="set TMPDIR to a folder whose path has at most 60 bytes"):
        short_directory()
