"""Suites: data that owns prompts, seeds, sampler and detectors. Torch-free; every file is hashed and checked."""

import csv
import hashlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from expunge.core.codec import from_data
from expunge.core.concept import Concept, Kind, Request
from expunge.core.errors import InputError
from expunge.core.records import Case

HOME = Path(__file__).parent
COLUMNS = ("case_id", "target", "role", "concept", "style", "background", "prompt", "seed")
ROLES = ("target", "synonym", "retain")


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """What the suite fixes for every arm: DDIM steps and guidance scale w in u + w (c - u)."""

    steps: int
    guidance_scale: float


@dataclass(frozen=True, kw_only=True)
class Target:
    """One concept of a suite to erase, with its synonyms, its anchor phrase and its retained neighbours."""

    concept: Concept
    synonyms: tuple[str, ...]
    anchor: str
    retain: tuple[Concept, ...]

    def request(self) -> Request:
        """Return the request an eraser gets: the target, its anchor ("" = unconditional), the neighbours."""
        anchor = Concept(name=self.anchor, kind=self.concept.kind, prompts=(self.anchor,)) if self.anchor else None
        return Request(target=(self.concept,), anchor=(anchor,), retain=self.retain)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A loaded suite; `digest` is the SHA-256 over suite.toml and cases.csv."""

    name: str
    version: str
    sampler: Sampler
    detectors: tuple[str, ...]
    targets: tuple[Target, ...]
    cases: tuple[Case, ...]
    digest: str

    @cached_property
    def _targets(self) -> dict[str, Target]:
        """Targets by name and by every prompt that asks for them; names come first where both say the same."""
        said = {prompt: target for target in self.targets for prompt in target.concept.prompts}
        return said | {target.concept.name: target for target in self.targets}

    def target(self, name: str) -> Target:
        """Return one target by its name or one of its prompts; raises InputError listing the suite's targets."""
        if name not in self._targets:
            known = ", ".join(target.concept.name for target in self.targets)
            raise InputError(f"suite {self.name} has no target {name!r}; its targets are {known}")
        return self._targets[name]

    def named(self, concept: Concept) -> str:
        """Give the suite's name for what was erased, which is often called by its prompt; its own where unknown."""
        found = (self._targets[text] for text in (concept.name, *concept.prompts) if text in self._targets)
        return next((target.concept.name for target in found), concept.name)

    def cases_for(self, target: str) -> tuple[Case, ...]:
        """Return the cases of one target in file order: target, synonym and retain rows."""
        name = self.target(target).concept.name
        return tuple(case for case in self.cases if case.target == name)

    def concept_of(self, case: Case) -> Concept:
        """Return the concept a detector is asked about: the target itself, or the retained neighbour."""
        target = self.target(case.target)
        known = {concept.name: concept for concept in (target.concept, *target.retain)}
        return known[case.concept]


def catalogue() -> dict[str, Path]:
    """Return the suites in the package by name, without reading them."""
    return {path.parent.name: path.parent for path in sorted(HOME.glob("*/suite.toml"))}


def load(name: str | Path) -> Suite:
    """Load a suite by name, or from a folder that holds suite.toml and cases.csv.

    Raises InputError naming the file and the field or row that is wrong, or listing the known suites.
    """
    known = catalogue()
    folder = known.get(str(name), Path(name))
    if not (folder / "suite.toml").is_file():
        raise InputError(f"unknown suite {str(name)!r}; known suites: {', '.join(known) or '(none)'}")
    header, rows = _read(folder / "suite.toml"), _read(folder / "cases.csv")
    table = _Table(_parse(header, folder / "suite.toml"), str(folder / "suite.toml"))
    targets = _targets(table)
    suite = Suite(
        name=table.text("name"),
        version=table.text("version"),
        sampler=_sampler(table),
        detectors=table.texts("detectors"),
        targets=targets,
        cases=_cases(rows, {target.concept.name: target for target in targets}, folder / "cases.csv"),
        digest=hashlib.sha256(len(header).to_bytes(8, "big") + header + rows).hexdigest(),
    )
    table.finish()
    return suite


