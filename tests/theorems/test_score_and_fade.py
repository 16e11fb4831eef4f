"""What must hold for SCORE and FADE, reconstructions, and what must not."""

from dataclasses import replace

import pytest
import torch

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.methods.finetune.fade import Fade
from expunge.methods.finetune.score import Score
from expunge.models.load import load
from expunge.ops.game import Sides
from expunge.ops.pairs import Pairs
from expunge.ops.saliency import Look, denoising, most_salient
from expunge.ops.student import Student
from expunge.ops.trajectory import Walk

BRIEF = {"steps": 3, "pool": 6, "pairs": 8, "refresh": 2, "walk": 4, "pictures": 2, "draws": 2, "batch": 2}
BERRY = Request.of("strawberry", anchor="cat", retain=["dog"])
NAMES = ("tiny-unet", "tiny-flux-distilled")


class Log:
    """Keeps what a run logs."""

    def __init__(self) -> None:
        self.rows: dict[str, list[float]] = {}
        self.run = Run(log=lambda name, step, value: self.rows.setdefault(name, []).append(value))


@pytest.mark.parametrize("name", NAMES)
def test_with_nothing_but_what_is_kept_the_model_stays_bit_for_bit(name):
    log = Log()
    patch = Score(**BRIEF, adversarial=0.0, direction=0.0).erase(load(name), BERRY, log.run)
    assert log.rows["kept"] == [0.0] * 3
    assert not patch.deltas
    assert Score(**BRIEF, adversarial=1.0, direction=0.0).erase(load(name), BERRY, Run()).deltas


def test_scalars_outside_the_mask_keep_their_bits_and_the_share_is_exact():
    model = load("tiny-unet")
    method = Score(**BRIEF, share=0.25)
    patch = method.erase(model, BERRY, Run())
    student = Student.of(model, method.group)
    sides = Sides.of(model, BERRY, method.templates, method.embedded_scales)
    look = Look(kind="gradient", pictures=2, draws=2, steps=4)
    masks = dict(zip(student.names, most_salient(look.scores(student, sides.texts, Run()), 0.25), strict=True))
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.25 * total)
    moved = {path: delta != 0 for path, delta in patch.deltas.items()}
    assert moved
    assert all(not bool((where & ~masks[path]).any()) for path, where in moved.items())
    free = Score(**BRIEF, share=1.0).erase(model, BERRY, Run())
    assert any(bool(((delta != 0) & ~masks[path]).any()) for path, delta in free.deltas.items())


@pytest.mark.parametrize("name", NAMES)
def test_pairs_share_noise_and_level_and_the_same_prompt_twice_is_the_same_picture(name):
    model = load(name)
    cond = model.encode(["strawberry", "red cat"])
    plan, walk = {"size": 6, "refresh": 3}, Walk(prompts=cond, batch=1, guidance_scale=2.0, steps=5)
    teach = lambda state, which: (model.predict(state, cond.take(which)),)  # noqa: E731
    same = Pairs(walk=walk, twin=cond, **plan).walked(lambda: model, teach, Run())(0)
    assert torch.equal(same.state.x, same.twin.x)
    other = Pairs(walk=walk, twin=model.encode(["dog", "guitar"]), **plan).walked(lambda: model, teach, Run())
    pair = other(0)
    assert torch.equal(pair.state.t, pair.twin.t)
    start = pair.state.t == pair.state.t.max()
    assert torch.equal(pair.state.x[start], pair.twin.x[start])
    assert not torch.equal(pair.state.x[~start], pair.twin.x[~start])
    before = pair.state.x.clone()
    assert torch.equal(other(2).state.x, before)
    assert not torch.equal(other(3).state.x, before)


@pytest.mark.parametrize("name", ["tiny-unet", "tiny-unet-v", "tiny-flux"])
def test_the_saliency_loss_is_zero_for_the_true_prediction_in_every_parameterization(name):
    model = load(name)
    clean = torch.randn(4, *model.latent, generator=torch.Generator().manual_seed(1))
    losses = denoising(model, clean, model.encode(["cat"]), Run().rng("x"))
    state = model.noised(clean, rng=Run().rng("x"))
    zero, one = (model.as_clean(state, fill(state.x)) for fill in (torch.zeros_like, torch.ones_like))
    right = (clean - zero) / (one - zero)
    torch.testing.assert_close(model.as_clean(state, right), clean, rtol=1e-3, atol=1e-3)
    assert (losses > 1e-3).all()
    torch.testing.assert_close(losses, model.distance(model.predict(state, model.encode(["cat"])), right))


def test_every_target_has_a_head_and_every_sentence_a_twin():
    model = load("tiny-unet")
    request = Request(target=(Concept.of("strawberry"), Concept.of("cat")), anchor=(Concept.of("dog"), None))
    sides = Sides.of(model, request, ("{}", "a {} here"), (1.0,))
    assert sides.texts == ("strawberry", "a strawberry here", "cat", "a cat here")
    assert sides.head.tolist() == [0, 0, 1, 1]
    assert torch.equal(sides.twin.tokens, model.encode(["dog", "a dog here", "", "a here"]).tokens)
    assert torch.equal(sides.kept.tokens, model.encode([""]).tokens)
    with pytest.raises(InputError, match="templates is"):
        Sides.of(model, request, (), (1.0,))


def test_settings_that_cannot_be_played_are_refused():
    model = load("tiny-unet")
    for change, words in (({"turn": -1.0}, "turn is -1"), ({"share": 0.0}, "share is 0"), ({"pairs": 0}, "size is 0")):
        with pytest.raises(InputError, match=words):
            replace(Score(**BRIEF), **change).erase(model, BERRY, Run())


def test_fade_plays_without_a_direction_and_a_constant_opponent_teaches_nothing():
    log = Log()
    model = load("tiny-unet")
    patch = Fade(**BRIEF).erase(model, BERRY, log.run)
    assert patch.deltas
    assert set(log.rows) >= {"discriminator", "information", "adversarial", "kept"}
    assert not Fade(**BRIEF, adversarial=0.0).erase(model, BERRY, Run()).deltas
