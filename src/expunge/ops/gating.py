"""A gate over prompts: which words of a text ask for a concept, and the twin sentence that asks for its anchor.

A decision reads the text and the frozen text encoder's summary of short spans of it, each span encoded on its own. So
nothing around a span can hide it, and neither batch, seed nor latent takes part. Source: certificates.md, section 6.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.condition import Condition

Reader = Callable[[str], Float[Tensor, "d"]]
"""Gives the summary of one text; a pure function of it."""

_SMALL = "a an the of on in at to by for from with and or is are as it its this that"
FUNCTION = frozenset(_SMALL.split())
"""Words that carry no concept: no span begins or ends with one."""

_PLAIN = (
    "dog horse cow sheep elephant mouse bird fish snake spider bee butterfly tree flower grass leaf mountain river sea "
    "beach sky cloud sun moon star rain snow fire water stone bridge road house castle church tower door window room "
    "kitchen table chair bed lamp clock book pen paper letter map key box bag bottle cup plate spoon knife bowl bread "
    "cheese egg meat cake coffee tea milk rice soup apple orange grape carrot potato onion tomato corn shirt shoe hat "
    "coat glove ring crown coin wheel car bicycle train boat ship airplane rocket tent flag bell drum guitar piano "
    "violin trumpet camera phone television computer robot doctor teacher farmer soldier king queen child baby man "
    "woman girl boy hand eye face heart sword gun hammer saw rope ladder ball kite doll balloon candle mirror umbrella "
    "scissors basket picture photo drawing painting sketch background style colour red green blue yellow black white "
    "small large old new bright dark city street garden park"
)
THINGS = tuple(_PLAIN.split())
"""Ordinary words, ours: what a span may mean instead of the target."""

LONG = 5
"""Letters from which on a word one edit away is taken for a slip of the pen: shorter words have too many neighbours."""

PASSES = 4
"""Rewritings of one prompt before the anchor alone takes its place."""


def summary(cond: Condition) -> Float[Tensor, "b d"]:
    """What the text encoder sums each prompt up in: its pooled text, or the closing token's row where there is none.

    In float64. Stable Diffusion 1 and 2: the closing row; SDXL, SD3, FLUX: CLIP's pooled vectors.
    """
    if cond.pooled is not None:
        return cond.pooled.double()
    closing = (cond.last + 1).clamp(max=cond.tokens.shape[1] - 1)
    return cond.tokens[torch.arange(len(cond), device=cond.tokens.device), closing].double()


def spans(text: str, longest: int) -> Iterator[tuple[int, int]]:
    """Give the places [first, end) of all runs of 1 to `longest` words that no punctuation divides.

    No span begins or ends with a word of `FUNCTION`.
    """
    words = [(found.start(), found.end()) for found in re.finditer(r"\w+(?:['’-]\w+)*", text)]
    for first, (start, _) in enumerate(words):
        for last, (begin, end) in enumerate(words[first : first + longest], first):
            if last > first and not text[words[last - 1][1] : begin].isspace():
                break
            if not {text[slice(*words[first])].casefold(), text[begin:end].casefold()} & FUNCTION:
                yield start, end


def misspelt(span: str, phrase: str) -> bool:
    """Whether a span is a phrase of LONG letters or more with one letter dropped, added, changed, or two exchanged.

    After the longest common start and end, what remains of both is at most one letter, or two letters in either order.
    """
    if len(phrase) < LONG or span == phrase:
        return False
    start = _alike(span, phrase)
    mine, theirs = span[start:], phrase[start:]
    end = _alike(mine[::-1], theirs[::-1])
    mine, theirs = mine[: len(mine) - end], theirs[: len(theirs) - end]
    return max(len(mine), len(theirs)) == 1 or (len(mine) == 2 and mine == theirs[::-1])


def _alike(one: str, two: str) -> int:
    """Count the letters at the start that two texts share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


def parts(texts: Sequence[str], longest: int) -> list[str]:
    """List every span of some texts once, in order, case folded."""
    return list(dict.fromkeys(text[a:b].casefold() for text in texts for a, b in spans(text, longest)))


