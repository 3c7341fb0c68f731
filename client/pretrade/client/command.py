"""The script `pretrade`, which says what to install where the command line's own libraries are missing."""

from __future__ import annotations

from typing import Final

_LIBRARIES: Final = ("rich", "typer")
"""What the extra `cli` brings."""


def main() -> None:
    """Entry point of the script.

    Raises:
        SystemExit: The command has ended, or the extra is not installed.
    """
    try:
        from pretrade.client.cli.main import main as command
    except ModuleNotFoundError as error:
        if error.name not in _LIBRARIES:
            raise
        raise SystemExit("The command `pretrade` needs an extra: pip install 'pretrade[cli]'") from error
    command()
