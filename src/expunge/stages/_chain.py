"""Artifacts of several erasures: what each part's own card said, and the card that says it of all."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.core.card import Card
from expunge.core.codec import from_data
from expunge.core.concept import Concept, Request
from expunge.core.errors import InputError
from expunge.core.patch import Patch
from expunge.ops.sequel import commutator
from expunge.patches.shared import Part, SharedPatch

SAID = ("method", "paper", "description", "config", "given", "claims", "retain", "seed")
LEGAL = "what a closed form stores as factors: uce but for technique 'tensor', rece, trce, project"
ANY = ("inner_optimization", "reconstruction", "uses_anchor", "uses_retain", "guidance_distilled")


def told(card: Card, patch: SharedPatch) -> tuple[Part, ...]:
    """Give every part of an artifact with the facts of its card, as far as they are about its targets."""
    said = {field.name: getattr(card, field.name) for field in dataclasses.fields(card)} | {"seed": card.run.seed}
    return tuple(dataclasses.replace(part, facts=part.facts or _facts(said, part)) for part in patch.parts)


def check(card: Card, first: Patch, said: Mapping[str, Any], composes: bool, where: Path) -> None:
    """Refuse an erasure that cannot follow an artifact, before it is computed; `said`: what its card would say."""
    if not composes:
        raise InputError(f"{said['method']} makes no shared operator that could follow {where}; legal: {LEGAL}")
    new = Part(targets=tuple(target.name for target in said["target"]), edits={})
    parts = told(card, shared(first, where, card.method))
    request_of([*parts, dataclasses.replace(new, facts=_facts(said, new))])


def after(card: Card, first: Patch, said: Mapping[str, Any], later: Patch) -> SharedPatch:
    """Put the parts of a patch behind those of an artifact; `said` is what the patch's own card would say."""
    patch = shared(later, "the new erasure", said["method"])
    new = tuple(dataclasses.replace(part, facts=_facts(said, part)) for part in patch.parts)
    return SharedPatch((*told(card, shared(first, "the artifact", card.method)), *new), patch.sites)


def _facts(said: Mapping[str, Any], part: Part) -> dict[str, Any]:
    pairs = [(t, a) for t, a in zip(said["target"], said["anchor"], strict=True) if t.name in part.targets]
    facts = {key: said[key] for key in SAID}
    facts |= {"target": [target for target, _ in pairs], "anchor": [anchor for _, anchor in pairs]}
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=_plain))
    return plain


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else dataclasses.asdict(value)


def request_of(parts: Sequence[Part]) -> Request:
    """Give what all parts together asked for; a concept retained once and erased later is no longer retained.

    Raises InputError for a target named twice, and for an anchor that another part erases: what was sent to it would
    be sent to something that is no longer drawn, or would bring it back.
    """
    found: dict[str, list[Any]] = {role: [] for role in ("target", "anchor", "retain")}
    for part in parts:
        for role, concepts in found.items():
            concepts += [from_data(Concept, entry) if entry else None for entry in part.facts[role]]
    targets = tuple(found["target"])
    kept = {c.name: c for c in found["retain"] if not any(c.same_as(target) for target in targets)}
    return Request(target=targets, anchor=tuple(found["anchor"]), retain=tuple(kept.values()))


def merged(card: Card, patch: SharedPatch) -> Card:
    """Make a card say of all parts what their own cards said; settings in which they differ stay with the parts."""
    facts, request = [part.facts for part in patch.parts], request_of(patch.parts)
    given = {key for each in facts for key in each["given"]}
    configs = [each["config"] for each in facts]
    agreed = {key: value for key, value in configs[0].items() if all(key in c and c[key] == value for c in configs)}
    claims = sorted({name for each in facts for name in each["claims"]})
    return dataclasses.replace(
        card,
        method="+".join(_once(facts, "method")),
        paper=", ".join(_once(facts, "paper")),
        description=" ".join(_once(facts, "description")),
        config=agreed,
        given=tuple(sorted(given & set(agreed))),
        target=request.target,
        anchor=request.anchor,
        retain=request.retain,
        claims={
            name: (any if name in ANY else all)(bool(each["claims"].get(name, name not in ANY)) for each in facts)
            for name in claims
        },
    )


def _once(facts: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(each[key] for each in facts))


def shared(made: Patch, where: object, method: str) -> SharedPatch:
    """Give back a patch that composes; raises InputError for any other kind."""
    if not isinstance(made, SharedPatch):
        raise InputError(f"{where}, by {method}, is a patch of kind {made.kind!r} and does not compose; legal: {LEGAL}")
    return made


def order(patch: SharedPatch) -> list[dict[str, Any]]:
    """Tell how the parts act: which were solved together, and how much each step's order with the one before matters.

    `commutator` is ||A B - B A|| / ||A B - I|| with the step before, the larger of all ways of hearing the prompt; None
    for the first.
    """
    found: list[dict[str, Any]] = []
    for index, group in enumerate(patch.groups):
        steps = [(edits[index - 1], edits[index]) for edits in patch.operators.values() if index]
        found.append(
            {
                "targets": [name for part in group for name in part.targets],
                "joint": len(group) > 1,
                "bound": group[0].bound,
                "commutator": max((commutator(*pair) for pair in steps), default=None),
            }
        )
    return found
