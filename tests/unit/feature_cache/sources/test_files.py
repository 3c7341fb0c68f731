"""Lines of plain and packed files, how far they are read, and the merge on one clock."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_cache.sources.files import Progress, SessionError, in_order, read_lines


@pytest.mark.parametrize("name", ["lines", "lines.gz", "lines.txt"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_content_tells_whether_a_file_is_packed(tmp_path: Path, name: str, packed: bool) -> None:
    text = b"one\ntwo"
    (tmp_path / name).write_bytes(gzip.compress(text) if packed else text)
    assert list(read_lines(tmp_path / name)) == [(1, b"one\n"), (2, b"two")]


def test_an_empty_file_has_no_lines_and_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert list(read_lines(tmp_path / "empty")) == []
    with pytest.raises(SessionError, match="absent: damaged after line 0"):
        list(read_lines(tmp_path / "absent"))


def test_the_share_that_was_read_grows_to_all_of_it(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for path in files:
        path.write_bytes(b"0123456789\n" * 20_000)
    progress = Progress(files)
    shares = [progress.share for path in files for _ in read_lines(path, progress)]
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert 0.3 < shares[20_000] <= 0.5
    assert progress.share == 1.0


@given(st.lists(st.lists(st.integers(0, 100))))
def test_what_is_in_order_each_is_merged_in_order(parts: list[list[int]]) -> None:
    sources = [(min(part, default=0), iter(sorted(part))) for part in parts]
    assert list(in_order(sources, int)) == sorted(value for part in parts for value in part)


def test_a_source_is_begun_no_earlier_than_its_first_time() -> None:
    begun: list[int] = []

    def source(first: int) -> Iterator[int]:
        begun.append(first)
        yield from range(first, first + 3)

    merged = in_order([(first, source(first)) for first in (20, 0, 10)], int)
    assert [next(merged) for _ in range(3)] == [0, 1, 2]
    assert begun == [0]
    assert next(merged) == 10
    assert begun == [0, 10]
