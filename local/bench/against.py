"""An older commit, whose servers the benchmark calls in turn with those of today."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
_PATHS: Final = ("", "client", "proto/gen")
"""Where a checkout has its packages."""


@contextmanager
def interpreter_of(commit: str, folder: Path, root: Path = ROOT) -> Iterator[Path]:
    """An interpreter that runs another commit of this repository, with today's dependencies.

    Its compiled modules are made from its own sources.

    Args:
        commit: As Git names it.
        folder: For its checkout and its environment; they are removed at the end.
        root: The repository.

    Raises:
        RuntimeError: There is no such commit here, or its modules cannot be compiled.
    """
    folder = folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    git = ["git", "-C", str(root), "worktree"]
    checkout = folder / "checkout"
    _run([*git, "prune"])  # of a run that was killed
    _run([*git, "add", "--detach", "--force", str(checkout), commit])
    try:
        environment = folder / "environment"
        venv.create(environment, symlinks=True)
        python = environment / "bin" / "python"
        # The packages of this environment come last: what points to this repository in it is not followed.
        paths = [*(str(checkout / path) for path in _PATHS), sysconfig.get_path("purelib")]
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
        (packages / "against.pth").write_text("\n".join(paths) + "\n")
        _run([str(python), "hatch_compile.py"], checkout)
        yield python
    finally:
        _run([*git, "remove", "--force", str(checkout)])


def _run(argv: list[str], where: Path | None = None) -> None:
    done = subprocess.run(argv, cwd=where, capture_output=True, text=True, check=False)  # noqa: S603 - commands of ours
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv[:5])}: {(done.stderr or done.stdout).strip()[-500:]}")
