"""ESD and All but One in sentences: a template says the same as a concept that is phrased so."""

import pytest
import torch

from expunge.core.concept import Concept, Request
from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.registry import find
from expunge.models.load import load
from expunge.ops.wording import framed

BRIEF = {"pool": 8, "walk": 3, "batch": 2, "steps": 3, "lr": 1e-3}
FORMS = ("a picture of a {}", "a {} on a plain background")
BOTH = pytest.mark.parametrize("name", ["esd", "all_but_one"])
EVERYWHERE = pytest.mark.parametrize("model", ["tiny-unet", "tiny-flux", "tiny-flux-distilled"])


def phrased(name: str, *forms: str) -> Concept:
    return Concept(name=name, prompts=tuple(form.format(name) for form in forms))


def asked(*forms: str) -> Request:
    return Request(
        target=(phrased("cat", *forms),), anchor=(phrased("dog", *forms),), retain=(phrased("guitar", *forms),)
    )


def learned(name: str, model: str, request: Request, **options: object) -> dict[str, torch.Tensor]:
    return dict(find("methods", name)(**BRIEF, **options).erase(load(model), request, Run()).tensors())


@BOTH
@EVERYWHERE
def test_a_template_is_the_phrase_it_makes(name: str, model: str) -> None:
    framed_by_us = learned(name, model, asked("{}"), templates=FORMS[:1])
    phrased_so = learned(name, model, asked(FORMS[0]))
    assert framed_by_us.keys() == phrased_so.keys() and framed_by_us
    assert all(torch.equal(framed_by_us[path], phrased_so[path]) for path in framed_by_us)
    bare = learned(name, model, asked("{}"))
    assert any(not torch.equal(framed_by_us[path], bare[path]) for path in bare)


@EVERYWHERE
def test_every_template_is_trained_in(model: str) -> None:
    both, phrased_so = (
        learned("esd", model, asked("{}"), templates=FORMS),
        learned("esd", model, asked(*FORMS)),
    )
    assert all(torch.equal(both[path], phrased_so[path]) for path in both)


def test_what_is_erased_out_of_a_phrase_stands_in_the_same_sentence() -> None:
    framed_by_us = learned("esd", "tiny-unet", asked("{}"), templates=FORMS[:1], erase_from="room")
    phrased_so = learned("esd", "tiny-unet", asked(FORMS[0]), erase_from=FORMS[0].format("room"))
    assert all(torch.equal(framed_by_us[path], phrased_so[path]) for path in phrased_so)


def test_rows_keep_their_sentence_and_nothing_stays_nothing() -> None:
    rows = [("cat", "dog", ""), ("tom", "dog", "")]
    assert framed(("{}", "a {} here"), rows) == [
        *rows,
        ("a cat here", "a dog here", ""),
        ("a tom here", "a dog here", ""),
    ]


@BOTH
@pytest.mark.parametrize(
    "templates, said", [((), r"templates is \(\)"), (("a cat",), "'a cat'"), (("{} {}",), "'{} {}'")]
)
def test_no_template_and_one_without_a_place_are_refused(name: str, templates: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        learned(name, "tiny-unet", asked("{}"), templates=templates)
