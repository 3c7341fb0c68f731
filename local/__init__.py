"""The embedded stack and the `pretrade` command."""

_OURS = ("fallback", "feature_cache", "loadtest", "local", "pretrade", "server", "torchserve")


def main() -> None:
    """Entry point of the `pretrade` command, which needs more than the stubs that are installed by default."""
    try:
        from local.cli import main as run  # noqa: PLC0415 - so that a missing extra can be named
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in _OURS:  # an installation that is broken, not one that lacks an extra
            raise
        raise SystemExit(f"{error.name} is missing: pip install 'pretrade[local]'") from error
    run()
