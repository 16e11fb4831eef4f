"""Embedding attacks on tiny models: exact where the algebra says so, powerless where nothing reads the prompt."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expunge.attacks.embedding.kv_inversion import KVInversion
from expunge.attacks.embedding.soft_token import SoftToken
from expunge.core.attack import Aim, Attempt
from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.core.registry import find
from expunge.models.load import load
from expunge.ops.denoising import denoising_loss, noised_goal
from expunge.ops.inversion import Sent, inverse_reading, residual, undoing
from expunge.stages.certify import statements

CAT = Concept(name="cat", prompts=("cat",))
PLAIN = Aim(concept=CAT, prompts=("a red cat", "cat"), seeds=(3, 4))


def edited(model: Generator, m: Tensor) -> Generator:
    """Every text-reading layer W becomes W M."""
    return model.view(weights={s.path: (s.weight.double() @ m).to(s.weight) for s in model.sites("text_in")})


def drawn(attempt: Attempt) -> Tensor:
    return attempt.model.generate(attempt.prompts, seeds=attempt.seeds, guidance_scale=3.0, steps=2)


@pytest.fixture(scope="module")
def model() -> Generator:
    return load("tiny-unet")


def width(model: Generator) -> int:
    return model.sites("text_in")[0].weight.shape[1]


def regular(n: int) -> Tensor:
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.eye(n, dtype=torch.float64) + 0.3 * noise / n**0.5


def test_undoing_a_regular_matrix_is_its_inverse() -> None:
    rng = torch.Generator().manual_seed(1)
    old = [torch.randn(12, 8, generator=rng, dtype=torch.float64) for _ in range(3)]
    m = regular(8)
    assert torch.allclose(undoing(old, [w @ m for w in old]), torch.linalg.inv(m), atol=1e-9)
    pulled = undoing(old, [w @ m for w in old], ridge=10.0)
    assert pulled.norm() < torch.linalg.inv(m).norm() / 2


def test_inversion_draws_the_unerased_models_pictures_after_a_regular_edit(model: Generator) -> None:
    erased = edited(model, regular(width(model)))
    (attempt,) = KVInversion().search(erased, PLAIN, Run(), reference=model)
    want = replace(attempt, model=model)
    assert bool(((drawn(attempt) - drawn(want)).abs() < 1e-3).all())
    assert not torch.allclose(drawn(replace(attempt, model=erased)), drawn(want), atol=1e-2)
    assert attempt.facts["residual"] < 1e-4 < 0.1 < attempt.facts["residual_untouched"]
    (half,) = KVInversion(negative=False).search(erased, PLAIN, Run(), reference=model)
    assert not torch.equal(drawn(half), drawn(attempt)), "the negative prompt is still read by the edited layers"
    (lucky,) = KVInversion().random(erased, PLAIN, Run(), reference=model, found=attempt)
    assert not torch.allclose(drawn(lucky), drawn(want), atol=1e-2)


def test_inversion_does_not_bring_back_what_a_projection_removed(model: Generator) -> None:
    """With W' = W P, P an orthogonal projection, the best is A = P in the span that W reads: W c - W P c is lost."""
    row = model.encode(["cat"]).subject[0].double()
    q = row / row.norm()
    erased = edited(model, torch.eye(len(row), dtype=torch.float64) - torch.outer(q, q))
    (attempt,) = KVInversion().search(erased, PLAIN, Run(), reference=model)
    cond = model.encode(PLAIN.prompts)
    maps = inverse_reading(model, erased)
    old = torch.cat([s.weight.double() for s in model.sites("text_in")])
    # the least-squares distance from W c to the range of W P, by an independent solver
    new = torch.cat([s.weight.double() for s in erased.sites("text_in")])
    want = old @ cond.tokens.flatten(0, 1).double().T
    best = new @ torch.linalg.lstsq(new, want, rcond=1e-5, driver="gelsd").solution
    lost = float((best - want).norm() / want.norm())
    assert lost > 1e-3
    assert attempt.facts["residual"] == pytest.approx(lost, rel=1e-3)
    assert residual(model, erased, maps, cond) == attempt.facts["residual"]
    assert not torch.allclose(drawn(attempt), drawn(replace(attempt, model=model)), atol=1e-3)


