import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import expunge


def test_every_public_name_can_be_imported_from_where_it_lives():
    for name in expunge.__all__:
        item = getattr(expunge, name)
        assert item.__name__ == name
        assert item.__doc__, f"{name} has no docstring"


def test_the_three_lists_of_public_names_agree():
    table = {name: home for home, names in expunge._HOMES.items() for name in names}
    tree = ast.parse(Path(expunge.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert table == typed
    assert sorted(table) == expunge.__all__
    assert set(dir(expunge)) == {*expunge.__all__, "__version__"}


def test_names_that_do_not_exist_say_so():
    with pytest.raises(AttributeError, match="no attribute 'Unlearn'"):
        expunge.Unlearn  # noqa: B018 - the access is the test


def test_import_is_free_of_torch_and_quick_things_stay_quick():
    code = "import sys, expunge; expunge.Request.of('a'); assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_one_number():
    assert expunge.__version__.count(".") == 2
    assert import_module("expunge").__version__ == expunge.__version__
