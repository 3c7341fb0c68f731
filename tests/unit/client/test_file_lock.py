"""Locks on files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pretrade.client.file_lock import take_lock


def test_only_one_holder_at_a_time_has_the_lock(tmp_path: Path) -> None:
    lock = take_lock(tmp_path / "lock")
    assert lock is not None
    assert take_lock(tmp_path / "lock") is None
    os.close(lock)
    again = take_lock(tmp_path / "lock")
    assert again is not None
    os.close(again)


def test_several_may_share_a_lock_that_nobody_has_alone(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    shared = [take_lock(tmp_path / "lock", shared=True) for _ in range(2)]
    assert None not in shared
    assert take_lock(tmp_path / "lock") is None
    for lock in shared:
        assert lock is not None
        os.close(lock)


def test_a_lock_that_somebody_has_alone_is_not_shared(tmp_path: Path) -> None:
    lock = take_lock(tmp_path / "lock")
    assert lock is not None
    assert take_lock(tmp_path / "lock", shared=True) is None
    os.close(lock)


def test_a_missing_file_is_made_only_where_that_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        take_lock(tmp_path / "lock", create=False)
    lock = take_lock(tmp_path / "lock")
    assert lock is not None
    os.close(lock)
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
