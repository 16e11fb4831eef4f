"""What must hold for EraseAnything and the pieces it is made of, and what must not."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expunge.core.concept import Concept, Request
from expunge.core.condition import Condition
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator, Hook, State
from expunge.methods.finetune.erase_anything import EraseAnything
from expunge.models.load import load
from expunge.ops.asked import turns
from expunge.ops.contrast import reverse_contrast
from expunge.ops.student import LowRankStudent
from expunge.ops.tap import Tap, attended, attention, feature, joint_attention, mass, rotate
from expunge.ops.wording import Shown, Wording, columns, wordings

FLOWS = ("tiny-sd3", "tiny-flux", "tiny-flux-distilled")
BRIEF = {"steps": 2, "walk": 3, "pool": 4, "batch": 2, "pictures": 3}
BERRY = Request.of("strawberry", anchor="cat")


def some_state(model: Generator, size: int = 2) -> State:
    cond = model.encode(["guitar"] * size)
    return model.visit(cond, rng=torch.Generator().manual_seed(3), guidance_scale=2.0, steps=6)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FLOWS)
def test_tapped_maps_are_the_ones_the_network_uses(name: str) -> None:
    """Attention rebuilt from the tap, applied to the block's values, is what enters the output projection."""
    model, seen = load(name), {}
    path = joint_attention(model)[-1]
    heads = model.network.get_submodule(path).heads

    def keep(what: str) -> Hook:
        layer = {"values": "to_v", "text": "add_v_proj"}.get(what, "to_out.0")
        return Hook(f"{path}.{layer}", lambda m, i, o: seen.__setitem__(what, i[0] if what == "mixed" else o))

    tap = Tap.of(model, "last")
    hooks = [*tap.hooks, keep("values"), keep("text"), keep("mixed")]
    model.view(hooks=hooks).predict(some_state(model), model.encode(["red cat"] * 2))
    values = torch.cat([seen["text"], seen["values"]], 1).unflatten(-1, (heads, -1)).transpose(1, 2)
    query, image, text = (tap._heads(tap.seen[path][role]) for role in ("query", "image", "text"))
    maps = tap.text_maps()
    assert (maps >= 0).all() and (maps.sum(-1) < 1).all()
    key, length = torch.cat([text, image], 2), text.shape[2]
    plain = key
    if tap.rotary:
        cos, sin = tap.rotary[0]
        key, query = rotate(key, (cos, sin)), rotate(query, (cos[length:], sin[length:]))
        assert not torch.allclose(key, plain)
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    torch.testing.assert_close(weights.mean(1)[..., :length], maps)
    mixed = (weights @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, seen["mixed"], rtol=1e-4, atol=1e-5)


def test_attention_rows_sum_to_one_and_mass_counts_marked_columns_only() -> None:
    heads = attention(drawn(2, 3, 5, 8), drawn(2, 3, 7, 8, seed=1))
    torch.testing.assert_close(heads.sum(-1), torch.ones(2, 3, 5))
    maps = heads.mean(1)
    marked = torch.zeros(2, 7, dtype=torch.bool)
    marked[:, 2:4] = True
    torch.testing.assert_close(mass(maps, marked), maps[..., 2:4].sum((1, 2)))
    order = [6, 5, 2, 3, 1, 0, 4]
    torch.testing.assert_close(mass(maps[..., order], marked), mass(maps, marked))
    silent = maps.clone()
    silent[..., 2:4] = 0
    assert torch.equal(mass(silent, marked), torch.zeros(2)) and (mass(maps, marked) > 0).all()
    torch.testing.assert_close(feature(maps, marked).norm(dim=1), torch.ones(2))


