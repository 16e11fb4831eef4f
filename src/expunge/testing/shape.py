"""What an eraser's file and class must look like."""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from expunge.core.eraser import Eraser

MAX_LINES = 150
ALLOWED = ("expunge.core", "expunge.ops", "expunge.patches", "torch", "jaxtyping")
PAPER = re.compile(r"arXiv:\d{4}\.\d{4,5}|doi:10\.\d{4,}/\S+")


class ContractError(AssertionError):
    """An eraser does not keep the contract; the message says which part."""


def expect(kept: bool, message: str) -> None:
    """Raise ContractError with the message unless the condition holds."""
    if not kept:
        raise ContractError(message)


def is_one_class_in_a_short_file(cls: type[Eraser]) -> None:
    """Exactly one eraser in the file, and at most 150 lines."""
    path = Path(inspect.getfile(cls))
    classes = [item for item in vars(sys.modules[cls.__module__]).values() if inspect.isclass(item)]
    own = [item.__name__ for item in classes if issubclass(item, Eraser) and item.__module__ == cls.__module__]
    expect(own == [cls.__name__], f"{path.name} defines the erasers {own}; exactly one is allowed")
    lines = len(path.read_text().splitlines())
    expect(lines <= MAX_LINES, f"{path.name} has {lines} lines; at most {MAX_LINES} are allowed")


def is_a_frozen_dataclass_with_defaults(cls: type[Eraser]) -> None:
    """Frozen, keyword-only, constructible without arguments."""
    own = is_dataclass(cls) and "__dataclass_params__" in vars(cls)
    expect(own and bool(vars(cls)["__dataclass_params__"].frozen), f"{cls.__name__} is not itself a frozen dataclass")
    for field in fields(cls):
        expect(field.kw_only is True, f"field {field.name!r} is not keyword-only")
        missing = field.default is MISSING and field.default_factory is MISSING
        expect(not missing, f"field {field.name!r} has no default")


def is_documented(cls: type[Eraser]) -> None:
    """A sentence first, a word on every field, an equation for every strength, a paper one can look up."""
    text = inspect.getdoc(cls) or ""
    first = text.partition("\n")[0]
    expect(first[:1].isupper() and first.endswith("."), f"the docstring begins with {first!r}, not with a sentence")
    notes = _field_notes(cls)
    for field in fields(cls):
        expect(field.name in notes, f"field {field.name!r} has no docstring under it")
        equation = "strength" not in field.name or "=" in notes[field.name]
        expect(equation, f"the docstring of {field.name!r} has no equation")
    expect(bool(PAPER.fullmatch(cls.paper)), f"paper is {cls.paper!r}; legal: arXiv:<id> or doi:<doi>")
    expect(not cls.reconstruction or "reconstruct" in text.casefold(), "a reconstruction must say so in its docstring")


def imports_only_what_is_below(cls: type[Eraser]) -> None:
    """Core, ops, patches, torch and the standard library; no benchmark, detector or model."""
    path = Path(inspect.getfile(cls))
    for name in _imports(path):
        ours = any(name == root or name.startswith(root + ".") for root in ALLOWED)
        standard = name.partition(".")[0] in sys.stdlib_module_names
        expect(ours or standard, f"{path.name} imports {name}; allowed: {', '.join(ALLOWED)}, the standard library")


def has_a_strict_config_with_a_schema(cls: type[Eraser]) -> None:
    """Defaults survive JSON, unknown keys are refused, every field is in the schema."""
    adapter = TypeAdapter(cls)
    again = adapter.validate_json(adapter.dump_json(cls()))
    expect(again == cls(), f"the default configuration comes back from JSON as {again}")
    listed = set(adapter.json_schema().get("properties", {}))
    expect(listed == {field.name for field in fields(cls)}, f"the JSON schema lists {sorted(listed)}")
    try:
        adapter.validate_python({"no_such_field": 1})
    except ValidationError:
        return
    raise ContractError(f"{cls.__name__} accepts an unknown field")


SHAPE = (
    is_one_class_in_a_short_file,
    is_a_frozen_dataclass_with_defaults,
    is_documented,
    imports_only_what_is_below,
    has_a_strict_config_with_a_schema,
)


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def _field_notes(cls: type[Eraser]) -> dict[str, str]:
    """Read the strings that stand under fields; Python itself does not keep them."""
    tree = ast.parse(Path(inspect.getfile(cls)).read_text())
    body = next(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    notes = {}
    for field, note in pairwise(body):
        match field, note:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                notes[name] = text
    return notes
