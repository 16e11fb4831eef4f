import subprocess
import sys

import pytest

from expunge.core.concept import Concept, Request
from expunge.core.errors import InputError

CAT, DOG = Concept.of("cat"), Concept.of("dog")


def test_a_concept_from_a_word_is_an_object_with_that_phrase():
    assert Concept(name="cat", kind="object", prompts=("cat",)) == CAT
    assert CAT.phrase == "cat"


@pytest.mark.parametrize(
    ("name", "kind", "prompts"),
    [(" ", "object", ("x",)), ("x", "object", ()), ("x", "object", ("x", "  "))],
)
def test_malformed_concepts_are_refused(name, kind, prompts):
    with pytest.raises(InputError, match="concept"):
        Concept(name=name, kind=kind, prompts=prompts)


def test_unknown_kinds_are_answered_with_the_legal_ones():
    """In a process of its own: here the type checker would speak before the library does."""
    code = "import expunge; expunge.Concept(name='x', kind='animal', prompts=('x',))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.splitlines()[-1]
    assert "InputError: unknown concept kind 'animal'; legal: abstract, explicit, identity" in said


def test_request_refuses_no_target():
    with pytest.raises(InputError, match="at least one target"):
        Request(target=(), anchor=())


def test_request_refuses_other_numbers_of_anchors_than_targets():
    with pytest.raises(InputError, match="1 targets but 2 anchors"):
        Request(target=(CAT,), anchor=(None, DOG))


@pytest.mark.parametrize("anchor", ["cat", "Cat", "  CAT "])
def test_request_refuses_an_anchor_that_is_the_target(anchor):
    with pytest.raises(InputError, match=r"anchor .* is also a target"):
        Request.of("cat", anchor=anchor)


def test_request_refuses_an_anchor_that_another_target_erases():
    with pytest.raises(InputError, match="also a target"):
        Request(target=(CAT, DOG), anchor=(DOG, None))


def test_request_refuses_to_retain_a_target():
    with pytest.raises(InputError, match="retained concept 'cat' is also a target"):
        Request.of("cat", retain=["dog", "cat"])


def test_pairs_meet_by_position_when_equally_many_else_the_canonical_phrase():
    cat = Concept(name="cat", prompts=("cat", "kitty"))
    dog = Concept(name="dog", prompts=("dog", "hound"))
    car = Concept(name="car", prompts=("car", "sedan", "coupe"))
    assert list(Request(target=(cat,), anchor=(dog,)).pairs) == [("cat", "dog"), ("kitty", "hound")]
    assert list(Request(target=(cat,), anchor=(car,)).pairs) == [("cat", "car"), ("kitty", "car")]
    assert list(Request(target=(cat,), anchor=(None,)).pairs) == [("cat", ""), ("kitty", "")]


def test_request_refuses_to_name_a_concept_twice():
    with pytest.raises(InputError, match=r"target 'Cat' is named twice"):
        Request(target=(CAT, Concept.of("Cat")), anchor=(None, None))
    with pytest.raises(InputError, match=r"retained concept 'dog ' is named twice"):
        Request.of("cat", retain=["dog", "car", "dog "])
    assert len(Request.of("cat", anchor="dog", retain=["dog", "car"]).retain) == 2


def test_a_prompt_belongs_to_one_concept():
    kitty = Concept(name="kitty", prompts=("kitten", " CAT"))
    with pytest.raises(InputError, match="target 'kitty' and target 'cat' share the prompt ' CAT'"):
        Request(target=(CAT, kitty), anchor=(None, None))
    with pytest.raises(InputError, match="target 'cat' and retained concept 'kitty' share the prompt 'cat'"):
        Request(target=(CAT,), anchor=(None,), retain=(kitty,))
    assert Request(target=(kitty,), anchor=(None,), retain=(DOG,)).target == (kitty,)