class _Table:
    """A TOML table read strictly: every key is taken once and typed, the rest is an error."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where, self.taken = values, where, set[str]()

    def take(self, key: str, kinds: tuple[type, ...], default: Any = None) -> Any:
        self.taken.add(key)
        value = self.values.get(key, default)
        if value is None:
            raise InputError(f"{self.where}: {key!r} is missing")
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InputError(f"{self.where}: {key} = {value!r} is not {' or '.join(kind.__name__ for kind in kinds)}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        return str(self.take(key, (str,), default))

    def texts(self, key: str, default: list[str] | None = None) -> tuple[str, ...]:
        values = self.take(key, (list,), default)
        if not all(isinstance(value, str) and value.strip() for value in values):
            raise InputError(f"{self.where}: {key} = {values!r} is not a list of non-empty texts")
        return tuple(values)

    def tables(self, key: str) -> "list[_Table]":
        values = self.take(key, (list,))
        if not values or not all(isinstance(value, dict) for value in values):
            raise InputError(f"{self.where}: {key!r} must be one or more tables [[{key}]]")
        return [_Table(value, f"{self.where}: [[{key}]] {number}") for number, value in enumerate(values, 1)]

    def finish(self) -> None:
        extra = sorted(set(self.values) - self.taken)
        if extra:
            raise InputError(f"{self.where}: unknown key {extra[0]!r}; legal keys are {', '.join(sorted(self.taken))}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None


def _sampler(table: _Table) -> Sampler:
    inner = _Table(table.take("sampler", (dict,)), f"{table.where}: [sampler]")
    sampler = Sampler(
        steps=inner.take("steps", (int,)), guidance_scale=float(inner.take("guidance_scale", (int, float)))
    )
    inner.finish()
    if sampler.steps < 1:
        raise InputError(f"{table.where}: [sampler] steps = {sampler.steps} must be at least 1")
    return sampler


def _targets(table: _Table) -> tuple[Target, ...]:
    entries = table.tables("target")
    concepts = [_concept(entry) for entry in entries]
    names = {concept.name: concept for concept in concepts}
    if len(names) != len(concepts):
        raise InputError(f"{table.where}: two targets share a name")
    return tuple(_target(entry, concept, names) for entry, concept in zip(entries, concepts, strict=True))


def _concept(entry: _Table) -> Concept:
    name, kind = entry.text("name"), entry.text("kind")
    known = [legal for legal in get_args(Kind) if legal == kind]
    if not known:
        raise InputError(f"{entry.where}: kind = {kind!r} is not one of {', '.join(get_args(Kind))}")
    return Concept(name=name, kind=known[0], prompts=entry.texts("prompts", [name]))


def _target(entry: _Table, concept: Concept, names: Mapping[str, Concept]) -> Target:
    retain = entry.texts("retain")
    if concept.name in retain:
        raise InputError(f"{entry.where}: {concept.name!r} cannot be retained, it is the target")
    target = Target(
        concept=concept,
        synonyms=entry.texts("synonyms", []),
        anchor=entry.text("anchor", ""),
        retain=tuple(names.get(name, Concept(name=name, kind=concept.kind, prompts=(name,))) for name in retain),
    )
    entry.finish()
    return target


def _cases(data: bytes, targets: Mapping[str, Target], path: Path) -> tuple[Case, ...]:
    try:
        reader = csv.DictReader(data.decode().splitlines(), strict=True)
        rows = [_case(row, targets, f"{path}, line {reader.line_num}") for row in _checked_rows(reader, path)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid CSV: {error}") from None
    ids = [case.case_id for case in rows]
    twice = next((name for number, name in enumerate(ids) if name in ids[:number]), None)
    if twice is not None:
        raise InputError(f"{path}: case_id {twice!r} stands twice")
    _check_cover(rows, targets, path)
    return tuple(rows)


def _checked_rows(reader: "csv.DictReader[str]", path: Path) -> Iterator[dict[str, str]]:
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise InputError(f"{path}: columns are {reader.fieldnames}, expected {','.join(COLUMNS)}")
    for row in reader:
        if None in row or None in row.values():
            raise InputError(f"{path}, line {reader.line_num}: expected {len(COLUMNS)} fields")
        yield row


def _case(row: Mapping[str, str], targets: Mapping[str, Target], where: str) -> Case:
    if row["target"] not in targets:
        raise InputError(f"{where}: target {row['target']!r} is not in suite.toml; targets are {', '.join(targets)}")
    if row["role"] not in ROLES:
        raise InputError(f"{where}: role {row['role']!r} is not one of {', '.join(ROLES)}")
    target = targets[row["target"]]
    legal = [c.name for c in target.retain] if row["role"] == "retain" else [target.concept.name]
    if row["concept"] not in legal:
        raise InputError(f"{where}: concept {row['concept']!r} in role {row['role']} is not one of {', '.join(legal)}")
    if not row["seed"].isdecimal():
        raise InputError(f"{where}: seed {row['seed']!r} is not a whole number >= 0")
    if not row["case_id"] or not row["prompt"].strip():
        raise InputError(f"{where}: case_id and prompt must not be empty")
    return from_data(Case, {**row, "seed": int(row["seed"])})


def _check_cover(cases: Sequence[Case], targets: Mapping[str, Target], path: Path) -> None:
    # a target without target or retain rows would later divide by zero; synonyms are optional
    for name in targets:
        roles = {case.role for case in cases if case.target == name}
        if missing := {"target", "retain"} - roles:
            raise InputError(f"{path}: target {name!r} has no {' and no '.join(sorted(missing))} rows")