def test_reverse_contrast_pulls_to_the_far_and_off_the_near() -> None:
    f, near, far = drawn(2, 6), drawn(2, 6, seed=1), drawn(2, 3, 6, seed=2)
    base = reverse_contrast(f, near, far, 0.5)
    assert (reverse_contrast(f + 0.5 * near, near, far, 0.5) > base).all()
    assert (reverse_contrast(f / f.norm(dim=1, keepdim=True) + far[:, 0], near, far, 0.5) < base).all()
    torch.testing.assert_close(reverse_contrast(f, near, far[:, [2, 0, 1]], 0.5), base)
    torch.testing.assert_close(reverse_contrast(f, near, far, 1e6), torch.full((2,), math.log(4 / 3)))
    leaves = [x.clone().requires_grad_() for x in (f, near, far)]
    reverse_contrast(*leaves, 0.5).sum().backward()
    assert leaves[0].grad is not None and leaves[1].grad is None and leaves[2].grad is None


@pytest.mark.parametrize("name", FLOWS)
def test_columns_follow_the_phrase_wherever_it_stands(name: str) -> None:
    model = load(name)
    lines = [Wording("", "red cat", "photo"), Wording("a photo of", "red cat", ""), Wording("of", "dog", "a")]
    found = columns(model, lines)
    assert found.sum(1)[0] == found.sum(1)[1] == 2 * found.sum(1)[2] > 0
    assert not torch.equal(found[0], found[1])
    assert not (found & ~model.encode([line.text for line in lines]).mask).any()
    alone = columns(model, [Wording("", "red cat", "")])
    assert alone.sum() < model.encode(["red cat"]).mask.sum()  # opening and closing signs are no words
    with pytest.raises(InputError, match="does not show"):
        columns(model, [Wording("photo " * 40, "cat", "")])


def test_shuffled_sentences_keep_their_words_and_the_phrase_whole() -> None:
    found = wordings("a photo of {} in blue", ["red cat"] * 30, 1.0, Run().rng("x"))
    assert all(sorted(line.text.split()) == sorted(["a", "photo", "of", "red", "cat", "in", "blue"]) for line in found)
    assert all("red cat" in line.text for line in found) and len({line.text for line in found}) > 5
    assert {line.text for line in wordings("a {}", ["cat"] * 5, 0.0, Run().rng("x"))} == {"a cat"}
    with pytest.raises(InputError, match="template"):
        wordings("a photo", ["cat"], 0.0, Run().rng("x"))


@pytest.mark.parametrize("name", FLOWS)
def test_an_untrained_low_rank_student_is_the_base_and_only_factors_learn(name: str) -> None:
    model, state = load(name), some_state(load(name))
    paths = [f"{path}.add_k_proj.weight" for path in joint_attention(model)]
    student, cond = LowRankStudent.of(model, paths, rank=2, rng=Run().rng("f")), model.encode(["cat"] * 2)
    assert torch.equal(student.view().predict(state, cond), model.predict(state, cond))
    shown = Shown(cond, cond.mask)
    mass(attended(student.view(), state, shown, "all")[1], shown.columns).sum().backward()
    ups = [p.grad for p in student.parameters[1::2]]
    assert all(grad is not None and grad.norm() > 0 for grad in ups)
    assert all(p.grad is None for p in model.network.parameters())
    assert not student.patch().factors
    with pytest.raises(InputError, match="rank is 0"):
        LowRankStudent.of(model, paths, rank=0, rng=Run().rng("f"))


@pytest.mark.parametrize("name", FLOWS)
def test_only_text_queries_and_keys_change(name: str) -> None:
    patch = EraseAnything(**{**BRIEF, "steps": 4}).erase(load(name), BERRY, Run())
    assert {path.split(".")[-2] for path in patch.factors} == {"add_q_proj", "add_k_proj"}


