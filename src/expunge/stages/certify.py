"""Certify: what can be said about an edit without drawing a picture; `leakage.py` is about pictures."""

from expunge.core.concept import Request
from expunge.core.generator import Generator
from expunge.core.records import Certificate
from expunge.core.registry import catalogue, find
from expunge.ops.reading import edit_between


def statements(base: Generator, erased: Generator, request: Request) -> list[Certificate]:
    """All certificates of the catalogue that apply, by name; none for guards, which change no weight."""
    edit = edit_between(base, erased, request)
    found = (find("certificates", name)().certify(edit) for name in sorted(catalogue("certificates")))
    return [each for each in found if each is not None]
