"""Which modules run compiled."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from support.twins import compiled_here

import hatch_compile
from feature_cache import compiled

MODULE = compiled.SOURCES[0]


@pytest.fixture(autouse=True)
def no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compiled.SWITCH, raising=False)


def test_every_source_is_listed_and_every_listed_source_is_there() -> None:
    root = Path(compiled.__file__).parents[1]
    sources = [path for folder in ("feature_cache", "fallback", "server") for path in root.glob(f"{folder}/**/*.pyx")]
    found = {".".join(path.relative_to(root).with_suffix("").parts) for path in sources}
    assert found == set(compiled.SOURCES)


def test_a_compiled_module_is_used() -> None:
    module = compiled_here(MODULE)
    assert module.__file__.endswith(tuple(EXTENSION_SUFFIXES))
    assert MODULE in compiled.in_use()


def test_one_that_was_made_from_another_source_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_here(MODULE)
    monkeypatch.setattr(compiled, "digest", lambda name: "of a source that was changed since")
    assert compiled.compiled(MODULE) is None
    assert compiled.in_use() == ()


def test_one_that_cannot_be_loaded_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As one that was made for another machine."""
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "broken_c.pyx").touch()
    (tmp_path / "server" / f"broken_c{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    monkeypatch.setattr(compiled, "_ROOT", tmp_path)
    monkeypatch.setattr("server.__path__", [str(tmp_path / "server")])
    assert compiled.compiled("server.broken_c") is None


def test_the_switch_has_everything_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.SWITCH, "0")
    assert compiled.in_use() == ()
    with pytest.raises(hatch_compile.Unavailable, match="PRETRADE_COMPILED is 0"):
        hatch_compile.build()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "ziglang" else found(n))


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_nothing_is_compiled_and_it_says_why() -> None:
    with pytest.raises(hatch_compile.Unavailable, match="no C compiler, and the package ziglang"):
        hatch_compile.build()


def test_without_pythons_headers_nothing_is_compiled_and_it_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(hatch_compile.Unavailable, match=r"Python\.h is missing"):
        hatch_compile.build()


def test_a_server_that_runs_keeps_the_module_that_it_has_mapped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def rename(source: object, destination: object) -> None:
        raise OSError(errno.EXDEV, "the folder for temporary files is on another volume")

    fresh, made = tmp_path / "fresh", tmp_path / "module.so"
    fresh.write_bytes(b"new")
    made.write_bytes(b"old")
    monkeypatch.setattr(os, "rename", rename)
    with made.open("rb") as mapped:
        hatch_compile._put(fresh, made)
        assert mapped.read() == b"old"
    assert made.read_bytes() == b"new"


def test_zig_is_taken_where_the_machine_has_no_compiler_and_for_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert hatch_compile.compiler(portable=False) == ("gcc", ["gcc"])
    name, command = hatch_compile.compiler(portable=True)
    assert (name, command[:4]) == ("zig", [sys.executable, "-m", "ziglang", "cc"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert hatch_compile.compiler(portable=False)[0] == "zig"
