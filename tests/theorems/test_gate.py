"""What the prompt gate promises, and what would break the promise."""

import hashlib
import json
import re
from dataclasses import replace
from functools import lru_cache
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from expunge.core.concept import Concept, Request
from expunge.core.condition import Condition
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator, Hook
from expunge.leakage.information import contamination, shannon
from expunge.methods.guard.gate import PromptGate
from expunge.models.load import load
from expunge.ops.gating import FUNCTION, PASSES, Gate, misspelt, parts, spans, summary
from expunge.ops.reword import Reworded
from expunge.patches.guard import PassGuard

WIDTH = 6
WORDS = ("red", "cat", "kitten", "dog", "a", "of", "on", "blue", "ghrt", "ice", "cream")
ASKED = Request(
    target=(Concept(name="red cat", prompts=("red cat", "ginger kitten")),),
    anchor=(Concept.of("dog"),),
    retain=(Concept.of("guitar"),),
)
SENTENCES = ("a picture of a {}", "{}, on a table", "GUITAR and {} in ink")
TOYS = ("tiny-unet", "tiny-sdxl", "tiny-sd3", "tiny-flux")


@lru_cache
def read(text: str) -> torch.Tensor:
    """A toy encoder: the sum of random directions of the words."""
    return torch.stack([_direction(word) for word in text.split() or [""]]).sum(0)


