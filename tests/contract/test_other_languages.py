"""The stubs that docs/other-languages.md has one generate, where the plugins are that it names."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from support.pages import DOCS, commands_of

PAGE: Final = "other-languages.md"
ROOT: Final = DOCS.parent
MADE: Final = {
    "go": ("protoc-gen-go", "protoc-gen-go-grpc"),
    "java": ("protoc", "grpc_java_plugin"),
}
"""What each language needs on the PATH."""
SERVICE: Final = {"go": "type DecisionServiceClient interface", "java": "class DecisionServiceBlockingStub"}


def templates() -> dict[str, str]:
    """The page's templates, by language."""
    named = re.findall(r"`(\w+)\.yaml`.*?```yaml\n(.*?)```", (DOCS / PAGE).read_text(), re.DOTALL)
    return dict(named)


def test_the_page_has_a_template_and_a_command_for_each_language_that_is_checked() -> None:
    assert templates().keys() == MADE.keys()
    assert [command.text.split()[3] for command in commands_of(PAGE)] == [f"{name}.yaml" for name in MADE]


@pytest.mark.parametrize("language", MADE)
def test_the_sources_of_a_language_are_generated(tmp_path: Path, language: str) -> None:
    for program in MADE[language]:
        if shutil.which(program) is None:
            pytest.skip(f"no plugin for this language: {program}")
    template = tmp_path / f"{language}.yaml"
    template.write_text(templates()[language])
    buf = str(Path(sys.executable).with_name("buf"))
    (command,) = (each.text for each in commands_of(PAGE) if template.name in each.text)
    _, *arguments = command.replace(template.name, str(template)).split()
    subprocess.run([buf, *arguments, "--output", str(tmp_path)], cwd=ROOT, check=True, timeout=60)
    made = [path.read_text() for path in (tmp_path / "gen").rglob("*.*")]
    assert any(SERVICE[language] in text for text in made)
