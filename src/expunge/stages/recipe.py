"""Recipe: everything needed to repeat a run, as strict TOML. Torch is imported only when a method is looked up."""

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import tomli_w
from pydantic import ConfigDict, TypeAdapter, ValidationError

from expunge.core.concept import Concept, Kind, Request
from expunge.core.errors import InputError
from expunge.core.registry import find
from expunge.stages import _files

STRICT = ConfigDict(extra="forbid", strict=True)
NONE = "none"  # how a recipe writes an option that is None: TOML has no null


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which generator: an embedded name, a tiny name, a local folder, or a hub id `hf:org/name`."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    name: str
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    on: str | None = None
    """Folder of the artifact whose erasures come first: the model is erased once more."""


@dataclass(frozen=True, kw_only=True)
class MethodChoice:
    """Which eraser, and the fields the user set; the rest keep the defaults of the method's dataclass."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ConceptEntry:
    """A concept as written in TOML; without prompts its name is its only prompt."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    name: str
    kind: Kind = "object"
    prompts: tuple[str, ...] = ()

    def concept(self) -> Concept:
        """Return the concept of core."""
        return Concept(name=self.name, kind=self.kind, prompts=self.prompts or (self.name,))


@dataclass(frozen=True, kw_only=True)
class TargetEntry(ConceptEntry):
    """A concept to erase with the concept it is sent to; no anchor means the unconditional prompt."""

    anchor: ConceptEntry | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: seed, model, method with its options, request."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    seed: int = 0
    budget: float | None = None
    """Most that a training may move what should stay, see expunge.ops.collateral; it ends at the last look within."""
    model: ModelChoice
    method: MethodChoice
    target: tuple[TargetEntry, ...]
    retain: tuple[ConceptEntry, ...] = ()

    accumulate: int | None = None
    """Losses whose gradients are added up before each step of a training; none: one."""

    def __post_init__(self) -> None:
        if self.accumulate is not None and self.accumulate < 1:
            raise InputError(f"accumulate is {self.accumulate}; legal: 1 and above")
        if self.budget is not None and not self.budget > 0:
            raise InputError(f"budget is {self.budget}; legal: above 0")

    def request(self) -> Request:
        """Return the request of core; raises InputError when it is inconsistent (anchor equal to target, no target)."""
        return Request(
            target=tuple(entry.concept() for entry in self.target),
            anchor=tuple(entry.anchor.concept() if entry.anchor else None for entry in self.target),
            retain=tuple(entry.concept() for entry in self.retain),
        )

    def eraser(self) -> Any:
        """Return the method's object with its options checked; raises InputError naming the legal fields."""
        method = find("methods", self.method.name)
        return method(**checked(method, self.method.options))

    def _table(self) -> dict[str, Any]:
        table = _without_empty(json.loads(TypeAdapter(Recipe).dump_json(self)))
        table["seed"] = self.seed
        options = {key: NONE if value is None else value for key, value in self.method.options.items()}
        table["method"] = {"name": self.method.name, **options}
        return table

    def to_toml(self) -> str:
        """Return the recipe as TOML; `parse(recipe.to_toml()) == recipe`."""
        return tomli_w.dumps(self._table(), multiline_strings=False)

    def write(self, path: Path) -> None:
        """Write recipe.toml atomically."""
        _files.write_bytes(path, self.to_toml().encode())


def parse(text: str, where: str = "recipe") -> Recipe:
    """Parse TOML strictly: unknown keys, wrong types and illegal options are InputErrors that name the legal ones."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where} is not valid TOML: {error}") from None
    method = table.get("method")
    if isinstance(method, dict):
        options = {key: value for key, value in method.items() if key != "name"}
        table["method"] = {key: value for key, value in method.items() if key == "name"} | {"options": options}
    try:
        recipe = TypeAdapter(Recipe).validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error)}") from None
    checked(find("methods", recipe.method.name), recipe.method.options)
    return recipe


def read(path: Path) -> Recipe:
    """Read recipe.toml; raises InputError for a missing, torn or illegal file."""
    try:
        return parse(_files.read_bytes(path).decode(), str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None


def explain(error: ValidationError) -> str:
    """Return one complaint of pydantic as one line: place, reason, value; a misspelt key comes before a missing one."""
    first = sorted(error.errors(include_url=False), key=lambda entry: entry["type"] == "missing")[0]
    place = ".".join(str(part) for part in first["loc"]) or "value"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "missing":
        return f"{place} is missing{more}"
    return f"{place}: {first['msg']}, got {first['input']!r}{more}"


def fields_of(method: type) -> dict[str, Any]:
    """Return the settable fields of a method with their types."""
    hints = get_type_hints(method)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(method) if entry.init}


def checked(method: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Validate options against the method's dataclass and return them with the field types.

    Raises InputError for an unknown key or a wrong type, naming every legal field with its default.
    """
    kinds = fields_of(method)
    done: dict[str, Any] = {}
    for key, value in options.items():
        if key not in kinds:
            raise InputError(f"{_name(method)} has no field {key!r}; its fields are {describe(method)}")
        try:
            done[key] = _coerce(kinds[key], value)
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"]
            raise InputError(
                f"{_name(method)}: {key} = {value!r} is not legal ({reason}); its fields are {describe(method)}"
            ) from None
    return done


def settings(method: type, pairs: Sequence[str]) -> dict[str, Any]:
    """Parse `--set key=value` words against the method's dataclass: values are TOML, or else plain text.

    Raises InputError for a word without `=`, a repeated key, an unknown key or a wrong type.
    """
    kinds = fields_of(method)
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals:
            raise InputError(f"--set {pair!r} has no '='; write --set FIELD=VALUE, fields are {describe(method)}")
        if key in found:
            raise InputError(f"--set names {key!r} twice")
        found[key] = _reading(kinds[key], text.strip()) if key in kinds else text
    return checked(method, found)


def describe(method: type) -> str:
    """List a method's fields with their defaults, in one line."""
    shown = [
        f"{entry.name}={entry.default!r}" if entry.default is not dataclasses.MISSING else entry.name
        for entry in dataclasses.fields(method)
        if entry.init
    ]
    return ", ".join(shown) or "(none)"


def _coerce(kind: Any, value: Any) -> Any:
    # JSON mode is strict about types yet reads a list as a tuple, as TOML needs.
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    try:
        return adapter.validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError:
        if value == NONE and type(None) in get_args(kind):
            return None
        raise


def _reading(kind: Any, text: str) -> Any:
    """Read one command-line value: the first of TOML, None and plain text that the field's type accepts."""
    readings: list[Any] = []
    try:
        readings.append(tomllib.loads(f"value = {text}")["value"])
    except tomllib.TOMLDecodeError:
        if get_origin(kind) is tuple:
            readings.append([part.strip() for part in text.split(",")])
    for value in [*readings, text]:
        try:
            _coerce(kind, value)
        except ValidationError:
            continue
        return value
    return [*readings, text][0]


def _without_empty(value: Any) -> Any:
    # TOML has no null, and an empty list says the same as an absent one.
    if isinstance(value, dict):
        return {k: _without_empty(v) for k, v in value.items() if v is not None and v not in ({}, [])}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


def _name(method: type) -> str:
    return method.__module__.rsplit(".", 1)[-1]