@dataclass(frozen=True)
class Gate:
    """Fires on a phrase of a target, and on a span that the text encoder takes for one; gives the twin sentence.

    With `typos`, a span that is not known and is a phrase but for a slip of the pen is taken for that phrase.
    A span fires if cos(x, target) > floor and cos(x, target) > max over others cos(x, other) - slack, x its summary
    seen from the centre: nearest prototype, with a lean towards catching.
    """

    phrases: tuple[str, ...]
    anchors: tuple[str, ...]
    """What each phrase is exchanged for."""
    known: frozenset[str]
    """Spans that never fire: those of anchors, retained concepts and ordinary words."""
    targets: Float[Tensor, "k d"]
    """Unit summaries of the phrases as seen from the centre."""
    others: Float[Tensor, "n d"]
    """The same of the known spans."""
    centre: Float[Tensor, "d"]
    floor: float
    slack: float
    longest: int
    typos: bool

    @classmethod
    def of(
        cls,
        facing: Mapping[str, str],
        known: Sequence[str],
        rows: Float[Tensor, "m d"],
        *,
        floor: float,
        slack: float,
        longest: int,
        typos: bool,
    ) -> "Gate":
        """Learn prototypes from the summaries of every known span and then of every phrase, m of them in all."""
        centre = rows[: len(known)].mean(0)
        unit = torch.nn.functional.normalize(rows - centre, dim=1)
        others, targets = unit[: len(known)], unit[len(known) :]
        words = (tuple(facing), tuple(facing.values()), frozenset(known))
        return cls(*words, targets, others, centre, floor, slack, longest, typos)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(range(len(self.phrases)), key=lambda i: -len(self.phrases[i]))
        forms = (f"(?P<p{index}>{_form(self.phrases[index])})" for index in longest_first)
        return re.compile(rf"(?<!\w)(?:{'|'.join(forms)})(?!\w)", re.IGNORECASE)

    def names(self, text: str) -> bool:
        """Whether a text holds a phrase of a target as words, in any case."""
        return self._pattern.search(text) is not None

    def exchanged(self, text: str) -> str:
        """Put the anchor for every phrase of a target; all else stays as it is, letter for letter."""
        return self._pattern.sub(lambda found: self.anchors[int(str(found.lastgroup)[1:])], text)

    def evidence(self, span: str, read: Reader) -> tuple[float, int]:
        """How far a span lies on the firing side, above 0 firing, and which phrase it is nearest to."""
        if span in self.known:
            return -1.0, 0
        slips = (index for index, phrase in enumerate(self.phrases) if self.typos and misspelt(span, phrase))
        if (slip := next(slips, None)) is not None:
            return 1.0, slip
        x = torch.nn.functional.normalize(read(span).to(self.centre) - self.centre, dim=0)
        near = self.targets @ x
        ours, theirs = float(near.max()), float((self.others @ x).max())
        return min(ours - self.floor, ours - theirs + self.slack), int(near.argmax())

    def loudest(self, text: str, read: Reader) -> tuple[int, int, str] | None:
        """Give the span that fires most with the anchor it is to become; None where none fires."""
        found = [(*self.evidence(text[a:b].casefold(), read), a, b) for a, b in spans(text, self.longest)]
        most = max(found, key=lambda each: each[0], default=None)
        if most is None or most[0] <= 0:
            return None
        return most[2], most[3], self.anchors[most[1]]

    def twin(self, text: str, read: Reader) -> str:
        """Give the sentence that stands for a text: itself if the gate is silent on it.

        Phrases are exchanged, then the loudest span, until the gate is silent; after PASSES the first anchor alone.
        The gate is silent on what is given, so twin(twin(p)) = twin(p); and twin(p) = twin(exchanged(p)).
        """
        for _ in range(PASSES):
            text = self.exchanged(text)
            loud = self.loudest(text, read)
            if loud is None and not self.names(text):
                return text
            if loud is not None:
                text = text[: loud[0]] + loud[2] + text[loud[1] :]
        return self.anchors[0]


def _form(phrase: str) -> str:
    """Pattern of a phrase whose words any spaces or hyphens may part."""
    return r"[\s-]+".join(re.escape(word) for word in re.split(r"[\s-]+", phrase) if word)