def test_the_inversion_that_undoes_uce_meets_the_floor_of_project(model: Generator) -> None:
    request, aim = Request.of("cat", anchor="dog", retain=("car",)), replace(PLAIN, prompts=("cat",), seeds=(3,))
    logged: list[tuple[str, int, float]] = []
    run = Run(log=lambda *row: logged.append(row))
    views = {
        name: find("methods", name)(templates=("{}",)).erase(model, request, run).on(model)
        for name in ("uce", "project")
    }
    found = {
        name: next(iter(KVInversion().search(view, aim, Run(), reference=model))).facts["residual"]
        for name, view in views.items()
    }
    ((_, _, floor),) = [row for row in logged if row[0] == "floor"]
    said = (
        torch.cat([site.weight.double() for site in model.sites("text_in")])
        @ model.encode(["cat"]).tokens[0].double().T
    )
    least = floor**0.5 / float(said.norm())
    assert found["uce"] < 1e-4 < 0.05 < least
    assert found["project"] > least * (1 - 1e-4)
    certified = {
        name: next(c for c in statements(model, view, request) if c.name == "inversion") for name, view in views.items()
    }
    assert certified["uce"].value < 1e-4 < 0.1 < certified["project"].value


@pytest.mark.parametrize("name", ["tiny-sdxl", "tiny-flux", "tiny-sd3"])
def test_inversion_knows_every_text_route(name: str) -> None:
    base = load(name)
    routes = {s.reads for s in base.sites("text_in")}
    changed = base.view(
        weights={s.path: (s.weight.double() @ regular(s.weight.shape[1])).to(s.weight) for s in base.sites("text_in")}
    )
    maps = inverse_reading(base, changed)
    assert maps.keys() == routes
    cond = base.encode(["a red cat"])
    assert residual(base, changed, maps, cond) < 1e-3
    assert Sent(maps).condition(cond).tokens.shape == cond.tokens.shape


def test_inversion_refuses_an_artifact_that_left_the_text_layers_alone(model: Generator) -> None:
    path = next(path for path in model.select("non_cross_attention") if path.endswith("weight"))
    other = model.view(weights={path: model.weight(path) * 1.1})
    with pytest.raises(InputError, match="nothing to invert"):
        list(KVInversion().search(other, PLAIN, Run(), reference=model))


