"""What must hold for the projection method, and what must not."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from linear_toy import CROSS, LinearToy, deltas
from torch import Tensor, nn

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Eraser, Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.methods.closed_form.project import Project
from expunge.methods.closed_form.uce import UCE
from expunge.models.load import load

WIDTH = 24
PLAIN = {"templates": ("{}",), "held": "words", "rows": "tail", "cut": 0.3, "ridge": 0.1, "min_share": 0.05}


def wide(aliases: dict[str, str] | None = None, seed: int = 0) -> LinearToy:
    """The linear toy with room for more held rows: width 24, read by 40 outputs."""
    unet = nn.Module()
    linear = nn.Linear(WIDTH, 40, bias=False, dtype=torch.float64)
    linear.weight.data = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 5
    unet.add_module("cross", linear)
    network = nn.Module()
    network.add_module("unet", unet)
    return LinearToy(network=network, width=WIDTH, aliases=aliases or {})


TOY = wide()


def ask(*prompts: str, to: str | None = "dog", keep: Sequence[str] = ()) -> Request:
    target = tuple(Concept.of(prompt) for prompt in prompts)
    anchor = None if to is None else Concept.of(to)
    return Request(target=target, anchor=(anchor,) * len(target), retain=tuple(Concept.of(word) for word in keep))


def project(**words: Any) -> Project:
    return Project(**{**PLAIN, **words})


def weight(method: Eraser, request: Request, toy: LinearToy = TOY) -> Tensor:
    return toy.weight(CROSS) + deltas(method.erase(toy, request, Run()), toy)[CROSS]


def tail(prompt: str) -> Tensor:
    """Rows from the last word on, written here without the library's helpers."""
    return TOY.encode([prompt]).tokens[0, len(prompt.split()) :]


def words(prompt: str) -> Tensor:
    """Opening token, words, first closing token."""
    return TOY.encode([prompt]).tokens[0, : len(prompt.split()) + 2]


def invert(new: Tensor, old: Tensor, rows: Tensor) -> Tensor:
    """Least |W' e - W c|^2 over e, row by row: the attack of closed form."""
    goals = (rows @ old.T).T
    e = torch.linalg.lstsq(new, goals, driver="gelsd", rcond=1e-10).solution
    return (new @ e - goals).square().sum(0)


def stacked(model: Generator, route: str) -> Tensor:
    return torch.cat([site.weight.double() for site in model.sites("text_in") if site.reads == route])


def logged(method: Project, request: Request, model: Generator = TOY) -> list[tuple[str, int, float]]:
    seen: list[tuple[str, int, float]] = []
    method.erase(model, request, Run(log=lambda *entry: seen.append(entry)))
    return seen


