"""Compiles what has a Cython source. `feature_cache/compiled.py` lists it, and says what happens without a compiler.

`make setup` runs this file; a build of the wheel uses it as Hatchling's hook. The compiler is the machine's own, or,
where it has none, that of the `ziglang` wheel.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from feature_cache.compiled import SOURCES, SWITCH, digest, source  # noqa: E402 - found by the line above

_OLDEST_GLIBC = "2.17"
"""For which the wheel is built with Zig, which has every version of it: manylinux2014."""


class Unavailable(Exception):  # noqa: N818 - no error: Python does the same
    """Why nothing can be compiled here."""


def compiler(*, portable: bool) -> tuple[str, list[str]]:
    """A compiler's name and command.

    Args:
        portable: What it makes is to run on other machines, too.

    Raises:
        Unavailable: There is none, or Python's headers are missing.
    """
    if os.environ.get(SWITCH) == "0":
        raise Unavailable(f"{SWITCH} is 0")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.exists():
        raise Unavailable(f"{headers} is missing; a package such as python3-dev brings it")
    has_zig = importlib.util.find_spec("ziglang") is not None
    own = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if has_zig and (portable or own is None):
        target = [f"--target={platform.machine()}-linux-gnu.{_OLDEST_GLIBC}"] if portable and _is_linux() else []
        return "zig", [sys.executable, "-m", "ziglang", "cc", *target]
    if own is None:
        raise Unavailable("there is no C compiler, and the package ziglang, which brings one, is not installed")
    return own, [own]


def build(*, portable: bool = False) -> tuple[str, list[Path]]:
    """Compiles every module beside its source; the compiler's name, and the files that it made.

    Raises:
        Unavailable: It cannot be done here; nothing was changed.
    """
    name, command = compiler(portable=portable)
    if importlib.util.find_spec("Cython") is None:
        raise Unavailable("the package Cython is not installed")
    made = []
    for module in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            made.append(_compile(module, command, Path(folder)))
    return name, made


def _compile(module: str, command: list[str], folder: Path) -> Path:
    beside = source(module)
    copy = folder / beside.name
    copy.write_text(f'{beside.read_text()}\n\nSOURCE_SHA256 = "{digest(module)}"\n')
    c_file = copy.with_suffix(".c")
    _run([sys.executable, "-m", "cython", "--module-name", module, "-o", str(c_file), str(copy)])
    made = beside.with_suffix(sysconfig.get_config_var("EXT_SUFFIX"))
    headers = f"-I{sysconfig.get_path('include')}"
    flags = [
        "-O2",
        "-shared",
        "-fPIC",
        "-ffp-contract=off",  # to multiply and add in one rounds otherwise than Python does
        headers,
        *(("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()),
        *more_flags(),
    ]
    fresh = folder / made.name
    _run([*command, *flags, str(c_file), "-o", str(fresh)])
    _put(fresh, made)
    return made


def more_flags() -> list[str]:
    """What `CFLAGS` says, which comes last: `make sanitize` sets it."""
    return shlex.split(os.environ.get("CFLAGS", ""))


def _put(fresh: Path, made: Path) -> None:
    """Puts a file in the place of another one at once.

    A server that runs has the old one mapped into its memory: it must not be written over. The folder for temporary
    files may be on another volume, from which a file cannot be renamed.
    """
    beside = made.with_name(f"{made.name}.new")
    shutil.copy(fresh, beside)
    beside.replace(made)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a command of ours
    if done.returncode:
        raise Unavailable(f"{' '.join(command[:4])} … failed: {(done.stderr or done.stdout).strip()[-500:]}")


def _is_linux() -> bool:
    return sys.platform == "linux"


class CustomBuildHook(BuildHookInterface[Any]):
    """Adds the compiled modules to a wheel, which then is for one Python on one kind of machine."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before the wheel is made."""
        if version == "editable":
            return
        try:
            name, made = build(portable=True)
        except Unavailable as why:
            self.app.display_warning(f"nothing is compiled, Python does the same more slowly: {why}")
            return
        self.app.display_info(f"compiled by {name}: {', '.join(SOURCES)}")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        if name == "zig" and _is_linux():
            python = f"cp{sys.version_info.major}{sys.version_info.minor}"
            oldest = _OLDEST_GLIBC.replace(".", "_")
            build_data["infer_tag"] = False
            build_data["tag"] = f"{python}-{python}-manylinux_{oldest}_{platform.machine()}"
        build_data["artifacts"] += [f"/{path.relative_to(ROOT)}" for path in made]


if __name__ == "__main__":
    try:
        used, _ = build()
    except Unavailable as reason:
        print(f"Nothing is compiled, Python does the same more slowly: {reason}")
    else:
        print(f"Compiled by {used}: {', '.join(SOURCES)}")