@pytest.mark.parametrize("name", ["tiny-unet", "tiny-unet-v", "tiny-flux"])
def test_the_goal_of_training_is_what_the_clean_picture_asks_for(name: str) -> None:
    """From the goal, the noise, and from the noise the clean latent back."""
    model = load(name)
    clean = torch.randn(3, *model.latent, generator=torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
    state, goal = noised_goal(model, clean, Run(), ("goal",))
    assert torch.equal(state.x, model.noised(clean, rng=Run().rng("goal")).x)
    eps = model.as_eps(state, goal)
    noise = model.noised(torch.zeros_like(clean), rng=Run().rng("goal")).x
    ratio = noise.flatten(1).norm(dim=1) / eps.flatten(1).norm(dim=1)
    assert torch.allclose(eps * ratio[:, None, None, None], noise, atol=1e-3)
    assert torch.allclose(eps.std(), torch.tensor(1.0), atol=0.2)


def lesson(model: Generator, word: str = "cat", count: int = 4) -> Aim:
    images = model.generate([word] * count, seeds=range(count), guidance_scale=3.0, steps=3)
    return replace(PLAIN, images=images, captions=(f"a picture of a {word}",) * count)


SHORT = SoftToken(steps=15, lr=0.05, batch=4, curve=(1,))


def loss(model: Generator, prompt: str, aim: Aim) -> float:
    """The denoising loss under a prompt, on noise that no training drew."""
    assert aim.images is not None
    clean = model.absorb(aim.images).repeat(8, 1, 1, 1)
    with torch.no_grad():
        return float(denoising_loss(model, clean, model.encode([prompt]), Run(seed=9), ("held out",)).mean())


def test_a_soft_token_explains_the_pictures_better_than_the_erased_word(model: Generator) -> None:
    """Weakly erased: the word reads as another one, everything else is as it was."""
    erased, aim = edited(model, regular(width(model))), lesson(model)
    first, last = SHORT.search(erased, aim, Run(), reference=model)
    assert (first.step, last.step, last.gradients) == (1, 15, 60)
    assert last.prompts == ("a red x", "x")
    (lucky,) = SHORT.random(erased, aim, Run(), reference=model, found=last)
    learned = loss(last.model, "a picture of a x", aim)
    assert learned < loss(first.model, "a picture of a x", aim)
    assert learned < loss(erased, "a picture of a cat", aim)
    assert learned < loss(lucky.model, "a picture of a x", aim)


def test_a_soft_token_gets_nothing_out_of_a_model_that_reads_nothing(model: Generator) -> None:
    deaf = model.view(weights={s.path: torch.zeros_like(s.weight) for s in model.sites("text_in")})
    *_, last = replace(SHORT, steps=3, curve=()).search(deaf, lesson(model), Run(), reference=model)
    assert torch.equal(drawn(last), drawn(replace(last, model=deaf)))


def test_a_soft_token_changes_the_word_alone_and_follows_from_the_seed(model: Generator) -> None:
    short = replace(SHORT, steps=2, curve=())
    (once,) = short.search(model, lesson(model), Run(seed=5), reference=model)
    (again,) = short.search(model, lesson(model), Run(seed=5), reference=model)
    other, same = once.model.encode(["blue car"]), model.encode(["blue car"])
    assert torch.equal(other.tokens, same.tokens)
    assert torch.equal(once.model.encode(["x"]).tokens, again.model.encode(["x"]).tokens)
    assert not torch.equal(once.model.encode(["x"]).tokens, model.encode(["x"]).tokens)
    for path, _ in model.network.named_parameters():
        assert once.model.weight(path) is model.weight(path)


@pytest.mark.parametrize("name", ["tiny-sdxl", "tiny-flux", "tiny-sd3"])
def test_a_soft_token_has_a_row_in_every_text_encoder(name: str) -> None:
    base = load(name)
    (attempt,) = replace(SHORT, steps=1, curve=()).search(base, lesson(base, count=1), Run(), reference=base)
    encoders = [part for part, _ in base.network.named_children() if part.startswith("text_encoder")]
    assert len(attempt.model.hooks) == len(encoders) > 1  # type: ignore[attr-defined]
    (lucky,) = SHORT.random(base, PLAIN, Run(), reference=base, found=attempt)
    assert torch.isfinite(lucky.model.encode(["x"]).tokens).all()


BAD = {"steps": 0, "batch": 0, "images": 0, "lr": 0.0, "curve": (0,)}


@pytest.mark.parametrize("field", BAD)
def test_a_budget_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(InputError, match=f"{field} is .*legal"):
        SoftToken(**{field: BAD[field]})


def test_a_word_of_the_prompt_cannot_stand_for_nothing(model: Generator) -> None:
    with pytest.raises(InputError, match="red"):
        list(replace(SHORT, word="red").search(model, lesson(model), Run(), reference=model))


def test_uce_is_undone_on_a_tiny_model(model: Generator) -> None:
    request = Request.of("cat", anchor="dog")
    erased = find("methods", "uce")().erase(model, request, Run()).on(model)
    (attempt,) = KVInversion().search(erased, PLAIN, Run(), reference=model)
    assert bool(((drawn(attempt) - drawn(replace(attempt, model=model))).abs() < 2e-3).all())