def test_the_edit_is_one_projection_that_keeps_what_is_held() -> None:
    old, new = TOY.weight(CROSS), weight(project(), ask("cat", keep=["car", "red cup"]))
    p = torch.linalg.lstsq(old, new).solution
    torch.testing.assert_close(old @ p, new, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(p @ p, p, rtol=1e-8, atol=1e-8)
    k = round(WIDTH - float(p.trace()))
    assert k >= 1
    assert torch.linalg.matrix_rank(p, rtol=1e-9) == WIDTH - k
    held = torch.cat([words(prompt) for prompt in ("", "dog", "car", "red cup")])
    torch.testing.assert_close(held @ new.T, held @ old.T, rtol=1e-9, atol=1e-9)
    mixture = torch.randn(5, len(held), generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ held
    torch.testing.assert_close(mixture @ new.T, mixture @ old.T, rtol=1e-8, atol=1e-8)
    free = words("bird")[1:]
    assert ((free @ (new - old).T).norm(dim=1) > 1e-3).all()
    alone = weight(project(), ask("cat"))
    assert (words("car")[1:] @ (alone - old).T).norm() > 1e-2


@pytest.mark.parametrize("keep", [(), ("car", "red cup")])
def test_the_attack_that_undoes_uce_meets_the_floor(keep: Sequence[str]) -> None:
    old, c, request = TOY.weight(CROSS), tail("cat"), ask("cat", keep=keep)
    assert invert(weight(UCE(ridge=0.5), request), old, c).max() < 1e-15
    left = invert(weight(project(), request), old, c)
    ((name, index, floor),) = logged(project(), request)
    assert (name, index) == ("floor", 0)
    assert float(left.sum()) == pytest.approx(floor, rel=1e-6)  # attained: no higher floor would be true
    share = (floor / float(((c - tail("dog")) @ old.T).square().sum())) ** 0.5
    assert share > 0.2
    assert invert(weight(project(), request), old, words("dog")).max() < 1e-15


def test_no_embedding_found_by_chance_or_descent_is_below_the_floor() -> None:
    old, c, request = TOY.weight(CROSS), tail("cat"), ask("cat", keep=["car"])
    ((_, _, floor),) = logged(project(), request)

    def descend(new: Tensor) -> float:
        e = c.clone().requires_grad_()
        rate = 1 / float(torch.linalg.matrix_norm(new, ord=2)) ** 2
        velocity = torch.zeros_like(c)
        for _ in range(3000):
            (slope,) = torch.autograd.grad(0.5 * (e @ new.T - c @ old.T).square().sum(), e)
            velocity = 0.9 * velocity - rate * slope
            e = (e + velocity).detach().requires_grad_()
        return float((e @ new.T - c @ old.T).square().sum().detach())

    new = weight(project(), request)
    tries = c + 3 * torch.randn(2000, *c.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert (tries @ new.T - c @ old.T).square().sum((1, 2)).min() > floor
    assert descend(new) >= floor * (1 - 1e-9)
    assert descend(weight(UCE(ridge=0.5), request)) < 1e-3 * floor


@pytest.mark.parametrize("toward", ["anchor", "room"])
def test_the_target_gives_what_the_anchor_gave_only_if_it_is_sent_there(toward: str) -> None:
    old, new = TOY.weight(CROSS), weight(project(rows="word", toward=toward), ask("cat"))
    c, goal = TOY.encode(["cat"]).subject, TOY.encode(["dog"]).subject
    miss = float((c @ new.T - goal @ old.T).norm() / ((c - goal) @ old.T).norm())
    assert miss < 1e-9 if toward == "anchor" else miss > 0.1
    assert invert(new, old, c).min() > 1e-2  # the floor holds either way


def test_a_lower_cut_takes_more_directions_of_the_tail() -> None:
    def directions(**words: Any) -> int:
        p = torch.linalg.lstsq(TOY.weight(CROSS), weight(project(**words), ask("cat"))).solution
        return round(WIDTH - float(p.trace()))

    tail_length = TOY.window - 1
    assert directions(cut=1e-3) == tail_length
    assert 1 <= directions(cut=0.45) < tail_length
    assert directions(cut=1e-3, rows="word") == 1


def test_other_rows_are_spared_more_by_a_smaller_ridge_and_the_floor_is_lower() -> None:
    request = ask("cat", keep=["car", "red cup"])
    old, padding = TOY.weight(CROSS), torch.cat([TOY.encode([p]).tokens[0, 3:] for p in ("dog", "car", "red cup")])

    def found(ridge: float) -> tuple[float, float]:
        method = project(ridge=ridge, rows="word", min_share=0.0)
        ((_, _, floor),) = logged(method, request)
        return float((padding @ (weight(method, request) - old).T).norm()), floor

    moved, floors = zip(*(found(ridge) for ridge in (1e-4, 1e-2, 1.0, 1e4)), strict=True)
    assert list(floors) == sorted(floors) and floors[-1] > 1.05 * floors[0]
    assert moved[0] < moved[-1]


def test_several_concepts_have_a_floor_each() -> None:
    old, request = TOY.weight(CROSS), ask("cat", "red bird", keep=["car"])
    new = weight(project(), request)
    floors = [floor for _, _, floor in logged(project(), request)]
    assert len(floors) == 2
    for prompt, floor in zip(("cat", "red bird"), floors, strict=True):
        left = float(invert(new, old, tail(prompt)[: TOY.window - max(len(prompt.split()), 1)]).sum())
        assert left == pytest.approx(floor, rel=1e-6)
        assert floor > 1e-2
    alone = weight(project(), ask("cat", keep=["car", "red bird"]))
    assert invert(alone, old, words("red bird")).max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_stored_weights_keep_embeddings_of_usual_length_out(dtype: torch.dtype) -> None:
    old, c, request = TOY.weight(CROSS), tail("cat"), ask("cat", keep=["car"])
    exact = weight(project(), request)
    stored = exact.to(dtype).double()
    error = float(torch.linalg.matrix_norm(stored - exact, ord=2))
    assert error > 0
    goals = c @ old.T
    least = invert(exact, old, c).sqrt()

    def shortfall(penalty: float) -> tuple[Tensor, Tensor]:
        """How far the answers of penalised least squares stay from the goal, and how long the embeddings are."""
        tall = torch.cat([stored, penalty**0.5 * torch.eye(WIDTH, dtype=torch.float64)])
        wanted = torch.cat([goals, torch.zeros_like(c)], dim=1).T
        e = torch.linalg.lstsq(tall, wanted, driver="gelsd", rcond=1e-15).solution.T
        return (e @ stored.T - goals).norm(dim=1), e.norm(dim=1)

    for penalty in (1.0, 1e-3, 1e-5):
        left, size = shortfall(penalty)
        assert bool((left >= least - error * size - 1e-12).all())
        assert bool((left > 0.9 * least).all())
    left, size = shortfall(0.0)  # without a limit on their length the rounding alone carries some of the target
    assert float((left / least).min()) < 0.99
    assert size.max() > 100 * c.norm(dim=1).max()


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-sd3"])
def test_both_routes_of_an_mmdit_have_a_floor(name: str) -> None:
    model, request = load(name, dtype=torch.float64), Request.of("strawberry", anchor="cat")
    erased, undone = (m.erase(model, request, Run()).on(model) for m in (project(cut=0.1), UCE(ridge=0.5)))
    cond = model.encode(["strawberry"])
    entries = logged(project(cut=0.1), request, model)
    assert [(entry, index) for entry, index, _ in entries] == [("floor", 0)] * 2  # routes in alphabetical order
    rows = {"pooled": cond.pooled[:1].double(), "tokens": cond.subject.double()}
    for route, c in rows.items():
        old = stacked(model, route)
        size = float((c @ old.T).square().sum())
        assert float(invert(stacked(undone, route), old, c).sum()) < 1e-6 * size
        assert float(invert(stacked(erased, route), old, c).sum()) > 1e-4 * size
    pooled = float(invert(stacked(erased, "pooled"), stacked(model, "pooled"), rows["pooled"]).sum())
    assert pooled == pytest.approx(entries[0][2], rel=1e-6)


def test_a_concept_too_near_to_what_is_held_is_named() -> None:
    with pytest.raises(
        InputError, match=r"concept 'cat' lies within what is held but for .* min_share 0\.999"
    ) as caught:
        weight(project(min_share=0.999), ask("cat"))
    assert "\n" not in str(caught.value)
    assert weight(project(min_share=0.05), ask("cat")).isfinite().all()
    with pytest.raises(InputError, match="'bird'"):  # held itself: the other concept is not to blame
        weight(
            project(),
            Request(
                target=(Concept.of("cat"), Concept.of("bird")),
                anchor=(Concept.of("dog"), None),
                retain=(Concept.of("bird"),),
            ),
        )


@pytest.mark.parametrize("rows", ["tail", "word"])
def test_target_that_reads_as_its_anchor_is_refused(rows: str) -> None:
    toy = wide({"feline": "cat"})
    with pytest.raises(InputError, match="concept 'cat'"):
        weight(project(rows=rows), ask("cat", to="feline"), toy)
    assert weight(project(rows=rows), ask("cat", to="dog"), toy).isfinite().all()


def test_retaining_everything_leaves_no_room() -> None:
    with pytest.raises(InputError, match="concept 'cat' lies within what is held"):
        weight(project(), ask("cat", keep=[f"thing{i}" for i in range(WIDTH)]))
    with pytest.raises(InputError, match="concept 'cat' lies within what is held"):
        weight(project(held="window"), ask("cat", keep=["car", "red cup", "tree", "tall tree"]))


@pytest.mark.parametrize("field", ["ridge", "cut"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_ridge_and_cut_must_be_positive(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{field} is {value}; legal: above 0") as caught:
        weight(project(**{field: value}), ask("cat"))
    assert "\n" not in str(caught.value)


def test_held_decides_which_rows_stay() -> None:
    old, request = TOY.weight(CROSS), ask("cat", keep=["car"])
    car = TOY.encode(["car"]).tokens[0]
    parts = {"word": car[1:2], "words": car[:3], "window": car}

    def moved(held: str, rows: Tensor) -> float:
        return float((rows @ (weight(project(held=held, cut=0.5), request) - old).T).norm())

    for held, rows in parts.items():
        assert moved(held, rows) < 1e-8, held
    assert moved("word", parts["words"]) > 1e-3
    assert moved("words", parts["window"]) > 1e-3


def test_templates_erase_and_hold_the_phrases_they_make() -> None:
    old = TOY.weight(CROSS)
    both = weight(project(templates=("{}", "old {}")), ask("cat", keep=["car"]))
    one = weight(project(), ask("cat", keep=["car"]))
    assert (words("old car") @ (both - old).T).norm() < 1e-8 < 1e-3 < (words("old car") @ (one - old).T).norm()
    empty = weight(project(templates=("{}", "old {}")), ask("cat", to=None))  # an empty anchor stays empty
    assert (words("") @ (empty - old).T).norm() < 1e-8
    assert (words("old")[1:] @ (empty - old).T).norm() > 1e-3


def test_half_precision_weights_get_float32_deltas_and_keep_their_dtype() -> None:
    model = load("tiny-unet", dtype=torch.bfloat16)
    patch = project().erase(model, Request.of("strawberry", anchor="cat"), Run())
    assert {change.dtype for change in deltas(patch, model).values()} == {torch.float32}
    assert {site.weight.dtype for site in patch.on(model).sites("text_in")} == {torch.bfloat16}
