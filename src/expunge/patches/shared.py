"""One operator for every layer that reads the text, stored as factors: kilobytes where differences are megabytes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.patches.operator import Equations, SharedEdit, joint
from expunge.patches.weights import WeightPatch

Site = tuple[str, int, int]
"""How a layer hears the prompt, "tokens" or "pooled", and its shape: out, in."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One erasure: its targets by name, and for every way of hearing the prompt its equations or its solved operator.

    An operator as wide as the layers is kept as M - I, its moves the identity.
    """

    targets: tuple[str, ...]
    edits: Mapping[str, Equations | SharedEdit]
    over: Mapping[str, Any] = field(default_factory=dict)
    """Equations only: their regulariser in words, JSON-ready. Parts that agree in it are solved together."""
    bound: bool = False
    """Whether the operator was computed from the layers' weights too, and so is right for those weights only."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Of composed artifacts: what the part's own card said."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", {route: _compact(edit) for route, edit in self.edits.items()})

    @property
    def solvable(self) -> bool:
        """Whether the part can be solved together with others."""
        return all(isinstance(edit, Equations) for edit in self.edits.values())


@dataclass(frozen=True)
class SharedPatch:
    """W' = W M for every layer that reads the text, M the product of the parts' operators in order.

    Parts of equal regulariser that no bound part divides are solved as one, which takes the place of the first. So the
    patch is what its list of parts says: a list without one part is the patch of someone who never erased it. M takes
    r rows a part and does not depend on the layers, so it serves any model with the same text encoder and the same
    layers to edit, unless a part is bound.
    """

    kind: ClassVar[str] = "shared"

    parts: tuple[Part, ...]
    sites: Mapping[str, Site]
    """All layers that read the text, by path."""

    def __post_init__(self) -> None:
        for name, tensor in self.tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                raise InputError(f"the change is not finite ({name}); raise the ridge, or look at the base's weights")

    @property
    def bound(self) -> bool:
        """Whether some part is right only for the weights it was computed from."""
        return any(part.bound for part in self.parts)

    @property
    def groups(self) -> list[list[Part]]:
        """Parts that are solved together, in the order in which their operators multiply."""
        found: list[list[Part]] = []
        for part in self.parts:
            since = max((i + 1 for i, group in enumerate(found) if group[0].bound), default=0)
            mates = [group for group in found[since:] if part.over and group[0].over == part.over]
            if mates and part.solvable:
                mates[0].append(part)
            else:
                found.append([part])
        return found

    @cached_property
    def operators(self) -> dict[str, list[SharedEdit]]:
        """The operators of each route, one a group, W M_1 M_2 … in order."""
        found: dict[str, list[SharedEdit]] = {}
        for route in sorted({route for part in self.parts for route in part.edits}):
            found[route] = [_operator([part.edits[route] for part in group]) for group in self.groups]
        return found

    def materialised(self, model: Generator) -> WeightPatch:
        """Give full differences for the weights of a model, in float32 at least; layers that stay are left out."""
        deltas = {path: delta.to(_wide(model.weight(path))) for path, delta in self._deltas(model)}
        return WeightPatch({path: delta for path, delta in deltas.items() if bool(delta.any())})

    def on(self, model: Generator) -> Generator:
        """Give a view with every layer multiplied, in float64; raises InputError if its layers are other ones."""
        old = {path: model.weight(path) for path in self._known(model)}
        return model.view(
            weights={path: (old[path].to(delta) + delta).to(old[path]) for path, delta in self._deltas(model)}
        )

    def tensors(self) -> dict[str, Tensor]:
        """Give `<part>.<route>.keys`, `goals`, `gain` and `reads`, or `moves` and `duals`; no moves: the identity."""
        return {
            f"{index}.{route}.{name}": tensor.detach().contiguous()
            for index, part in enumerate(self.parts)
            for route, edit in part.edits.items()
            for name, tensor in _stored(edit).items()
        }

    def meta(self) -> dict[str, Any]:
        """Give the layers, and of every part its targets and regulariser."""
        parts = [
            {"targets": list(p.targets), "over": dict(p.over), "bound": p.bound, "facts": dict(p.facts)}
            for p in self.parts
        ]
        return {"parts": parts, "sites": {path: list(site) for path, site in self.sites.items()}}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> "SharedPatch":
        """Rebuild from what `tensors` and `meta` gave."""
        edits: list[dict[str, dict[str, Tensor]]] = [{} for _ in meta["parts"]]
        for name, tensor in tensors.items():
            index, route, leaf = name.split(".")
            edits[int(index)].setdefault(route, {})[leaf] = tensor
        parts = tuple(
            Part(
                targets=tuple(said["targets"]),
                edits={route: _restored(found) for route, found in mine.items()},
                over=said["over"],
                bound=said["bound"],
                facts=said["facts"],
            )
            for said, mine in zip(meta["parts"], edits, strict=True)
        )
        return cls(parts, {path: (site[0], site[1], site[2]) for path, site in meta["sites"].items()})

    @classmethod
    def of(cls, parts: Sequence[Part], model: Generator) -> "SharedPatch":
        """Make a patch for all layers of a model that read the text."""
        return cls(tuple(parts), _sites(model))

    def _known(self, model: Generator) -> Mapping[str, Site]:
        """Layers of a model, which must be those of the edit."""
        found = _sites(model)
        if found != dict(self.sites):
            path = min(path for path in {**found, **self.sites} if found.get(path) != self.sites.get(path))
            raise InputError(
                f"the edit is for {len(self.sites)} layers that read the prompt, {model.name!r} has {len(found)}; "
                f"{path} is {_said(found.get(path))} there and {_said(self.sites.get(path))} in the edit"
            )
        return found

    def _deltas(self, model: Generator) -> Iterator[tuple[str, Float[Tensor, "out in"]]]:
        for path, (route, _, _) in self._known(model).items():
            old = model.weight(path)
            total = torch.zeros_like(old, dtype=torch.float64)
            for edit in self.operators.get(route, []):
                total = total + edit.delta(old.to(edit.duals) + total.to(edit.duals)).to(total)
            yield path, total


