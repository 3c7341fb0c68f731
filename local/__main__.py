"""`python -m local` is the `pretrade` command."""

from local.cli import main

if __name__ == "__main__":
    main()
