"""The folder is the registry: file stems are names. Free of torch."""

from importlib import import_module
from pathlib import Path

from expunge.core.errors import InputError, unknown

ROOT = Path(__file__).resolve().parent.parent


def catalogue(package: str) -> dict[str, Path]:
    """List what a package offers without importing any of it.

    Every file `expunge/<package>/**/<name>.py` whose name has no leading underscore counts. Raises InputError if there
    is no such package or if two files share a stem.
    """
    folder = ROOT / package
    if not folder.is_dir():
        raise unknown("package", package, (path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()))
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.py")):
        if path.name.startswith("_"):
            continue
        if path.stem in found:
            raise InputError(f"two files of {package} are named {path.stem!r}: {found[path.stem]} and {path}")
        found[path.stem] = path
    return found


def find(package: str, name: str) -> type:
    """Import one file of a package and return its one class.

    A file may hold helper classes beside it: then the one derived from a base in `expunge.core` is meant. Raises
    InputError for an unknown name and TypeError for a file that does not define exactly one.
    """
    listed = catalogue(package)
    if name not in listed:
        raise unknown(package.rstrip("s"), name, listed)
    module = import_module(".".join(("expunge", *listed[name].relative_to(ROOT).with_suffix("").parts)))
    own = [item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__]
    roles = [item for item in own if any(base.__module__.startswith("expunge.core.") for base in item.__mro__[1:])]
    chosen = roles or [item for item in own if not item.__name__.startswith("_")]
    if len(chosen) != 1:
        raise TypeError(f"{listed[name]} must define exactly one class, found {[item.__name__ for item in chosen]}")
    return chosen[0]
