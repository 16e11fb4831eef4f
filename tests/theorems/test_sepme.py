"""What must hold for SepME's separable shifts, and what must not."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_toy import CROSS, LinearToy
from torch import Tensor

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator, Hook, State
from expunge.methods.finetune.sepme import SepME
from expunge.models.load import load
from expunge.ops.decoupling import Settling, ShiftStudent, balance, correlation, free_basis
from expunge.ops.fit import accumulate, fit
from expunge.ops.rows import prompt_rows
from expunge.ops.student import Learner

F64 = torch.float64
SHORT: dict[str, Any] = {"rows": "words", "steps": 3, "walk": 2, "pictures": 2, "lr": 1e-2, "threshold": -1.0}


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def ask(*words: str, keep: tuple[str, ...] = ()) -> Request:
    target = tuple(map(Concept.of, words))
    return Request(target=target, anchor=(None,) * len(words), retain=tuple(map(Concept.of, keep)))


def erase(request: Request, model: Generator | None = None, **options: Any) -> dict[str, Tensor]:
    return SepME(**{**SHORT, **options}).erase(model or load("tiny-unet"), request, Run()).deltas


# --- the free directions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "width"), [(3, 8), (7, 8), (40, 50), (200, 60)])
def test_free_directions_are_all_and_only_those_no_row_has_a_part_in(count: int, width: int) -> None:
    rank = min(count, width - 2)
    rows = randn(0, count, rank) @ randn(1, rank, width)
    basis = free_basis(torch.cat([rows, rows[:1]]))
    assert basis.shape == (width - rank, width)
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=F64))
    assert (rows @ basis.T).norm() < 1e-10 * rows.norm()
    assert (rows[1:] @ free_basis(rows[:1]).T).norm() > 0.1 * rows.norm()


def test_tolerance_frees_directions_at_a_price_that_is_bounded() -> None:
    left, right = (torch.linalg.qr(randn(seed, 6, 6)).Q for seed in (2, 3))
    rows = left @ torch.diag(torch.tensor([10.0, 5.0, 1.0, 0.1, 0.01, 1e-9]).double()) @ right
    sizes = [len(free_basis(rows, tolerance)) for tolerance in (0.0, 2e-3, 0.02, 0.2, 0.6)]
    assert sizes == [1, 2, 3, 4, 5]
    for tolerance in (0.02, 0.2):
        felt = torch.linalg.matrix_norm(rows @ free_basis(rows, tolerance).T, 2)
        assert 1e-3 < felt <= tolerance * 10
    assert len(free_basis(randn(4, 9, 5))) == 0 and len(free_basis(torch.zeros(2, 5))) == 5
    for wrong in (-0.1, 1.0):
        with pytest.raises(InputError, match=f"tolerance is {wrong}; legal: 0 to below 1"):
            free_basis(rows, wrong)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tiny-unet", "tiny-unet-v"])
def scene(request: pytest.FixtureRequest) -> tuple[Any, State, Any, Any]:
    """Toy, two noised pictures, target and empty prompt."""
    model: Any = load(request.param)
    cond, plain = model.encode(["red cat"] * 2), model.encode([""] * 2)
    return model, model.noised(0.5 * torch.ones(2, *model.latent), rng=Run().rng("state")), cond, plain


def test_correlation_begins_at_the_mean_square_and_has_a_sign(scene: Any) -> None:
    model, state, cond, plain = scene
    with torch.no_grad():
        one, two = (model.as_eps(state, model.predict(state, c)) for c in (cond, plain))
        same = correlation(model, model, state, cond, plain)
        turned = correlation(model, model, state, plain, cond)
    torch.testing.assert_close(same, (one - two).square().mean())
    torch.testing.assert_close(same, turned)  # both guidances turn round
    assert same > 1e-4

    def swapped(module: Any, inputs: Any, output: Any) -> Any:
        """Answer about one prompt as about the other: guidance turns into its negative."""
        return (output[0].roll(len(output[0]) // 2, 0),)

    flipped = model.view(hooks=[Hook("unet", swapped)])
    with torch.no_grad():
        torch.testing.assert_close(correlation(flipped, model, state, cond, plain), -same)
        assert float(correlation(model, model, state, plain, plain).abs()) < 1e-10


def test_each_concept_s_loss_reaches_its_own_shift_alone() -> None:
    """On a toy that reads the last word only, shifts of two concepts, both under way."""
    toy = LinearToy.seeded()
    cat, dog, empty = (toy.encode([text] * 2) for text in ("cat", "dog", ""))
    mine, other = (free_basis(torch.stack([rows.subject[0], empty.subject[0]])) for rows in (dog, cat))
    student = ShiftStudent(toy, [CROSS], [mine, other])
    with torch.no_grad():
        for seed, part in enumerate(student.parameters):
            part.add_(randn(seed, *part.shape).float())
    state = State(randn(5, 2, 4, 2, 2), torch.full((2,), 0.5))
    for cond, own, foreign in ((cat, 0, 1), (dog, 1, 0)):
        grads = torch.autograd.grad(correlation(student.view(), toy, state, cond, empty), student.parameters)
        assert grads[own].norm() > 1e-2 and grads[foreign].norm() < 1e-6 * grads[own].norm()
    # a basis that knows nothing of the cat is felt by it
    free = ShiftStudent(toy, [CROSS], [mine, free_basis(empty.subject[:1])])
    grads = torch.autograd.grad(correlation(free.view(), toy, state, cat, empty), free.parameters)
    assert grads[1].norm() > 1e-2


def test_a_new_student_is_the_base_and_leaves_the_network_alone(scene: Any) -> None:
    model, state, cond, plain = scene
    basis = free_basis(plain.tokens[0, :2])
    student = ShiftStudent(model, [site.path for site in model.sites("text_in")], [basis])
    assert torch.equal(student.view().predict(state, cond), model.predict(state, cond))
    assert student.patch().deltas == {}
    correlation(student.view(), model, state, cond, plain).backward()
    assert all(part.grad is not None and bool(part.grad.any()) for part in student.parameters)
    assert all(p.grad is None for p in model.network.parameters())
    with pytest.raises(InputError, match="legal: out x 7"):
        ShiftStudent(model, student.names, [torch.zeros(1, 7)])


def test_terms_are_balanced_to_the_largest() -> None:
    values = torch.tensor([0.1, -0.4, 0.2], requires_grad=True)
    weight = balance(values)
    torch.testing.assert_close(weight * values, torch.tensor([0.4, -0.4, 0.4]))
    assert not weight.requires_grad and balance(torch.tensor([3.0])).tolist() == [1.0]
    assert bool(balance(torch.tensor([0.0, 1.0])).isfinite().all())


# --- when to stop, and how gradients add up ---------------------------------------------------------------------------


def stopped(losses: list[float], bound: float) -> int | None:
    settling = Settling(bound)
    for count, value in enumerate(losses, 1):
        settling.see(value)
        if settling.done:
            return count
    return None


def test_the_mean_must_be_below_and_ten_losses_seen() -> None:
    assert stopped([0.5] * 40, 1.0) == 11
    assert stopped([1.0] * 40, 1.0) is None
    assert stopped([-3.0] * 40, 0.0) == 11
    assert stopped([1.0] * 20 + [0.0] * 40, 0.5) == 27  # 0.9^7 < 0.5
    assert stopped([1.0] * 20 + [0.0] * 6, 0.5) is None


class Plane(Learner):
    """A learner of two numbers."""

    names = ()

    def __init__(self) -> None:
        self.point = torch.zeros(2, requires_grad=True)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.point,)

    def weights(self) -> dict[str, Tensor]:
        return {}


def test_a_loop_ends_where_it_is_told_to_and_gradients_add_up_where_asked() -> None:
    def run(adds: bool, until: Any = None) -> list[float]:
        plane, seen = Plane(), []
        if adds:
            accumulate(plane.parameters)

        def loss(step: int) -> Tensor:
            return plane.point @ torch.tensor([1.0, (-2.0) ** step])

        log = Run(log=lambda name, step, value: seen.append(value) if name == "grad_norm" else None)
        fit(plane, loss, log, steps=4, lr=0.1, until=until and (lambda: until(seen)))
        return seen

    single = [(1.0, 1.0), (1.0, -2.0), (1.0, 4.0), (1.0, -8.0)]
    sums = [(1.0, 1.0), (2.0, -1.0), (3.0, 3.0), (4.0, -5.0)]
    assert run(False) == pytest.approx([math.hypot(*g) for g in single])
    assert run(True) == pytest.approx([math.hypot(*g) for g in sums])
    assert len(run(False, lambda seen: len(seen) == 2)) == 2
    assert len(run(False, lambda seen: False)) == 4


# --- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-unet", "tiny-sdxl"])
def test_held_words_give_what_they_gave_and_the_target_does_not(name: str) -> None:
    model = load(name)
    deltas = erase(ask("red cat", keep=("blue car", "guitar")), model)
    sites = {site.path: site.weight.double() for site in model.sites("text_in")}
    assert deltas.keys() == sites.keys()
    held = torch.cat(prompt_rows(model.encode(["", "blue car", "guitar"]), "tokens", "words")).double()
    own = model.encode(["red cat"]).tokens[0].double()
    loose = erase(ask("red cat"), model)
    for path in sites:
        size = float(deltas[path].double().norm() * held.norm(dim=1).max())
        assert (held @ deltas[path].double().T).abs().max() < 1e-6 * size
        assert (own @ deltas[path].double().T).abs().max() > 1e-2 * size / held.shape[1] ** 0.5
        assert (held @ loose[path].double().T).abs().max() > 1e-3 * size


def test_watermarks_are_held_like_the_other_texts() -> None:
    model = load("tiny-unet")
    sign = model.encode(["guitar"]).tokens[0].double()
    exact = SepME(**{**SHORT, "tolerance": 0.0})
    held, free = (
        replace(exact, watermarks=texts).erase(model, ask("red cat"), Run()).deltas for texts in (("guitar",), ())
    )
    words = model.encode(["guitar"]).mask[0]
    for path, delta in held.items():
        size = float(delta.double().norm() * sign.norm(dim=1).max())
        assert (sign[words] @ delta.double().T).abs().max() < 1e-6 * size
        assert (sign[words] @ free[path].double().T).abs().max() > 1e-3 * size


def test_the_network_says_the_same_about_a_window_that_is_held() -> None:
    """With all rows of the empty prompt held, predictions under it do not move; with its words alone they do."""
    model = load("tiny-unet")
    window = SepME(**{**SHORT, "rows": "window", "lr": 0.1}).erase(model, ask("red cat"), Run())
    words = SepME(**{**SHORT, "lr": 0.1}).erase(model, ask("red cat"), Run())
    cond, empty = model.encode(["red cat"]), model.encode([""])
    state = model.visit(cond, rng=Run().rng("x"), guidance_scale=1.0, steps=3)

    def moved(patch: Any, asked: Any) -> float:
        gap = patch.on(model).predict(state, asked) - model.predict(state, asked)
        return float(gap.norm() / model.predict(state, asked).norm())

    with torch.no_grad():
        assert moved(window, empty) < 1e-4 < 1e-2 < moved(window, cond)
        assert moved(words, empty) > 1e-3


def test_shifts_learned_together_are_the_sum_of_shifts_learned_alone() -> None:
    """Which concept is a target and which is retained changes nothing: this is what makes shifts separable."""
    both = erase(ask("red cat", "guitar", keep=("dog",)))
    cat, guitar = erase(ask("red cat", keep=("guitar", "dog"))), erase(ask("guitar", keep=("dog", "red cat")))
    for path, delta in both.items():
        torch.testing.assert_close(delta, cat[path] + guitar[path], rtol=1e-5, atol=1e-8)
        assert cat[path].norm() > 0 and guitar[path].norm() > 0
    alone = erase(ask("red cat"))
    assert any((alone[path] - cat[path]).norm() > 1e-2 * cat[path].norm() for path in cat)


def test_shifts_commute_and_leave_by_leaving() -> None:
    model = load("tiny-unet")
    one = SepME(**SHORT).erase(model, ask("red cat", keep=("guitar",)), Run())
    two = SepME(**SHORT).erase(model, ask("guitar", keep=("red cat",)), Run())
    there, back = two.on(one.on(model)), one.on(two.on(model))
    for site in model.sites("text_in"):
        torch.testing.assert_close(there.weight(site.path), back.weight(site.path), rtol=0, atol=1e-6)
        assert (there.weight(site.path) - one.on(model).weight(site.path)).abs().max() > 1e-4
        assert torch.equal(model.weight(site.path), site.weight)  # what is not laid on is off, to the bit


def test_training_lowers_the_correlation_and_ends_below_the_threshold() -> None:
    def run(**options: Any) -> list[float]:
        seen: list[float] = []
        log = Run(log=lambda name, step, value: seen.append(value) if name == "correlation red cat" else None)
        method = SepME(**{**SHORT, "batch": 2, "steps": 60, "rows": "words", **options})
        method.erase(load("tiny-unet"), ask("red cat", keep=("dog",)), log)
        return seen

    free = run()
    assert len(free) == 60 and free[0] > 0 and free[-1] < 0.2 * free[0]
    early = run(threshold=0.5 * free[0])
    assert 11 <= len(early) < 60 and early == free[: len(early)]
    assert len(run(threshold=10 * free[0])) == 11


def test_every_option_matters() -> None:
    def flat(*words: str, **options: Any) -> Tensor:
        return torch.cat([delta.flatten() for delta in erase(ask(*words), **options).values()])

    plain = flat("red cat")
    for option in (
        {"gradients": "accumulated"},
        {"against": "red"},
        {"watermarks": ("made by nobody",)},
        {"templates": ("a photo of {}",)},
        {"penalty": 1.0},
        {"tolerance": 0.99},
        {"batch": 2},
    ):
        assert not torch.equal(plain, flat("red cat", **option)), option
    assert torch.equal(plain, flat("red cat"))
    assert torch.equal(plain, flat("red cat", order="joint"))  # one concept is one concept
    assert not torch.equal(flat("red cat", "dog"), flat("red cat", "dog", order="joint"))


def test_a_heavy_penalty_keeps_the_shift_small() -> None:
    def size(penalty: float) -> float:
        return float(sum(d.abs().sum() for d in erase(ask("red cat"), steps=20, lr=1e-3, penalty=penalty).values()))

    assert size(1.0) < 0.5 * size(0.0)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_target_among_what_is_held_is_named() -> None:
    twin = Concept(name="kitten", prompts=("kitten", "red cat"))
    with pytest.raises(InputError, match="target 'red cat' and retained concept 'kitten' share the prompt 'red cat'"):
        replace(ask("red cat"), retain=(twin,))


def test_too_many_others_are_refused_before_anything_is_drawn() -> None:
    seen: list[str] = []
    run = Run(progress=lambda label, done, total: seen.append(label))
    full = ask("red cat", "banana", keep=("guitar", "blue car"))
    with pytest.raises(InputError, match=r"concept 'red cat' .* of 4 other texts: \d of 32 directions; retain less"):
        SepME(**{**SHORT, "rows": "window", "tolerance": 0.0}).erase(load("tiny-unet"), full, run)
    assert seen == []
    assert SepME(**SHORT).erase(load("tiny-unet"), full, run).deltas


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps is 0; legal: 1 or more"),
        ({"pictures": 0}, "pictures is 0; legal: 1 or more"),
        ({"batch": 0}, "batch is 0; legal: 1 or more"),
        ({"penalty": -1.0}, "penalty is -1.0; legal: 0 or more"),
        ({"tolerance": 1.0}, "tolerance is 1.0; legal: 0 to below 1"),
        ({"templates": ("a photo",)}, "template is 'a photo'; legal"),
    ],
)
def test_bad_settings_are_one_line(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        SepME(**{**SHORT, **wrong}).erase(load("tiny-unet"), ask("red cat"), Run())
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="'tiny-flux' is 'mmdit', legal: unet"):
        SepME(**SHORT).erase(load("tiny-flux"), ask("red cat"), Run())
