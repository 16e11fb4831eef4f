"""A word inside a prompt: the sentence around it, and the positions it takes in the text window."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from expunge.core.condition import Condition
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.ops.rows import at_scales


@dataclass(frozen=True)
class Wording:
    """A phrase with the words before and after it."""

    before: str
    phrase: str
    after: str

    @property
    def text(self) -> str:
        """The whole prompt."""
        return _joined(self.before, self.phrase, self.after)

    def about(self, phrase: str) -> "Wording":
        """Give the same sentence about something else."""
        return replace(self, phrase=phrase)


def wordings(template: str, phrases: Sequence[str], share: float, rng: torch.Generator) -> list[Wording]:
    """Put every phrase into a template with one {}; a share of the sentences has its words shuffled.

    The phrase moves as one word. Raises InputError for a template without exactly one {}.
    """
    if template.count("{}") != 1:
        raise InputError(f"template is {template!r}; legal: one {{}} where the phrase goes, as in 'a photo of {{}}'")
    words = template.replace("{}", " {} ").split()
    found = []
    for phrase in phrases:
        shuffled = float(torch.rand((), generator=rng)) < share
        order = torch.randperm(len(words), generator=rng).tolist() if shuffled else range(len(words))
        line = [words[index] for index in order]
        at = line.index("{}")
        found.append(Wording(" ".join(line[:at]), phrase, " ".join(line[at + 1 :])))
    return found


def sentences(templates: Sequence[str], phrases: Sequence[str]) -> list[Wording]:
    """Put every phrase into every template, template by template; raises InputError without any template."""
    if not templates:
        raise InputError("templates is (); legal: one sentence or more with one {}, such as 'a photo of {}'")
    return [line for form in templates for line in wordings(form, phrases, 0.0, torch.Generator())]


def framed(templates: Sequence[str], rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Put the phrases of every row into every template, template by template; "" says nothing in any of them.

    Raises InputError without any template, and for a template without exactly one {}.
    """
    forms = sentences(templates, [""])
    return [tuple(form.about(phrase).text if phrase else "" for phrase in row) for form in forms for row in rows]


@dataclass(frozen=True)
class Shown:
    """Encoded prompts with the positions of what each is about."""

    cond: Condition
    columns: Bool[Tensor, "b l"]

    @classmethod
    def of(cls, model: Generator, found: Sequence[Wording], scales: Sequence[float]) -> "Shown":
        """Encode wordings, for a guidance-distilled model once at every scale, scale by scale."""
        cond = at_scales(model.encode([wording.text for wording in found]), scales)
        return cls(cond, columns(model, found).repeat(len(cond) // len(found), 1))

    def take(self, index: Int[Tensor, "n"]) -> "Shown":
        """Pick prompts by position; repeats are allowed."""
        return Shown(self.cond.take(index), self.columns[index])


def columns(model: Generator, found: Sequence[Wording]) -> Bool[Tensor, "b l"]:
    """Positions of the text window that hold each wording's phrase, in every encoder's band.

    Counted from prompts cut before and after the phrase, so no tokenizer is asked: right wherever words that stand
    apart are tokenized apart. Raises InputError if the window ends before the phrase begins.
    """
    empty = model.encode([""])
    start = model.encode([wording.before for wording in found])
    end = model.encode([_joined(wording.before, wording.phrase) for wording in found])
    marked = torch.zeros_like(end.mask)
    place = torch.arange(marked.shape[1], device=marked.device)
    for first, last in end.bands or ((0, marked.shape[1]),):
        marks = _counted(empty, first, last)  # the opening tokens, and the closing one
        low, high = (first - 1 + _counted(cond, first, last)[:, None] for cond in (start, end))
        inside = (place >= low) & (place < high) & (place < last) & (marks > 0)
        marked |= inside
    for row, wording in zip(marked, found, strict=True):
        if not bool(row.any()):
            raise InputError(f"prompt {wording.text!r} does not show {wording.phrase!r} to {model.name!r}")
    return marked


def _counted(cond: Condition, first: int, last: int) -> Int[Tensor, "b"]:
    return cond.mask[:, first:last].sum(1)


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)