def _sites(model: Generator) -> dict[str, Site]:
    return {site.path: (site.reads, *_shape(site.weight)) for site in model.sites("text_in")}


def _shape(weight: Float[Tensor, "out in"]) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _said(site: Site | None) -> str:
    return f"{site[1]} by {site[2]} and reads {site[0]}" if site else "absent"


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _operator(edits: Sequence[Equations | SharedEdit]) -> SharedEdit:
    """One operator of a group: of its only member, or the joint solve of all."""
    if len(edits) == 1 and isinstance(edits[0], SharedEdit):
        return edits[0]
    return joint([edit for edit in edits if isinstance(edit, Equations)])


def _compact(edit: Equations | SharedEdit) -> Equations | SharedEdit:
    """M - I itself where it has no more numbers than its factors."""
    if isinstance(edit, Equations) or 2 * edit.moves.shape[0] < edit.moves.shape[1] or _is_identity(edit.moves):
        return edit
    eye = torch.eye(edit.moves.shape[1], dtype=torch.float64, device=edit.moves.device)
    return SharedEdit(moves=eye, duals=edit.moves.T @ edit.duals)


def _is_identity(moves: Tensor) -> bool:
    return moves.shape[0] == moves.shape[1] and torch.equal(moves, torch.eye(len(moves)).to(moves))


def _stored(edit: Equations | SharedEdit) -> dict[str, Tensor]:
    if isinstance(edit, Equations):
        return {"keys": edit.keys, "goals": edit.goals, "gain": edit.gain, "reads": edit.reads}
    return {"duals": edit.duals} if _is_identity(edit.moves) else {"moves": edit.moves, "duals": edit.duals}


def _restored(found: Mapping[str, Tensor]) -> Equations | SharedEdit:
    if "keys" in found:
        return Equations(keys=found["keys"], goals=found["goals"], gain=found["gain"], reads=found["reads"])
    duals = found["duals"]
    moves = found["moves"] if "moves" in found else torch.eye(duals.shape[1], dtype=duals.dtype, device=duals.device)
    return SharedEdit(moves=moves, duals=duals)
