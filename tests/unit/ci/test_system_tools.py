"""`.ci/system-tools`, with a system of its own: what it may do there, and what it says when it may not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

SCRIPT: Final = Path(__file__).parents[3] / ".ci" / "system-tools"
BASICS: Final = (
    "bash",
    "chmod",
    "cp",
    "env",
    "mktemp",
    "paste",
    "printf",
    "rm",
    "sleep",
    "sort",
    "tail",
    "tee",
    "timeout",
    "true",
)


class System:
    """A PATH of its own, with a user, and perhaps apt and sudo."""

    def __init__(self, directory: Path, user: int = 0) -> None:
        self.bin = directory / "bin"
        self.bin.mkdir()
        self.calls = directory / "calls"
        for name in BASICS:
            if found := shutil.which(name):
                (self.bin / name).symlink_to(found)
        self.program("id", f"echo {user}")

    def program(self, name: str, code: str) -> None:
        path = self.bin / name
        path.write_text(f'#!{shutil.which("sh")}\necho "{name} $*" >> {self.calls}\n{code}\n')
        path.chmod(0o755)

    def run(self, *wanted: str, seconds: float = 20.0) -> list[str]:
        """What it says; it never fails, since the tests say what they lack."""
        env = {"PATH": str(self.bin), "SYSTEM_TOOLS_SECONDS": str(seconds), "TMPDIR": str(self.bin.parent)}
        env["SYSTEM_TOOLS_POLICY"] = str(self.bin.parent / "policy")
        done = subprocess.run([SCRIPT, *wanted], env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        return done.stderr.splitlines()

    def called(self, start: str) -> list[str]:
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [call for call in calls if call.startswith(start)]


def test_what_is_there_is_not_asked_for(tmp_path: Path) -> None:
    system = System(tmp_path)
    system.program("strace", "")
    system.program("apt-get", "exit 1")
    assert system.run("strace") == []
    assert system.called("apt-get") == []


@pytest.mark.parametrize(("there", "said"), [("google-chrome", []), ("strace", ["system tools: installing chromium"])])
def test_a_chrome_is_a_browser_too(tmp_path: Path, there: str, said: list[str]) -> None:
    system = System(tmp_path)
    system.program(there, "")
    system.program("apt-get", f'case "$*" in *--no-download*) cp {system.bin}/id {system.bin}/chromium;; esac')
    assert system.run("chromium") == said


def test_root_installs_what_lacks_and_starts_no_server(tmp_path: Path) -> None:
    system = System(tmp_path)
    policy = tmp_path / "policy"
    system.program("strace", "")
    made = f"cp {system.bin}/strace {system.bin}/promtool; cp {system.bin}/strace {system.bin}/prometheus"
    system.program(
        "apt-get", f'case "$*" in *--no-download*) {shutil.which("cat")} {policy} >> {system.calls}; {made};; esac'
    )
    assert system.run("strace", "promtool", "prometheus") == ["system tools: installing prometheus"]
    assert len(system.called("apt-get")) == 3
    assert [call for call in system.called("apt-get") if " prometheus" in call and "strace" not in call][-1]
    assert "exit 101" in system.calls.read_text(), "no policy keeps the package from starting its server"
    assert not policy.exists()


def test_a_policy_of_the_systems_own_is_left_alone(tmp_path: Path) -> None:
    system = System(tmp_path)
    (tmp_path / "policy").write_text("theirs")
    system.program("apt-get", "true")
    assert system.run("strace")[-1].endswith("the packages strace do not bring them")
    assert (tmp_path / "policy").read_text() == "theirs"


def test_a_user_with_a_sudo_that_asks_nothing_installs_through_it(tmp_path: Path) -> None:
    system = System(tmp_path, user=1000)
    system.program("sudo", 'shift; exec "$@"')
    system.program("apt-get", f'case "$*" in *--no-download*) cp {system.bin}/id {system.bin}/strace;; esac')
    assert system.run("strace") == ["system tools: installing strace"]
    assert len(system.called("sudo")) >= 4
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize(
    ("user", "programs", "said"),
    [
        (0, {}, "this system has no apt; install them by its own means"),
        (1000, {"apt-get": "true"}, "only root may install packages"),
        (1000, {"apt-get": "true", "sudo": "exit 1"}, "only root may install packages"),
        (0, {"apt-get": "echo Could not resolve; exit 100"}, "the lists of packages cannot be had: Could not resolve"),
        (
            0,
            {"apt-get": 'case "$*" in *update*) ;; *) echo E: no such package; exit 100;; esac'},
            "nghttp2-client strace cannot be had: E: no such package",
        ),
        (
            0,
            {"apt-get": 'case "$*" in *--no-download*) echo E: dpkg; exit 100;; esac'},
            "nghttp2-client strace cannot be installed: E: dpkg",
        ),
    ],
    ids=["no apt", "no sudo", "sudo asks", "no network", "no package", "broken package"],
)
def test_what_it_may_not_or_cannot_do_is_said_in_one_line(
    tmp_path: Path, user: int, programs: dict[str, str], said: str
) -> None:
    system = System(tmp_path, user)
    for name, code in programs.items():
        system.program(name, code)
    *_, line = system.run("strace", "h2load")
    assert line.startswith("system tools: not installed: strace h2load: ")
    assert said in line
    assert not (tmp_path / "policy").exists()


def test_a_mirror_that_hangs_is_given_up(tmp_path: Path) -> None:
    system = System(tmp_path)
    system.program("apt-get", "exec sleep 60")
    assert "the lists of packages cannot be had" in system.run("strace", seconds=0.2)[-1]
