"""`python -m expunge.cli` is `expunge`."""

from expunge.cli import main

if __name__ == "__main__":
    main()
