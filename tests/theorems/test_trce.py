"""What must hold for TRCE's first stage, and what must not."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_toy import CROSS, LinearToy, deltas
from torch import Tensor

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.methods.closed_form.trce import TRCE
from expunge.models.load import load

F64 = torch.float64
TOY = LinearToy.seeded()
FORMS = ("{}", "red {}")
OWN = TRCE(templates=FORMS, ridge=0.3, prior_weight=0.05, retain_weight=0.02)
WEIGHTS = ("opening_weight", "closing_weight", "word_weight", "padding_weight")


def ask(*prompts: str, to: str | None = "dog", keep: Sequence[str] = ()) -> Request:
    anchor = None if to is None else Concept.of(to)
    target = tuple(map(Concept.of, prompts))
    return Request(target=target, anchor=(anchor,) * len(target), retain=tuple(map(Concept.of, keep)))


def change(method: TRCE, request: Request, toy: LinearToy = TOY) -> Tensor:
    return deltas(method.erase(toy, request, Run()), toy).get(CROSS, torch.zeros_like(toy.weight(CROSS)))


def row(text: str, at: int) -> Tensor:
    return TOY.encode([text]).tokens[0, at]


def objective(weight: Tensor, method: TRCE, pairs: Sequence[tuple[str, str]], keep: Sequence[str]) -> Tensor:
    """The sum of squares of the docstring, row by row, on a toy whose words are tokens."""
    old, total = TOY.weight(CROSS), method.ridge * (weight - TOY.weight(CROSS)).square().sum()
    share, last = 1 / (len(pairs) * len(FORMS)), TOY.window - 1

    def miss(gain: float, key: Tensor, goal: Tensor) -> Tensor:
        return gain * (weight @ key - old @ goal).square().sum()

    for t, a in ((form.format(t), form.format(a)) for t, a in pairs for form in FORMS):
        size, end = len(t.split()), len(t.split()) + 1
        total = total + share * miss(method.opening_weight, row(t, 0), row(a, 0))
        total = total + share * miss(method.closing_weight, row(t, end), row(a, len(a.split()) + 1))
        total = total + share * miss(method.padding_weight * (TOY.window - size - 2), row(t, last), row(a, last))
        phrase = next(p for p, _ in pairs if t.endswith(p))
        for at in range(size - len(phrase.split()) + 1, size + 1):
            total = total + share * miss(method.word_weight, row(t, at), row(a, last))
    for gain, texts in (
        (method.prior_weight, [""]),
        (method.retain_weight, [f.format(p) for p in keep for f in FORMS]),
    ):
        for text in texts:
            total = total + gain * (TOY.encode([text]).tokens[0] @ (weight - old).T).square().sum()
    return total


@pytest.mark.parametrize(
    "method",
    [
        OWN,
        replace(OWN, word_weight=0.7, padding_weight=0.4, opening_weight=2.0),
        replace(OWN, closing_weight=0.0, word_weight=1.0, ridge=5.0),
    ],
)
def test_the_edit_is_stationary_for_the_stated_objective(method: TRCE) -> None:
    pairs, keep = [("tabby cat", "dog"), ("bird", "dog")], ["car"]
    old, found = TOY.weight(CROSS), change(method, ask("tabby cat", "bird", keep=keep))

    def slope(weight: Tensor, method: TRCE = method) -> float:
        point = weight.clone().requires_grad_()
        return float(torch.autograd.grad(objective(point, method, pairs, keep), point)[0].norm())

    assert slope(old + found) < 1e-10 * slope(old)
    assert slope(old) > 1e-2
    for name in ("ridge", "prior_weight", "retain_weight", *WEIGHTS):
        other = replace(method, **{name: getattr(method, name) + 0.5})
        if name != "opening_weight" or method.opening_weight:
            assert slope(old + found, other) > 1e-4, name


def test_a_sentence_that_reads_as_its_anchor_s_changes_nothing() -> None:
    toy = LinearToy(network=TOY.network, aliases={"feline": "cat"})
    for method in (OWN, replace(OWN, padding_weight=1.0, opening_weight=1.0), replace(OWN, prior_weight=0.0)):
        assert deltas(method.erase(toy, ask("cat", to="feline"), Run()), toy) == {}
        assert deltas(method.erase(toy, ask("cat", to="dog"), Run()), toy) != {}
    # the code's goal for keywords is another row than the keyword's own, so there even that moves
    assert change(replace(OWN, word_weight=1.0), ask("cat", to="feline"), toy).norm() > 1e-3


def test_no_weight_on_any_row_changes_nothing_whatever_is_held() -> None:
    for held in (0.0, 1.0):
        none = replace(OWN, closing_weight=0.0, prior_weight=held, retain_weight=held)
        assert deltas(none.erase(TOY, ask("cat", keep=["car"]), Run()), TOY) == {}
        assert deltas(replace(none, opening_weight=1.0).erase(TOY, ask("cat", keep=["car"]), Run()), TOY) == {}
        assert deltas(replace(none, closing_weight=0.1).erase(TOY, ask("cat", keep=["car"]), Run()), TOY) != {}


def test_rank_is_at_most_the_number_of_sentences() -> None:
    def rank(method: TRCE, request: Request) -> int:
        return int(torch.linalg.matrix_rank(change(method, request), rtol=1e-10))

    assert rank(replace(OWN, templates=("{}",)), ask("cat")) == 1
    assert rank(OWN, ask("cat")) == 2
    assert rank(OWN, ask("cat", "bird")) == 4
    assert rank(replace(OWN, padding_weight=1.0), ask("cat")) == 4


def test_without_ridge_or_holding_the_closing_token_lands_on_its_anchor_s_alone() -> None:
    old, free = TOY.weight(CROSS), replace(OWN, prior_weight=0.0, retain_weight=0.0)
    key, goal, word = row("cat", 2), row("dog", 2), row("cat", 1)

    def miss(method: TRCE) -> float:
        new = old + change(method, ask("cat"))
        return float((new @ key - old @ goal).norm() / (old @ (key - goal)).norm())

    assert miss(replace(free, ridge=1e-9)) < 1e-7
    assert miss(replace(free, ridge=100.0)) > 0.5
    new = old + change(replace(free, ridge=1e-9), ask("cat"))
    assert (new @ word - old @ row("dog", 1)).norm() > 0.1  # the keyword itself is not sent


def test_words_and_padding_go_where_they_are_sent() -> None:
    old, bare = TOY.weight(CROSS), replace(OWN, templates=("{}",), ridge=1e-9, prior_weight=0.0, retain_weight=0.0)
    end = row("dog", TOY.window - 1)
    for name, at in (("word_weight", 1), ("padding_weight", TOY.window - 1)):
        new = old + change(replace(bare, closing_weight=0.0, **{name: 1.0}), ask("cat"))
        assert (new @ row("cat", at) - old @ end).norm() < 1e-6
        assert (new @ row("cat", 2) - old @ row("dog", 2)).norm() > 0.1
    # without an anchor the sentence goes on without the target: "red {}" becomes "red"
    new = old + change(replace(bare, templates=("red {}",)), ask("cat", to=None))
    assert (new @ row("red cat", 3) - old @ row("red", 2)).norm() < 1e-6


def test_what_is_held_moves_less_the_heavier_it_is() -> None:
    for name, text in (("prior_weight", ""), ("retain_weight", "red car")):
        rows = TOY.encode([text]).tokens[0]
        found = [
            float((rows @ change(replace(OWN, **{name: w}), ask("cat", keep=["car"])).T).norm()) for w in (0, 1, 1e8)
        ]
        assert found[0] > 1e-2 and found == sorted(found, reverse=True) and found[-1] < 1e-5, name


def test_the_code_s_scale_enters_twice() -> None:
    request = ask("cat", keep=["car"])
    twice = change(replace(OWN, prior_weight=0.1, retain_weight=0.3, preservation="twice"), request)
    torch.testing.assert_close(twice, change(replace(OWN, prior_weight=0.01, retain_weight=0.03), request))
    assert (twice - change(replace(OWN, prior_weight=0.1, retain_weight=0.3), request)).norm() > 1e-3


def test_the_average_forgets_repeated_pairs_and_their_order() -> None:
    one, two = ask("cat", "bird"), ask("bird", "cat")
    torch.testing.assert_close(change(OWN, one), change(OWN, two), rtol=1e-9, atol=1e-12)
    doubled = replace(OWN, templates=FORMS * 2)
    torch.testing.assert_close(change(replace(doubled, retain_weight=0.01), one), change(OWN, one))
    assert (change(OWN, one) - change(OWN, ask("cat"))).norm() > 1e-2


@pytest.mark.parametrize("name", ["tiny-unet", "tiny-sdxl"])
def test_the_closing_token_is_found_where_words_take_several_tokens(name: str) -> None:
    """By the tokenizer's own count; the code's count of words finds a row inside the word."""
    model: Any = load(name)
    free = TRCE(templates=("{}",), ridge=1e-6, prior_weight=0.0, retain_weight=0.0)
    size = len(model.pipeline.tokenizer("xylophone").input_ids) - 2
    assert size > 1
    old, new = model.encode(["xylophone"]).tokens[0], model.encode(["dog"]).tokens[0]
    for closing, at in (("token", size + 1), ("words", 2)):
        found = deltas(replace(free, closing=closing).erase(model, Request.of("xylophone", anchor="dog"), Run()), model)
        for site in model.sites("text_in"):
            weight = site.weight + found[site.path]
            gap = (site.weight @ (old[at] - new[2])).norm()
            assert (weight @ old[at] - site.weight @ new[2]).norm() < 1e-3 * gap
            other = {size + 1, 2} - {at}
            assert all((weight @ old[i] - site.weight @ new[2]).norm() > 1e-2 * gap for i in other)


def test_many_captions_are_held_by_their_moment_and_all_layers_share_one_edit() -> None:
    model = load("tiny-unet")
    texts = tuple(f"a {word} picture" for word in ("cat", "guitar", "blue car", "dog", "banana"))
    method = TRCE(prior=texts, prior_weight=0.1, retain_weight=0.0, ridge=0.5)
    patch = method.erase(model, Request.of("strawberry", anchor="cat"), Run())
    found = deltas(patch, model)
    sites = {site.path: site.weight.double() for site in model.sites("text_in")}
    assert found.keys() == sites.keys()
    stacked = torch.cat(list(sites.values()))
    shared = torch.linalg.lstsq(stacked, torch.cat([found[path].double() for path in sites])).solution
    for path, weight in sites.items():
        torch.testing.assert_close(weight @ shared, found[path].double(), rtol=1e-4, atol=1e-6)
    other = deltas(replace(method, prior=texts[:1]).erase(model, Request.of("strawberry", anchor="cat"), Run()), model)
    assert any((other[path] - found[path]).norm() > 1e-3 for path in sites)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"closing_weight": -1.0}, "closing_weight is -1.0; legal: 0 or more"),
        ({"ridge": -1.0}, "ridge is -1.0; legal: 0 or more"),
        ({"prior_weight": float("nan")}, "prior_weight is nan; legal: 0 or more"),
        ({"templates": ("a photo",)}, "template is 'a photo'; legal"),
        ({"templates": ()}, r"templates is \(\); legal"),
        ({"templates": ("a b c d e f g h i j k l m n o p q r s t u v w {}",)}, "prompt 'a b c .* reads at most"),
    ],
)
def test_bad_settings_are_one_line(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        TRCE(**wrong).erase(load("tiny-unet"), Request.of("strawberry", anchor="cat"), Run())
    assert "\n" not in str(caught.value)


def test_other_families_are_refused_and_missing_directions_are_said() -> None:
    with pytest.raises(InputError, match="'tiny-flux' is 'mmdit', legal: unet"):
        TRCE().erase(load("tiny-flux"), Request.of("strawberry"), Run())
    bare = replace(OWN, ridge=0.0, prior_weight=0.0, retain_weight=0.0, templates=("{}",))
    with pytest.raises(InputError, match=r"cannot erase 'cat': .*singular: without ridge .* span 1 of 8 directions"):
        change(bare, ask("cat"))
    assert OWN.retains and not replace(OWN, retain_weight=0.0).retains
