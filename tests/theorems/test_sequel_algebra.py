"""Erase A, then B, then undo A: what the algebra gives exactly, and where it gives nothing."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from linear_toy import CROSS, LinearToy
from torch import Tensor

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Eraser, Run
from expunge.core.generator import EditSite
from expunge.methods.closed_form.project import Project
from expunge.methods.closed_form.rece import RECE
from expunge.methods.closed_form.uce import UCE
from expunge.ops.ridge import shared_edit
from expunge.ops.sequel import commutator
from expunge.patches.operator import SharedEdit
from expunge.patches.shared import SharedPatch
from expunge.stages.artifact import serialize

F64 = torch.float64
TOY = LinearToy.seeded()
METHODS = [UCE(ridge=0.5), UCE(mode="uce2025", ridge=0.1), UCE(ridge=20.0, retain_weight=3.0)]


REPEATED = RECE(epochs=1, ridge=0.5, start_ridge=0.5)
PROJECTED = Project(templates=("{}",), rows="word", min_share=0.0)


def ask(*prompts: str, to: str | None = "dog", keep: Sequence[str] = ()) -> Request:
    target = tuple(Concept.of(prompt) for prompt in prompts)
    anchor = None if to is None else Concept.of(to)
    return Request(target=target, anchor=(anchor,) * len(target), retain=tuple(Concept.of(word) for word in keep))


def erased(method: Eraser, request: Request, model: Any = TOY) -> SharedPatch:
    patch = method.erase(model, request, Run())
    assert isinstance(patch, SharedPatch)
    return patch


def chain(*patches: SharedPatch) -> SharedPatch:
    return SharedPatch(tuple(part for patch in patches for part in patch.parts), patches[0].sites)


def weight(patch: SharedPatch) -> Tensor:
    return patch.on(TOY).weight(CROSS)


def gap(one: Tensor, two: Tensor) -> float:
    """Difference of two edited weights, as a share of what the edits changed."""
    return float((one - two).norm() / (one - TOY.weight(CROSS)).norm())


@pytest.mark.parametrize("method", METHODS)
def test_over_one_regulariser_composing_is_the_joint_solve_in_any_order(method: UCE) -> None:
    keep = ("car", "blue cup")
    whole = weight(erased(method, ask("cat", "bird", "tree", keep=keep)))
    a, b, c = (erased(method, ask(word, keep=keep)) for word in ("cat", "bird", "tree"))
    for order in ((a, b, c), (c, b, a), (chain(b, a), c)):
        assert gap(weight(chain(*order)), whole) < 1e-10
        assert len(chain(*order).groups) == 1
    assert gap(weight(chain(a, b)), whole) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_undo_is_never_having_erased(method: UCE) -> None:
    keep = ("car",)
    a, b = (erased(method, ask(word, keep=keep)) for word in ("cat", "bird"))
    both = chain(a, b)
    assert gap(weight(SharedPatch(both.parts[1:], both.sites)), weight(b)) == 0
    assert gap(weight(SharedPatch(both.parts[:1], both.sites)), weight(a)) == 0
    assert gap(weight(both), weight(b)) > 1e-3


def test_over_two_regularisers_edits_multiply_and_the_order_matters() -> None:
    """What was retained differs: there is no joint solve, and neither order is the solve with both retained."""
    method = UCE(ridge=0.5)
    a, b = erased(method, ask("red cat", keep=("car",))), erased(method, ask("red bird", keep=("cup",)))
    one, other = weight(chain(a, b)), weight(chain(b, a))
    (ma,), (mb,) = a.operators["tokens"], b.operators["tokens"]
    assert len(chain(a, b).groups) == 2
    assert gap(one, TOY.weight(CROSS) @ ma.matrix() @ mb.matrix()) < 1e-12
    assert gap(one, other) > 1e-3 and commutator(ma, mb) > 1e-3
    whole = weight(erased(method, ask("red cat", "red bird", keep=("car", "cup"))))
    assert min(gap(one, whole), gap(other, whole)) > 1e-3
    # undoing either is exact all the same: an edit of the text alone does not know what came before it
    assert gap(weight(SharedPatch(chain(a, b).parts[1:], a.sites)), weight(b)) == 0


def test_an_edit_of_the_text_alone_is_the_same_on_what_another_leaves() -> None:
    method = UCE(ridge=0.5)
    a, b = erased(method, ask("cat", keep=("car",))), erased(method, ask("bird", keep=("cup",)))
    later = erased(method, ask("bird", keep=("cup",)), a.on(TOY))
    assert torch.equal(later.operators["tokens"][0].matrix(), b.operators["tokens"][0].matrix())
    assert gap(later.on(a.on(TOY)).weight(CROSS), weight(chain(a, b))) < 1e-12


@pytest.mark.parametrize("method", [REPEATED, PROJECTED])
def test_an_edit_of_the_weights_is_another_one_on_what_another_leaves(method: Eraser) -> None:
    """So taking the first away would leave something nobody computed: bound parts stay where they were made."""
    a = erased(UCE(ridge=0.5), ask("cat"))
    here, there = erased(method, ask("bird")), erased(method, ask("bird"), a.on(TOY))
    assert here.bound and not a.bound and chain(a, there).bound
    matrices = [patch.operators["tokens"][0].matrix() for patch in (here, there)]
    assert (matrices[0] - matrices[1]).norm() > 1e-3 * (matrices[0] - torch.eye(8, dtype=F64)).norm()


def test_parts_are_not_solved_together_across_one_that_read_the_weights_between() -> None:
    method = UCE(ridge=0.5)
    a, c = (erased(method, ask(word)) for word in ("cat", "tree"))
    b = erased(REPEATED, ask("bird"), a.on(TOY))
    assert [[p.targets for p in group] for group in chain(a, b, c).groups] == [[("cat",)], [("bird",)], [("tree",)]]
    assert [len(group) for group in chain(a, c, b).groups] == [2, 1]
    kept = c.on(b.on(a.on(TOY))).weight(CROSS)
    assert gap(weight(chain(a, b, c)), kept) < 1e-12
    assert gap(weight(chain(a, c)), kept) > 1e-3


def orthogonal(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and goals of two edits in subspaces of their own."""
    rng = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=rng, dtype=F64)).Q
    keys = [torch.randn(3, 6, generator=rng, dtype=F64) @ basis[part] for part in (slice(0, 6), slice(6, 12))]
    goals = [torch.randn(3, 6, generator=rng, dtype=F64) @ basis[part] for part in (slice(0, 6), slice(6, 12))]
    return keys, goals