def test_first_loss_is_one_plus_strength_guidances() -> None:
    """At B = 0, ‖v(c) − goal‖² = (1 + strength)² ‖v(c) − n‖²: strength −1 asks for nothing."""
    model = load("tiny-flux")

    def first(strength: float) -> float:
        log: list[float] = []
        method = EraseAnything(**BRIEF, strength=strength, attention_weight=0.0)
        method.erase(model, BERRY, Run(log=lambda name, _, value: log.append(value) if name == "loss" else None))
        return log[0]

    assert first(-1.0) < 1e-10
    assert first(1.0) == pytest.approx(4 * first(0.0), rel=1e-4) and first(0.0) > 1e-6


def test_bad_words_and_other_families_are_refused() -> None:
    with pytest.raises(InputError, match="irrelevant"):
        EraseAnything(irrelevant=("cat",)).erase(load("tiny-flux"), Request.of("cat"), Run())
    with pytest.raises(InputError, match="no joint attention"):
        EraseAnything().erase(load("tiny-unet"), BERRY, Run())


@pytest.mark.parametrize("temperature", [0.0, -0.07, math.nan])
def test_a_temperature_that_divides_by_nothing_is_refused_before_any_work(temperature: float) -> None:
    begun: list[str] = []
    run = Run(progress=lambda label, done, total: begun.append(label))
    with pytest.raises(InputError, match=f"^temperature is {temperature}; legal: above 0$"):
        EraseAnything(**BRIEF, temperature=temperature).erase(load("tiny-flux"), BERRY, run)
    assert not begun


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOWS)
def test_only_distilled_models_share_the_pool_among_scales(name: str) -> None:
    """Elsewhere every state has a sentence of its own, however many scales are named."""
    one, two = (
        EraseAnything(**{**BRIEF, "batch": 8}, embedded_scales=scales).erase(load(name), BERRY, Run()).tensors()
        for scales in ((1.0,), (1.0, 1.0))
    )
    assert all(torch.equal(one[path], two[path]) for path in one) == (name != "tiny-flux-distilled")


@pytest.mark.parametrize("name", FLOWS)
def test_the_pooled_route_is_left_open(name: str) -> None:
    """What the pooled text says to every block is the unchanged model's, bit for bit; its rows are answered anew."""
    model, state = load(name), some_state(load(name))
    brief = {"steps": 20, "lr": 1e-2, "keep_lr": 1e-3, "template": "{}", "strength": 0.0}
    edited = EraseAnything(**{**BRIEF, **brief}).erase(model, BERRY, Run()).on(model)
    target, anchor = model.encode(["strawberry"]), model.encode(["cat"])
    routes = {"pooled": replace(anchor, pooled=target.pooled), "tokens": replace(target, pooled=anchor.pooled)}

    def modulation(view: Generator, cond: Condition) -> dict[str, Tensor]:
        paths = [path for path, _ in model.network.named_modules() if re.search(r"norm\w*\.linear$", path)]
        seen: dict[str, Tensor] = {}
        hooks = [Hook(path, lambda m, i, o, path=path: seen.__setitem__(path, o)) for path in paths]
        view.view(hooks=hooks).predict(state, cond)
        return seen

    before, after, other = (
        modulation(view, cond)
        for view, cond in ((model, routes["pooled"]), (edited, routes["pooled"]), (model, anchor))
    )
    assert len(before) > 2 and all(torch.equal(before[path], after[path]) for path in before)
    assert all(not torch.equal(before[path], other[path]) for path in before)

    def moved(cond: Condition) -> float:
        old, new = (view.predict(state, cond) - view.predict(state, anchor) for view in (model, edited))
        return float((new - old).norm() / old.norm())

    assert moved(routes["pooled"]) < 0.8 * moved(routes["tokens"])


def test_synonyms_of_a_target_take_turns() -> None:
    two = Request(target=(Concept(name="cat", prompts=("cat", "red cat")),), anchor=(None,))
    lines, anchors, near = turns(two, "a photo of {}", 0.0, 2, Run().rng("wording"))
    assert [line.phrase for line in lines] == ["cat", "red cat"] and anchors == ["", ""]
    assert [line.phrase for line in near] == ["red cat", "cat"]
