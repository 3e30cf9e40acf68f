"""The command line `squeezevit`. Only `cli.screen` writes to a terminal."""

import sys


def main(argv: list[str] | None = None) -> None:
    """Run a command line, that of this process where none is given, and exit as `cli.app.main` says."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.exit(f'squeezevit: the command line needs {error.name}: run `pip install "squeezevit[cli]"`')
    from squeezevit.cli import app

    app.main(argv)
