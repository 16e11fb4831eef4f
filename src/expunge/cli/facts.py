"""What methods, detectors and commands say about themselves, read from source, not imported: listing stays instant."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard


@dataclass(frozen=True)
class Field:
    """One setting: its type and default as written, and the docstring below it."""

    name: str
    type: str
    default: str
    help: str


@dataclass(frozen=True)
class Facts:
    """A class of the catalogue: first line of its docstring, class attributes with literal values, settings."""

    name: str
    description: str
    attributes: dict[str, Any]
    fields: tuple[Field, ...]


def facts(name: str, path: Path) -> Facts:
    """Read the last class of a file that derives from another; raises ValueError if there is none."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in reversed(tree.body):
        if isinstance(node, ast.ClassDef) and node.bases:
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            return Facts(name, first, dict(_attributes(node)), tuple(_fields(node)))
    raise ValueError(f"{path} defines no class derived from another")


def first_line(path: Path, name: str) -> str:
    """Read the first line of the docstring of a file's function; raises ValueError if it defines no such function."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    raise ValueError(f"{path} defines no function {name}")


def _attributes(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for item in node.body:
        if _is_class_variable(item) and item.value is not None:
            yield _name(item.target), _literal(item.value)


def _fields(node: ast.ClassDef) -> Iterator[Field]:
    for item, after in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
        if isinstance(item, ast.AnnAssign) and not _is_class_variable(item):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            default = _written(item.value) if item.value is not None else ""
            yield Field(_name(item.target), _name(item.annotation), default, " ".join(str(text).split()))


def _written(node: ast.expr) -> str:
    return repr(node.value) if isinstance(node, ast.Constant) else ast.unparse(node)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ast.unparse(node)  # writing source back is slow


def _is_class_variable(item: ast.stmt) -> TypeGuard[ast.AnnAssign]:
    return isinstance(item, ast.AnnAssign) and "ClassVar" in {
        getattr(part, "id", "") for part in (item.annotation, getattr(item.annotation, "value", None))
    }


def _literal(node: ast.expr) -> Any:
    """Evaluate constants, and the frozensets that families are written as; other expressions stay source text."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "frozenset" and node.args:
        node = node.args[0]
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
    return sorted(value) if isinstance(value, set) else value