def solve(keys: Tensor, goals: Tensor) -> SharedEdit:
    return shared_edit(keys, goals, torch.ones(len(keys), dtype=F64), keys[:0], torch.ones(0, dtype=F64), 0.5)


def test_edits_that_do_not_meet_commute_add_up_and_are_the_joint_solve() -> None:
    keys, goals = orthogonal(0)
    a, b = (solve(*pair) for pair in zip(keys, goals, strict=True))
    eye = torch.eye(12, dtype=F64)
    product = a.matrix() @ b.matrix()
    assert commutator(a, b) < 1e-14
    torch.testing.assert_close(product, a.matrix() + b.matrix() - eye, rtol=0, atol=1e-13)
    torch.testing.assert_close(product, solve(torch.cat(keys), torch.cat(goals)).matrix(), rtol=0, atol=1e-13)
    crossed = solve(keys[1], goals[0])  # writes what the first reads
    assert commutator(a, crossed) > 1e-3
    both = solve(torch.cat([keys[0], keys[1]]), torch.cat([goals[0], goals[0]])).matrix()
    assert (a.matrix() @ crossed.matrix() - both).norm() > 1e-3


def test_a_regular_operator_can_be_divided_out_of_a_product_and_a_projection_cannot() -> None:
    """What a lost list of parts leaves: M_A^-1 (M_A M_B) = M_B up to rounding; P has no inverse."""
    a, b = (erased(UCE(ridge=0.5), ask(word, keep=(kept,))) for word, kept in (("cat", "car"), ("bird", "cup")))
    ma, mb = (patch.operators["tokens"][0].matrix() for patch in (a, b))
    torch.testing.assert_close(torch.linalg.solve(ma, ma @ mb), mb, rtol=0, atol=1e-10)
    p = erased(PROJECTED, ask("cat")).operators["tokens"][0].matrix()
    assert float(torch.linalg.svdvals(p)[-1]) < 1e-12


def test_nothing_moved_commutes_with_everything() -> None:
    keys, goals = orthogonal(1)
    still = solve(keys[0], keys[0])
    assert commutator(still, solve(keys[0], goals[1])) == 0 and commutator(still, still) == 0


class StableDiffusion(LinearToy):
    """The 32 layers of SD 1.4 that read the text, with windows of 77 rows of 768."""

    OUTS = (320,) * 10 + (640,) * 10 + (1280,) * 12

    def sites(self, group: str) -> list[EditSite]:
        return [
            EditSite(f"unet.{i}", torch.zeros(out, 768), "key", "tokens", (0, out)) for i, out in enumerate(self.OUTS)
        ]


@pytest.mark.parametrize(("method", "limit"), [(UCE(mode="uce2025"), 20_000), (UCE(), 1_000_000)])
def test_an_edit_of_stable_diffusion_is_kilobytes(method: UCE, limit: int) -> None:
    """One row a concept is 15 kB, the whole tail of a prompt 0.9 MB; the differences are 77 MB."""
    model = StableDiffusion(network=TOY.network, window=77, width=768)
    stored = {
        name: tensor.float() if name.endswith(("keys", "goals")) else tensor
        for name, tensor in erased(method, ask("red cat", keep=("car",)), model).tensors().items()
    }  # encoders give float32
    full = 4 * 768 * sum(model.OUTS)
    blob = len(serialize(stored, {}))
    assert blob < limit and full > 76_000_000 and full > 75 * blob
