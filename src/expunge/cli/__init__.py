"""The command line: typer and rich over recipes, stages and catalogues. Free of torch until a command needs it."""

import os
import sys


def main() -> None:
    """Run `expunge` with the words of the shell and leave with its exit code."""
    # transformers otherwise greets every command with what torchvision could do for it
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from expunge.cli.app import run

    sys.exit(run(sys.argv[1:]))
