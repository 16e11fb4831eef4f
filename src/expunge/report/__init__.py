"""One self-contained page from a run folder. Free of torch: it reads JSON, PNG and TOML, and never a weight."""

from expunge.report.page import render

__all__ = ["render"]
