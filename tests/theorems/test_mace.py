"""What must hold for MACE's three stages, and what must not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.methods.closed_form.mace import MACE
from expunge.models.load import load
from expunge.ops.alignment import surroundings
from expunge.ops.fusion import Factors, fused, refined, row_gram, row_shift
from expunge.ops.levels import noised_at, plateau
from expunge.ops.listening import listen, masked_attention
from expunge.ops.ridge import shared_edit
from expunge.ops.student import LowRankStudent
from expunge.ops.wording import Shown, sentences
from expunge.patches.lowrank import product
from expunge.patches.operator import SharedEdit

F64 = torch.float64
WIDTH = 10
TEMPLATES = ("{}", "the {} on a car")
SHORT: dict[str, Any] = {"templates": TEMPLATES, "steps": 3, "walk": 2, "pictures": 2, "batch": 1, "lr": 1e-2}


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@dataclass
class Problem:
    """Layers of unequal height, rows to refine, rows of two concepts with rank-1 changes, prior rows: all random."""

    seed: int = 0

    def __post_init__(self) -> None:
        s = self.seed
        self.weights = {f"layer{i}": 0.5 * randn(s + i, out, WIDTH) for i, out in enumerate((4, 7, 12))}
        self.old, self.new = randn(s + 10, 25, WIDTH), randn(s + 11, 25, WIDTH)
        self.rows = [randn(s + 20, 15, WIDTH), randn(s + 21, 18, WIDTH)]
        self.prior = randn(s + 30, 14, WIDTH)
        self.factors: list[dict[str, Factors]] = [
            {p: (randn(s + 40 + i, 1, WIDTH), randn(s + 50 + i, len(w), 1)) for p, w in self.weights.items()}
            for i in range(2)
        ]

    def refined(self, ridge: float, weight: float = 1.0) -> SharedEdit:
        prior = weight * row_gram(self.prior)
        return refined(row_shift(self.old, self.new), row_gram(self.old), prior, ridge)

    def fused(self, edit: SharedEdit, ridge: float, weight: float = 1.0, concepts: Sequence[int] = (0, 1)) -> Any:
        learned = [(row_gram(self.rows[i]), self.factors[i]) for i in concepts]
        shared, factors = fused(edit, learned, weight * row_gram(self.prior), ridge)
        return {p: w + shared.delta(w) + product(*factors[p]) for p, w in self.weights.items()}


# --- refinement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ridge", "weight"), [(0.5, 1.0), (100.0, 0.1), (1e-3, 20.0)])
def test_refinement_is_stationary_for_the_stated_objective(ridge: float, weight: float) -> None:
    p = Problem()
    for w in p.weights.values():
        point = (w + p.refined(ridge, weight).delta(w)).requires_grad_()

        def slope(at: Tensor, w: Tensor = w) -> Tensor:
            at = at.detach().requires_grad_()
            loss = (p.old @ at.T - p.new @ w.T).square().sum() + ridge * (at - w).square().sum()
            return torch.autograd.grad(loss + weight * (p.prior @ (at - w).T).square().sum(), at)[0]

        assert slope(point).norm() < 1e-10 * slope(w).norm()
        assert slope(w).norm() > 1


def test_refinement_by_moments_is_the_edit_by_rows() -> None:
    p = Problem(100)
    ones = torch.ones(25, dtype=F64)
    plain = shared_edit(p.old, p.new, ones, p.prior, ones[:14], 0.7)
    torch.testing.assert_close(p.refined(0.7).matrix(), plain.matrix(), rtol=1e-10, atol=1e-10)
    assert (p.refined(0.8).matrix() - plain.matrix()).norm() > 1e-3
    # concepts are summed up one after the other, in any order
    a, b = slice(0, 9), slice(9, None)
    shift = row_shift(p.old[b], p.new[b]) + row_shift(p.old[a], p.new[a])
    torch.testing.assert_close(shift, row_shift(p.old, p.new), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("ridge", "weight"), [(0.5, 0.0), (0.5, 3.0), (1e-6, 1e3)])
def test_a_mapping_to_itself_changes_nothing(ridge: float, weight: float) -> None:
    p = Problem()
    same = refined(row_shift(p.old, p.old), row_gram(p.old), weight * row_gram(p.prior), ridge)
    assert all(bool((same.delta(w) == 0).all()) for w in p.weights.values())
    assert all(p.refined(ridge, weight).delta(w).norm() > 0 for w in p.weights.values())


# --- fusion -----------------------------------------------------------------------------------------------------------


def loops(p: Problem, near: Mapping[str, Tensor], ridge: float, weight: float) -> dict[str, Tensor]:
    """Fusion as the paper states it: values of every row, an explicit inverse, layer by layer."""
    found = {}
    for path, w in p.weights.items():
        top, bottom = ridge * near[path], ridge * torch.eye(WIDTH, dtype=F64)
        for rows, factors in zip(p.rows, p.factors, strict=True):
            a, b = factors[path]
            for e in rows:
                top, bottom = top + torch.outer((near[path] + b @ a) @ e, e), bottom + torch.outer(e, e)
        for e in p.prior:
            top, bottom = top + weight * torch.outer(w @ e, e), bottom + weight * torch.outer(e, e)
        found[path] = top @ torch.linalg.inv(bottom)
    return found


@pytest.mark.parametrize(("ridge", "weight"), [(0.5, 1.0), (100.0, 0.1), (1e-3, 20.0), (0.0, 1.0)])
def test_fusion_equals_the_paper_s_loops(ridge: float, weight: float) -> None:
    p = Problem(200)
    edit = p.refined(0.5)
    near = {path: w + edit.delta(w) for path, w in p.weights.items()}
    plain, found = loops(p, near, ridge, weight), p.fused(edit, ridge, weight)
    for path in p.weights:
        torch.testing.assert_close(found[path], plain[path], rtol=1e-9, atol=1e-9)
    other = p.fused(edit, ridge + 1, weight)
    assert any((other[path] - plain[path]).norm() > 1e-3 for path in p.weights)


def test_fusion_is_stationary_and_forgets_the_order_of_concepts() -> None:
    p = Problem(300)
    edit = p.refined(0.5)
    found, turned = p.fused(edit, 0.3, 2.0), p.fused(edit, 0.3, 2.0, (1, 0))
    for path, w in p.weights.items():
        torch.testing.assert_close(found[path], turned[path], rtol=1e-10, atol=1e-10)
        near = w + edit.delta(w)

        def slope(at: Tensor, path: str = path, w: Tensor = w, near: Tensor = near) -> Tensor:
            at = at.detach().requires_grad_()
            loss = 0.3 * (at - near).square().sum() + 2.0 * (p.prior @ (at - w).T).square().sum()
            for rows, factors in zip(p.rows, p.factors, strict=True):
                loss = loss + (rows @ (at - near - product(*factors[path])).T).square().sum()
            return torch.autograd.grad(loss, at)[0]

        assert slope(found[path]).norm() < 1e-9 * slope(near).norm()
        assert slope(near).norm() > 1
    one = p.fused(edit, 0.3, 2.0, (0,))
    assert any((one[path] - found[path]).norm() > 1e-2 for path in p.weights)


@pytest.mark.parametrize(("ridge", "weight"), [(0.5, 1.0), (1e-6, 100.0)])
def test_nothing_learned_and_nothing_refined_fuses_to_nothing(ridge: float, weight: float) -> None:
    p = Problem()
    none = refined(row_shift(p.old, p.old), row_gram(p.old), row_gram(p.prior), 1.0)
    shared, factors = fused(none, [(row_gram(p.rows[0]), {})], weight * row_gram(p.prior), ridge)
    assert factors == {} and all(bool((shared.delta(w) == 0).all()) for w in p.weights.values())
    # what was refined is drawn back by the prior, whose goals are the original weights'
    back, _ = fused(p.refined(0.5), [(row_gram(p.rows[0]), {})], weight * row_gram(p.prior), ridge)
    path = "layer2"
    assert (back.delta(p.weights[path]) - p.refined(0.5).delta(p.weights[path])).norm() > 1e-2


def test_alone_and_unheld_a_concept_keeps_its_adapter_on_its_rows() -> None:
    p = Problem(400)
    edit = p.refined(0.5)
    p.rows[0] = p.rows[0][:6]  # a span of 6 of 10 directions

    def miss(ridge: float, weight: float) -> float:
        found = p.fused(edit, ridge, weight, (0,))
        goals = {path: w + edit.delta(w) + product(*p.factors[0][path]) for path, w in p.weights.items()}
        return max(float((p.rows[0] @ (found[path] - goals[path]).T).norm()) for path in p.weights)

    assert miss(1e-10, 0.0) < 1e-7
    assert miss(1.0, 0.0) > 1e-2
    assert miss(1e-10, 1.0) > 1e-2


def test_a_heavy_prior_brings_the_old_weights_back_on_its_span() -> None:
    p = Problem(500)
    p.prior = p.prior[:4]
    off = p.old @ (torch.eye(WIDTH, dtype=F64) - torch.linalg.pinv(p.prior) @ p.prior)

    def moved(weight: float, rows: Tensor) -> float:
        found = p.fused(p.refined(0.5), 0.5, weight)
        return max(float((rows @ (found[path] - w).T).norm()) for path, w in p.weights.items())

    found = [moved(weight, p.prior) for weight in (1e-2, 1.0, 1e2, 1e9)]
    assert found == sorted(found, reverse=True) and found[-1] < 1e-6
    assert moved(1e9, off) > 1e-1


# --- alignment --------------------------------------------------------------------------------------------------------


def facing(target: str, anchor: str, template: str = "the {} on a car") -> tuple[Tensor, Tensor]:
    line = sentences((template,), [target])[0]
    return surroundings(load("tiny-unet"), [(line, line.about(anchor))])[0]


def test_identical_sentences_keep_every_row() -> None:
    window = load("tiny-unet").encode(["the red cat on a car"]).tokens[0]
    old, new = facing("red cat", "red cat")
    assert torch.equal(old, new) and torch.equal(old, window)
    assert not torch.equal(*facing("red cat", "red dog"))


@pytest.mark.parametrize(
    ("target", "anchor"),
    [("cat", "dog"), ("cat", "strawberry"), ("xylophonists", "cat"), ("cat", ""), ("red cat", "dog")],
)
def test_other_words_face_themselves_and_the_differing_ones_are_gone(target: str, anchor: str) -> None:
    """Phrases of any number of tokens: rows are found again by the tokens they stand for."""
    model: Any = load("tiny-unet")
    tokenizer = model.pipeline.tokenizer
    texts = [" ".join(f"the {word} on a car".split()) for word in (target, anchor)]
    ids = [tokenizer(text, padding="max_length", max_length=24).input_ids for text in texts]
    spans = [len(tokenizer(word).input_ids) - 2 if word else 0 for word in (target, anchor)]
    start = len(tokenizer("the").input_ids) - 1
    rest = [i[:start] + i[start + n :] for i, n in zip(ids, spans, strict=True)]
    length = min(map(len, rest))
    assert rest[0][:length] == rest[1][:length]
    old, new = facing(target, anchor)
    tokens = model.encode(texts).tokens
    for rows, found, n in zip(tokens, (old, new), spans, strict=True):
        assert torch.equal(found, torch.cat([rows[:start], rows[start + n :]])[:length])
    assert len(old) == len(new) == length == 24 - max(spans)


def test_words_the_phrases_share_are_kept() -> None:
    count = len(facing("red cat", "red dog")[0])
    assert count == len(facing("cat", "dog")[0]) > len(facing("red cat", "blue dog")[0])


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene() -> tuple[Any, Any, Any, Tensor]:
    """Toy, state, two sentences shown, half masks."""
    model = load("tiny-unet")
    shown = Shown.of(model, sentences(("the {} on a car",), ["red cat", "strawberry"]), (1.0,))
    state = model.visit(shown.cond, rng=Run().rng("state"), guidance_scale=1.0, steps=3)
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[:, :, :4] = True
    return model, state, shown, masks


def test_attention_loss_is_zero_on_an_empty_mask_and_adds_up_otherwise(scene: Any) -> None:
    model, state, shown, half = scene
    maps = listen(model, state, shown.cond)

    def loss(mask: Tensor, squared: bool = True, columns: Tensor = shown.columns) -> Tensor:
        return masked_attention(maps, columns, mask, squared=squared)

    assert torch.equal(loss(half & False), torch.zeros(2))
    assert torch.equal(loss(half, False, shown.columns & False), torch.zeros(2))
    torch.testing.assert_close(loss(half) + loss(~half), loss(half | True))
    assert not torch.allclose(loss(half, False) + loss(~half, False), loss(half | True, False))
    assert bool((loss(half) > 0).all())
    every = sum(layer.square().flatten(1).sum(1) for layer in maps)
    torch.testing.assert_close(loss(half | True, True, torch.ones_like(shown.columns)), every)


def test_gradient_reaches_the_factors_alone_and_the_first_forward_is_the_base_s(scene: Any) -> None:
    model, state, shown, masks = scene
    sites = [site.path for site in model.sites("text_in")]
    student = LowRankStudent.of(model, sites, rank=1, rng=Run().rng("factors"))
    for one, two in zip(listen(student.view(), state, shown.cond), listen(model, state, shown.cond), strict=True):
        torch.testing.assert_close(one, two)
    assert torch.equal(student.view().predict(state, shown.cond), model.predict(state, shown.cond))
    masked_attention(listen(student.view(), state, shown.cond), shown.columns, masks, squared=True).sum().backward()
    assert all(p.grad is None for p in model.network.parameters())
    grads = dict(zip(student.names, zip(*[iter(student.parameters)] * 2, strict=True), strict=True))
    moved = [path for path, (_, up) in grads.items() if up.grad is not None and bool(up.grad.any())]
    assert {path for path in sites if "to_k" in path} <= set(moved)  # every key matrix, and values of all but the last
    assert 0 < len([path for path in sites if "to_v" in path and path not in moved]) < len(sites) // 2
    torch.optim.Adam(student.parameters, lr=0.1).step()
    ranks = {path: int(torch.linalg.matrix_rank(product(*pair))) for path, pair in student.patch().factors.items()}
    assert {path for path in ranks if ranks[path] == 1} == set(moved) and max(ranks.values()) == 1


def test_adapters_lower_the_attention_they_are_trained_on() -> None:
    losses: list[float] = []
    run = Run(log=lambda name, step, value: losses.append(value) if name == "loss" else None)
    slow = MACE(**{**SHORT, "steps": 30, "batch": 4}, masks="whole")
    slow.erase(load("tiny-unet"), Request.of("red cat", anchor="red dog"), run)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_fusion_adds_one_rank_per_concept() -> None:
    p = Problem(600)
    for concepts in ((0,), (0, 1)):
        learned = [(row_gram(p.rows[i]), p.factors[i]) for i in concepts]
        _, factors = fused(p.refined(0.5), learned, row_gram(p.prior), 0.5)
        assert {int(torch.linalg.matrix_rank(product(*pair))) for pair in factors.values()} == {len(concepts)}


def test_levels_follow_the_density() -> None:
    t = torch.arange(1000, dtype=F64) / 1000
    f = plateau(t)
    assert int(f.argmax()) == 300
    torch.testing.assert_close(f[300:601], f[:301].flip(0), rtol=1e-9, atol=1e-12)
    share = f / f.sum()
    assert float(share.sum()) == pytest.approx(1) and float(share[200:401].sum()) > 0.8
    model = load("tiny-unet")
    clean = torch.zeros(200, *model.latent)
    drawn, plain = (noised_at(model, clean, Run().rng("t"), level) for level in ("middle", "uniform"))
    assert float(((drawn.t > 0.15) & (drawn.t < 0.45)).float().mean()) > 0.9
    assert float(((plain.t > 0.15) & (plain.t < 0.45)).float().mean()) < 0.5
    assert abs(float(drawn.t.mean()) - 0.3) < 0.03


# --- the method -------------------------------------------------------------------------------------------------------


def test_refinement_alone_equals_loops_over_layers() -> None:
    """Own words: sentences, rows dropped by hand, explicit inverse; only the prior rows are held."""
    model = load("tiny-unet")
    found = MACE(templates=TEMPLATES, steps=0, ridge=0.5).erase(
        model, Request.of("cat", anchor="dog", retain=("guitar",)), Run()
    )
    old, new = (
        torch.cat(side).double() for side in zip(*(facing("cat", "dog", form) for form in TEMPLATES), strict=True)
    )
    held = model.encode(["", *(form.format("guitar") for form in TEMPLATES)]).tokens.flatten(0, 1).double()
    bottom = 0.5 * torch.eye(old.shape[1], dtype=F64) + old.T @ old + held.T @ held
    for site in model.sites("text_in"):
        w = site.weight.double()
        top = 0.5 * w + w @ new.T @ old + w @ held.T @ held
        delta = top @ torch.linalg.inv(bottom) - w
        torch.testing.assert_close(found.deltas[site.path].double(), delta, rtol=1e-4, atol=1e-6 * float(w.norm()))
        assert delta.norm() > 1e-4 * w.norm()


def test_the_code_s_scaling_enters_refinement_twice() -> None:
    model, request = load("tiny-unet"), Request.of("cat", anchor="dog", retain=("guitar",))

    def change(prior_weight: float, retain_weight: float, refinement: str) -> Tensor:
        method = MACE(
            templates=TEMPLATES,
            steps=0,
            ridge=0.5,
            prior_weight=prior_weight,
            retain_weight=retain_weight,
            refinement=refinement,
        )
        return torch.cat([delta.flatten() for delta in method.erase(model, request, Run()).deltas.values()])

    torch.testing.assert_close(change(0.1, 3.0, "twice"), change(0.01, 0.3, "once"), rtol=1e-4, atol=1e-7)
    assert (change(0.1, 3.0, "once") - change(0.01, 0.3, "once")).norm() > 1e-3 * change(0.1, 3.0, "once").norm()


SEEN: list[tuple[torch.Size, str]] = []


def left_half(picture: Tensor, phrase: str) -> Tensor:
    SEEN.append((picture.shape, phrase))
    mask = torch.zeros_like(picture[:, 0], dtype=torch.bool)
    mask[..., : mask.shape[-1] // 2] = True
    return mask


def nowhere(picture: Tensor, phrase: str) -> Tensor:
    return picture[:, 0] > 2


def test_any_callable_segments_and_only_where_asked() -> None:
    SEEN.clear()
    model, request = load("tiny-unet"), Request.of("red cat", anchor="dog")
    whole, own = (MACE(**SHORT, masks=how).erase(model, request, Run()).deltas for how in ("whole", "attention"))
    assert SEEN == []
    mine = MACE(**SHORT, masks=f"{__name__}:left_half").erase(model, request, Run()).deltas
    assert [phrase for _, phrase in SEEN] == ["red cat"] * 2 and all(shape[0] == 1 for shape, _ in SEEN)
    nothing = MACE(**SHORT, masks=f"{__name__}:nowhere").erase(model, request, Run()).deltas
    key = next(path for path in whole if "to_k" in path)
    found = [whole[key], own[key], mine[key], nothing[key]]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    for wrong in ("segmenter", ":", "nowhere.at_all:mask", f"{__name__}:missing", f"{__name__}:SEEN"):
        with pytest.raises(InputError, match=f"masks is '{wrong}'.*legal: attention, whole, or package") as caught:
            MACE(**SHORT, masks=wrong).erase(model, request, Run())
        assert "\n" not in str(caught.value)


def test_every_option_matters_and_every_concept_has_its_own_adapter() -> None:
    model = load("tiny-unet")

    def change(*words: str, **options: Any) -> Tensor:
        request = Request(target=tuple(map(Concept.of, words)), anchor=(Concept.of("dog"),) * len(words))
        method = MACE(**{**SHORT, **options})
        return torch.cat([delta.flatten() for delta in method.erase(model, request, Run()).deltas.values()])

    plain = change("cat")
    for option in (
        {"words": "ending"},
        {"norm": "plain"},
        {"levels": "uniform"},
        {"threshold": 0.1},
        {"prior": ("car",)},
    ):
        assert not torch.equal(plain, change("cat", **option)), option
    assert torch.equal(plain, change("cat"))
    logged: list[int] = []
    two = Request(target=(Concept.of("cat"), Concept.of("guitar")), anchor=(None, None))
    MACE(**SHORT).erase(model, two, Run(log=lambda name, step, x: logged.append(step) if name == "loss" else None))
    assert logged == list(range(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, r"steps is -1; legal: 0 or more"),
        ({"pictures": 0}, r"pictures is 0; legal: 1 or more"),
        ({"batch": 0}, r"batch is 0; legal: 1 or more"),
        ({"ridge": -0.5}, r"ridge is -0\.5; legal: 0 or more"),
        ({"retain_weight": float("nan")}, r"retain_weight is nan; legal: 0 or more"),
        ({"threshold": 1.0}, r"threshold is 1\.0; legal: 0 to below 1"),
        ({"templates": ()}, r"templates is \(\); legal: one sentence or more"),
        ({"templates": ("a picture",)}, r"template is 'a picture'; legal: one \{\}"),
    ],
)
def test_bad_settings_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        MACE(**{**SHORT, **options}).erase(load("tiny-unet"), Request.of("cat", anchor="dog"), Run())
    assert "\n" not in str(caught.value)


def test_families_without_maps_are_refused_before_anything_is_drawn() -> None:
    with pytest.raises(InputError, match="'tiny-flux' of family 'mmdit' has no cross-attention") as caught:
        MACE(**SHORT).erase(load("tiny-flux"), Request.of("cat", anchor="dog"), Run())
    assert "\n" not in str(caught.value)


def test_every_phrase_is_drawn_however_few_pictures_are_asked_for() -> None:
    drawn: list[tuple[int, int]] = []
    run = Run(progress=lambda label, done, total: drawn.append((done, total)) if label == "drawing" else None)
    concept = Concept(name="cat", prompts=("cat", "red cat", "blue cat"))
    MACE(**{**SHORT, "pictures": 1}).erase(load("tiny-unet"), Request(target=(concept,), anchor=(None,)), run)
    assert drawn[-1] == (3, 3)
