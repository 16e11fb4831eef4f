import subprocess
import sys

import pytest

from expunge.core import registry
from expunge.core.errors import InputError
from expunge.core.registry import catalogue, find


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An `expunge/gadgets` folder of its own, importable for one test."""
    import expunge

    home = tmp_path / "gadgets" / "inner"
    home.mkdir(parents=True)
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    monkeypatch.setattr(expunge, "__path__", [*expunge.__path__, str(tmp_path)])
    yield home
    for name in [name for name in sys.modules if name.startswith("expunge.gadgets")]:
        del sys.modules[name]


def test_stems_are_names_and_underscored_files_are_private(package):
    (package / "one.py").write_text("raise RuntimeError('a listing must not import')")
    (package / "_shared.py").write_text("")
    assert catalogue("gadgets") == {"one": package / "one.py"}


def test_two_files_with_one_stem_are_refused(package):
    (package / "one.py").write_text("")
    (package.parent / "one.py").write_text("")
    with pytest.raises(InputError, match="two files of gadgets are named 'one'"):
        catalogue("gadgets")


def test_find_returns_the_one_class(package):
    (package / "one.py").write_text("from pathlib import Path\nclass One: ...\n")
    assert find("gadgets", "one").__name__ == "One"


def test_find_prefers_the_class_with_a_role(package):
    (package / "two.py").write_text(
        "from expunge.core.measure import Metric\nclass Helper: ...\nclass Two(Metric): ...\n"
    )
    assert find("gadgets", "two").__name__ == "Two"


def test_find_refuses_two_classes(package):
    (package / "three.py").write_text("class A: ...\nclass B: ...\n")
    with pytest.raises(TypeError, match=r"exactly one class, found \['A', 'B'\]"):
        find("gadgets", "three")


def test_unknown_names_are_answered_with_the_legal_ones(package):
    (package / "one.py").write_text("")
    with pytest.raises(InputError, match="unknown gadget 'uno'; legal: one"):
        find("gadgets", "uno")
    with pytest.raises(InputError, match="unknown package 'widgets'"):
        catalogue("widgets")


def test_vocabulary_and_listing_are_free_of_torch():
    code = (
        "import sys, expunge, expunge.core.card, expunge.core.records\n"
        "expunge.Request.of('a'); expunge.catalogue('core')\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
