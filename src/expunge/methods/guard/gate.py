"""Gate-and-substitute, ours: a prompt that asks for the target is drawn as its anchor twin, exactly.

`paper` names where the kind of promise comes from, a bounded divergence from a model that is safe; no paper has this
guard. Proofs, measurements and what it does not do: docs/gate.md.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.eraser import Eraser, Run
from expunge.core.errors import InputError
from expunge.core.generator import Family, Generator
from expunge.ops.gating import THINGS, Gate, parts, summary
from expunge.ops.limits import at_least
from expunge.ops.reword import RewordPatch
from expunge.ops.rows import encode_many
from expunge.patches.guard import PassGuard


@dataclass(frozen=True, kw_only=True)
class PromptGate(Eraser):
    """Draw the anchor twin in place of every prompt that a gate catches; no weight changes.

    twin(p): each phrase of the target becomes its anchor, then each span of p that the frozen text encoder takes for
    the target, until the gate is silent. Encoders, pooled text and negative prompts read twin(p) alone, so p and its
    twin give the same picture bit for bit, and I(C; X) <= P(p is missed or its twin is another sentence) bits for
    every observer; 0 for prompts that hold a phrase. A span fires where cos(x, target) > floor and cos(x, target) >
    max cos(x, other) - slack, x = summary - centre. Prompts it is silent on are drawn bit for bit as before.

    Threat levels: T0 to T2 are what it is for, as far as its misses were counted: for T1 not yet, and two slips of the
    pen in one word get past it. T3 only as far as an attack with gradients was run against it, and none has been. T4 to
    T6, embeddings, latents and weights, are outside: whoever holds the model walks around it.
    """

    paper: ClassVar[str] = "arXiv:2302.10870"
    families: ClassVar[frozenset[Family]] = frozenset({"unet", "mmdit"})
    claims: ClassVar[Mapping[str, bool]] = MappingProxyType(
        {"deterministic": True, "gradients": False, "inner_optimization": False}
    )

    floor: float = 0.8
    """Least cosine with the target at which a span may fire, [-1, 1]."""

    slack: float = 0.02
    """How much nearer another meaning may be before a span is let through, 0 or more."""

    span: int = 2
    """Longest run of words read as one meaning; phrases of the target are found at any length."""

    typos: bool = True
    """Whether a span one edit away from a phrase of five letters or more is that phrase: a letter dropped, added or
    changed, two neighbours exchanged. Words of anchors, retained concepts and `others` are never taken for slips."""

    others: tuple[str, ...] | None = None
    """What spans may mean instead, beside anchors and retained concepts; phrases of a target are left out. None:
    the ordinary words of `ops/gating.py`."""

    def erase(self, model: Generator, request: Request, run: Run) -> RewordPatch:
        """Guard that remembers phrases, anchors and their encoder summaries; nothing is trained by gradients."""
        at_least(self, {"slack": 0, "span": 1, "floor": -1})
        facing = {target.casefold(): anchor for target, anchor in request.pairs}
        named = [anchor for anchor in facing.values() if anchor]
        kept = [prompt for concept in request.retain for prompt in concept.prompts]
        others = THINGS if self.others is None else self.others
        known = [span for span in parts([*named, *kept, *others], self.span) if span not in facing]
        if not known:
            raise InputError("others is empty, and no anchor or retained concept has words; legal: one word or more")
        with torch.no_grad():
            rows = summary(encode_many(model, [*known, *facing]))
        gate = Gate.of(facing, known, rows, floor=self.floor, slack=self.slack, longest=self.span, typos=self.typos)
        for what, texts in (("anchor", named), ("retained prompt", kept)):
            for text in texts:
                if gate.names(text):
                    raise InputError(f"{what} {text!r} holds a phrase of a target; legal: none of {', '.join(facing)}")
        return self._patch(gate, len(parts([*named, *kept], self.span)))

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> RewordPatch:
        """Rebuild the gate from its stored summaries and words."""
        config: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in meta["config"].items()}
        method = cls(**config)
        words = (tuple(meta["phrases"]), tuple(meta["anchors"]), frozenset(meta["known"]))
        others = torch.cat([tensors[role] for role in ("named", "others") if role in tensors])
        rows = (tensors["targets"], others, tensors["centre"])
        gate = Gate(*words, *rows, method.floor, method.slack, method.span, method.typos)
        return method._patch(gate, len(tensors["named"]) if "named" in tensors else 0)

    def _patch(self, gate: Gate, named: int) -> RewordPatch:
        sides = {"named": gate.others[:named], "others": gate.others[named:]}
        state = {"targets": gate.targets, "centre": gate.centre} | {k: rows for k, rows in sides.items() if len(rows)}
        words = {"phrases": list(gate.phrases), "anchors": list(gate.anchors), "known": sorted(gate.known)}
        return RewordPatch(PassGuard(), state, {"config": asdict(self), **words}, gate=gate)
