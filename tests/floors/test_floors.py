"""Who may import whom, how long things may be, what must be documented: read from the source, nothing is run."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[2] / "src" / "expunge"
FILES = sorted(path for path in ROOT.rglob("*.py") if "embedded" not in path.relative_to(ROOT).parts)
TREES = {path: ast.parse(path.read_text()) for path in FILES}

FLOORS = {
    "core": 0,
    "patches": 1,
    "models": 1,
    "suites": 1,
    "ops": 2,
    "methods": 3,
    "attacks": 3,
    "detectors": 3,
    "metrics": 3,
    "certificates": 3,
    "leakage": 3,
    "stages": 4,
    "report": 5,  # reads what the stages write, by their own readers
    "cli": 6,
    "web": 6,
    "testing": 5,
}
# Beside what the floor allows: what a package may take from the world outside the standard library.
OUTSIDE = {
    "core": {"torch", "jaxtyping"},
    "patches": {"torch", "jaxtyping"},
    "models": {
        "torch",
        "jaxtyping",
        "accelerate",
        "diffusers",
        "transformers",
        "tokenizers",
        "peft",
        "safetensors",
        "huggingface_hub",
    },
    "suites": set(),
    "ops": {"torch", "jaxtyping", "numpy", "scipy"},
    "methods": {"torch", "jaxtyping"},
    "detectors": {"torch", "jaxtyping", "transformers", "safetensors"},
    "attacks": {"torch", "jaxtyping"},
    "metrics": {"torch", "jaxtyping", "transformers", "numpy", "scipy"},
    "leakage": {"jaxtyping", "numpy", "scipy"},
}
TORCH_FREE = {
    "core": {"concept", "card", "records", "registry", "errors", "codec", "harm", "outcome"},
    "suites": {"load"},
    "leakage": {"record", "verdict", "twins"},
    "report": None,
}
FORBIDDEN = {"torchvision", "pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def package(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else ""


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            if node.module == "expunge":
                yield from ((f"expunge.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module or "", node.lineno


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_look_at():
    assert len(FILES) > 20
    assert {package(path) for path in FILES} >= {"core", "patches", "ops", "models", "methods"}


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_go_down_only(path):
    here = package(path)
    if here == "":
        return  # the package's own __init__ names what is public, wherever it lives
    assert here in FLOORS, f"{here} has no floor; give it one here and in the architecture"
    for name, line in imports(path):
        if not name.startswith("expunge"):
            continue
        there = name.split(".")[1] if "." in name else ""
        there = there if there in FLOORS else ""  # a name of the package itself
        below = there == here or FLOORS.get(there, 99) < FLOORS[here] or there == ""
        assert below, f"{path}:{line}: {here} (floor {FLOORS[here]}) imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if package(p) == "methods"], ids=named)
def test_methods_know_no_model_and_no_other_method(path):
    mine = ".".join(("expunge", *path.relative_to(ROOT).with_suffix("").parts))
    for name, line in imports(path):
        assert not name.startswith(("expunge.models", "expunge.suites")), f"{path}:{line}: {name}"
        assert not name.startswith("expunge.methods") or name == mine, f"{path}:{line}: {name}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_the_world_outside_is_limited(path):
    allowed = OUTSIDE.get(package(path))
    for name, line in imports(path):
        top = name.partition(".")[0]
        assert top not in FORBIDDEN, f"{path}:{line}: {name} is never imported here"
        if allowed is not None and top != "expunge" and top not in sys.stdlib_module_names:
            assert top in allowed, f"{path}:{line}: {package(path)} imports {name}; allowed: {sorted(allowed)}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_torch_free_files_import_no_torch(path):
    stems = TORCH_FREE.get(package(path), set())
    if stems is not None and path.stem not in stems:
        return
    for name, line in imports(path):
        assert name.partition(".")[0] not in {"torch", "diffusers", "transformers", "jaxtyping"}, (
            f"{path}:{line}: {name}"
        )


@pytest.mark.parametrize("path", FILES, ids=named)
def test_no_code_runs_from_data(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in {"eval", "exec", "torch.load", "torch.save"}, f"{path}:{node.lineno}: {call}"
            if package(path) not in {"cli", "web"}:
                assert call != "print", f"{path}:{node.lineno}: printing below the command line"
            for word in node.keywords:
                assert word.arg != "trust_remote_code", f"{path}:{node.lineno}: trust_remote_code"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            assert caught not in {"", "Exception", "BaseException"}, (
                f"{path}:{node.lineno}: except {caught or 'anything'}"
            )
        if isinstance(node, ast.Global):
            raise AssertionError(f"{path}:{node.lineno}: global {node.names}")


@pytest.mark.parametrize("path", FILES, ids=named)
def test_nothing_travels_in_kwargs(path):
    for node in functions(path):
        kwarg = node.args.kwarg
        assert kwarg is None, f"{path}:{node.lineno}: {node.name}(**{kwarg.arg if kwarg else ''})"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_files_and_functions_are_short(path):
    cap = 150 if package(path) in {"methods", "attacks", "detectors", "metrics"} else 300
    lines = len(path.read_text().split("\n"))  # the last newline counts
    assert lines <= cap, f"{path}: {lines} lines; at most {cap}"
    for node in functions(path):
        assert length(node) <= 60, f"{path}:{node.lineno}: {node.name} has {length(node)} lines; at most 60"


def test_the_usual_function_is_ten_lines():
    lengths = [length(node) for path in FILES for node in functions(path)]
    assert median(lengths) <= 10


@pytest.mark.parametrize("path", FILES, ids=named)
def test_public_names_are_documented_with_a_sentence(path):
    assert ast.get_docstring(TREES[path]), f"{path}: no module docstring"
    for node in _public(TREES[path]):
        text = ast.get_docstring(node)
        assert text, f"{path}:{node.lineno}: {node.name} has no docstring"
        first = text.partition("\n")[0].rstrip()
        assert first.endswith((".", "?", ":")), (
            f"{path}:{node.lineno}: {node.name} begins with {first!r}, not a sentence"
        )


def _public(tree: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            if not any(name.endswith((".setter", "overload", "override")) for name in decorators):
                yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)
