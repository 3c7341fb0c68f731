"""`python -m local` is the `pretrade` command."""

from pretrade.client.cli.main import main

if __name__ == "__main__":
    main()