@lru_cache
def _direction(word: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@lru_cache
def toy(*, floor: float = 0.3, phrases: tuple[str, ...] = ("red cat", "kitten"), typos: bool = False) -> Gate:
    """A gate that fires on much by chance, since its floor is low."""
    known = parts(["dog", "blue", "guitar"], 2)
    rows = torch.stack([read(text) for text in (*known, *phrases)])
    return Gate.of(dict.fromkeys(phrases, "dog"), known, rows, floor=floor, slack=0.1, longest=2, typos=typos)


sentence = st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(" ".join)


@given(sentence)
@settings(max_examples=40)
def test_twins_are_their_own_twins_and_the_gate_is_silent_on_them(text: str) -> None:
    gate = toy()
    twin = gate.twin(text, read)
    assert gate.twin(twin, read) == twin
    assert gate.loudest(twin, read) is None and not gate.names(twin)


@given(sentence, sentence, st.sampled_from(["red cat", "Red  Cat", "kitten", "red-cat"]))
@settings(max_examples=40)
def test_a_prompt_with_a_phrase_is_drawn_as_the_same_sentence_about_the_anchor(one: str, two: str, phrase: str) -> None:
    """Whatever the encoder says, false alarms on the twin included: no miss is possible, m = 0 for these prompts."""
    gate, form = toy(), gate_free(one) + " {} " + gate_free(two)
    assert gate.twin(form.format(phrase), read) == gate.twin(form.format("dog"), read)


def gate_free(text: str) -> str:
    return " ".join(word for word in text.split() if word not in {"red", "cat", "kitten"})


LETTERS = "abkxé-"


@given(st.sampled_from(["kitten", "red cat"]), st.integers(0, 6), st.sampled_from(LETTERS), sentence, sentence)
@settings(max_examples=60)
def test_one_slip_of_the_pen_is_the_phrase_and_two_are_not(
    phrase: str, at: int, letter: str, one: str, two: str
) -> None:
    gate, blind = toy(floor=1.0, typos=True), toy(floor=1.0)
    head, tail = phrase[: at % len(phrase)], phrase[at % len(phrase) :]
    for slip in {
        head + tail[1:],
        head + letter + tail,
        head + letter + tail[1:],
        head + tail[1:2] + tail[:1] + tail[2:],
    }:
        assert misspelt(slip, phrase) == (slip != phrase)
        assert not misspelt("zz" + slip, phrase) and not misspelt(slip, "cat")
        if re.fullmatch(r"\w+( \w+)?", slip) and slip != phrase and not FUNCTION & set(slip.split()):
            form = f"{gate_free(one)} , {{}} , {gate_free(two)}"
            assert gate.twin(form.format(slip), read) == gate.twin(form.format("dog"), read)
            assert blind.twin(slip, read) == slip  # the side that must fail


def test_known_words_are_no_slips() -> None:
    facing, known = {"house": "tent"}, ("mouse", "tent")
    rows = torch.stack([read(text) for text in (*known, *facing)])
    gate = Gate.of(facing, known, rows, floor=1.0, slack=0.1, longest=1, typos=True)
    assert gate.twin("a mouse", read) == "a mouse"
    assert gate.twin("a hause, houses", read) == "a tent, tent"


@given(sentence, sentence)
@settings(max_examples=30)
def test_nothing_around_a_span_hides_it(before: str, after: str) -> None:
    gate = toy(floor=0.5)
    for span in ("red", "ghrt", "cream"):
        if gate.evidence(span, read)[0] > 0:
            assert gate.twin(f"{before} {span} {after}", read) != f"{before} {span} {after}"


def test_a_gate_that_reads_whole_sentences_is_talked_out_of_it() -> None:
    """The side that must fail: the same prototypes on the sum of a sentence miss a phrase among other words."""
    gate = toy(floor=0.8, phrases=("kitten",))
    assert gate.evidence("kitten", read)[0] > 0
    ends = [" ".join(["kitten", *[word] * 6]) for word in ("ghrt", "cream", "ice", "stone")]
    assert all(gate.evidence(text, read)[0] <= 0 for text in ends)
    assert all(gate.twin(text, read).startswith("dog ") for text in ends)


def test_a_gate_that_exchanges_once_has_twins_that_are_not_their_own() -> None:
    """The side that must fail: "a b" for "b" makes the phrase anew; the gate goes on, and ends at the anchor alone."""
    gate = replace(toy(floor=1.0, phrases=("x y",)), anchors=("y",))
    assert gate.names(gate.exchanged("x x y"))
    assert gate.twin("x x y", read) == "y" and PASSES > 1


@pytest.mark.parametrize("text, found", [("a cat of ice", {"cat", "ice"}), ("cat, ice", {"cat", "ice"}), ("of", set())])
def test_spans_stop_at_small_words_and_punctuation(text: str, found: set[str]) -> None:
    assert {text[a:b] for a, b in spans(text, 2)} == found
    assert "cat of ice" in parts(["a cat of ice"], 3) and "of" in FUNCTION


def test_the_structural_bound_is_m_and_the_smaller_one_is_false() -> None:
    """All prompts of a small world through a gate; an observer who reads the drawn sentence itself, so I is exact.

    Missed wordings and caught ones come in sentences of their own: the information is m, above h2(m/2) - h2(m)/2.
    """
    gate = toy(floor=1.0, phrases=("cat",))  # knows one wording, and no encoder helps
    forms = {"cat": ("a {} on ice", "blue {}", "a {}"), "tomcat": ("{} of stone",)}
    pairs = [(form.format(word), form.format("dog")) for word, mine in forms.items() for form in mine]
    m = sum(gate.twin(p, read) != gate.twin(a, read) for p, a in pairs) / len(pairs)
    seen = sorted({gate.twin(text, read) for pair in pairs for text in pair})
    laws = [[sum(gate.twin(pair[arm], read) == s for pair in pairs) / len(pairs) for s in seen] for arm in (0, 1)]
    information = shannon(np.array(laws[0]), np.array(laws[1]))
    assert m == 0.25 and information == pytest.approx(m)
    assert information > 1.2 * contamination(m)


@given(st.lists(st.sampled_from(["cat", "tomcat", "moggy"]), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=30)
def test_no_world_of_prompts_leaks_more_than_is_missed(words: list[str], seed: int) -> None:
    gate = toy(floor=1.0, phrases=("cat",))
    dice = np.random.default_rng(seed)
    forms = [("{}", "a {} on ice", "blue {}")[dice.integers(3)] for _ in words]
    pairs = [(form.format(word), form.format("dog")) for word, form in zip(words, forms, strict=True)]
    weights = dice.dirichlet(np.ones(len(pairs)))
    drawn = [[gate.twin(text, read) for text in pair] for pair in pairs]
    m = sum(w for w, (ours, theirs) in zip(weights, drawn, strict=True) if ours != theirs)
    seen = sorted({text for pair in drawn for text in pair})
    laws = [np.array([sum(w for w, d in zip(weights, drawn, strict=True) if d[k] == s) for s in seen]) for k in (0, 1)]
    assert shannon(laws[0] / laws[0].sum(), laws[1] / laws[1].sum()) <= m + 1e-9


@pytest.fixture(scope="module", params=TOYS)
def pair(request: pytest.FixtureRequest) -> tuple[Generator, Generator]:
    base = load(request.param)
    method = PromptGate(others=("chair", "tree"))
    return base, method.erase(base, ASKED, Run()).on(base)


def draw(model: Generator, prompt: str, negative: str | None = None) -> torch.Tensor:
    said = None if negative is None else [negative]
    return model.generate([prompt], seeds=[5], guidance_scale=3.0, steps=2, negative=said)


def test_caught_prompts_equal_their_twins_bit_for_bit_on_every_route(pair: tuple[Generator, Generator]) -> None:
    base, erased = pair
    assert isinstance(erased, Generator)
    for form, phrase in product(SENTENCES, ("red cat", "Ginger Kitten")):
        ours, twin, plain = (
            model.encode([form.format(word)]) for model, word in ((erased, phrase), (erased, "dog"), (base, "dog"))
        )
        for name in ("tokens", "mask", "last", "pooled"):
            here, there, before = (getattr(cond, name) for cond in (ours, twin, plain))
            assert (here is None) == (there is None)
            assert here is None or (torch.equal(here, there) and torch.equal(here, before))
    picture = draw(erased, "a picture of a red cat")
    assert torch.equal(picture, draw(erased, "a picture of a dog"))
    assert torch.equal(picture, draw(base, "a picture of a dog"))
    assert not torch.equal(picture, draw(base, "a picture of a red cat"))


def test_prompts_it_is_silent_on_and_negative_ones_are_drawn_as_they_should_be(
    pair: tuple[Generator, Generator],
) -> None:
    base, erased = pair
    assert torch.equal(draw(erased, "a guitar"), draw(base, "a guitar"))
    assert torch.equal(draw(erased, "a guitar", "red cat"), draw(base, "a guitar", "dog"))


class Halfway(PassGuard):
    """The side that must fail: only the token rows are substituted, and only a share of the way."""

    def __init__(self, goal: Condition, share: float) -> None:
        self.goal, self.share = goal, share

    def condition(self, cond: Condition) -> Condition:
        goal = self.goal.tokens
        return replace(cond, tokens=goal if self.share == 1 else torch.lerp(cond.tokens, goal, self.share))


@pytest.mark.parametrize("name, share", [("tiny-unet", 0.9), ("tiny-sdxl", 1), ("tiny-sd3", 1), ("tiny-flux", 1)])
def test_a_share_of_the_way_or_one_route_left_out_does_not_qualify(name: str, share: float) -> None:
    base = load(name)
    soft = base.view(guards=[Halfway(base.encode(["a dog"]), share)])
    plain = base.view(guards=[PassGuard()])
    assert not torch.equal(draw(soft, "a red cat"), draw(plain, "a dog"))


def test_it_survives_storage_and_stays_in_front_of_views() -> None:
    base = load("tiny-unet")
    patch = PromptGate(others=("chair",)).erase(base, ASKED, Run())
    again = PromptGate.restore(load_tensors(save_tensors(patch.tensors())), json.loads(json.dumps(patch.meta())))
    seen: list[int] = []
    hook = Hook("text_encoder", lambda module, inputs, output: seen.append(1))
    viewed = again.on(base).view(guards=[PassGuard()], hooks=[hook])
    assert isinstance(viewed, Reworded) and viewed.twin("a red cat") == "a dog"
    assert torch.equal(viewed.encode(["a red cat"]).tokens, base.encode(["a dog"]).tokens) and seen
    assert torch.equal(summary(base.encode(["dog"]))[0], viewed._summary("dog"))


def test_the_decision_depends_on_the_prompt_alone() -> None:
    base = load("tiny-unet")
    erased = PromptGate(floor=0.0, others=("chair",)).erase(base, ASKED, Run()).on(base)
    assert isinstance(erased, Reworded)
    texts = [f"a {word} thing of {other}" for word, other in product(("kitten", "ghrt"), ("ice", "stone"))]
    alone = [PromptGate(floor=0.0, others=("chair",)).erase(base, ASKED, Run()).on(base).twin(t) for t in texts]
    together = erased.encode(texts)
    assert [erased.twin(text) for text in reversed(texts)] == alone[::-1]
    assert torch.equal(together.tokens, base.encode(alone).tokens)


def test_what_it_cannot_keep_is_refused_in_one_line() -> None:
    base = load("tiny-unet")
    for words, match in (
        ({"anchor": "a red cat"}, "anchor 'a red cat' holds"),
        ({"retain": ("red cat toy",)}, "retained prompt 'red cat toy' holds"),
    ):
        with pytest.raises(InputError, match=match) as caught:
            PromptGate(others=("chair",)).erase(base, Request.of("red cat", **words), Run())
        assert "\n" not in str(caught.value)
    for bad in ({"others": ()}, {"span": 0}, {"slack": -1.0}):
        with pytest.raises(InputError, match="legal"):
            PromptGate(**bad).erase(base, Request.of("red cat"), Run())
