"""What keeps the words of a caption apart in the text tower: two terms beside the contrastive loss of training.clip.

A tower that meets every style × concept pair with its picture can learn pairs by heart; a pair it never met then lies
next to some other thing. Both terms ask of captions alone, and never of a held-out pair, that it lets words compose.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

from training import world

PLACES = 4  # end of the name, of the style, of the background; end of the caption
FORMS = tuple(f for f in world.TEMPLATES if "{c}" in f and "{s}" in f and "{b}" in f)


@dataclass(frozen=True)
class Quads:
    """Two things in two styles each: "4 n" captions as s c, s' c, s c', s' c', with all of them seen in training."""

    ids: Tensor  # "4 n l"
    places: Tensor  # "4 n PLACES" positions in ids
    things: Tensor  # "4 n"


class Speaker:
    """Writes captions of seen pairs and knows at which tokens their words end."""

    def __init__(self, data: world.World, tokenizer: PreTrainedTokenizerBase) -> None:
        """Note which styles every concept was seen in."""
        self.data, self.tokenizer = data, tokenizer
        seen = set(zip(data.concept[data.train].tolist(), data.style[data.train].tolist(), strict=True))
        self.styles = [[s for s in range(len(data.styles)) if (c, s) in seen] for c in range(len(data.concepts))]

    def say(self, form: str, name: str, style: str, background: str) -> tuple[list[int], list[int]]:
        """Token ids of a caption, and the places where name, style, background and the whole end."""
        words = {"c": name, "s": style, "b": background}
        ends = [len(form.partition(f"{{{key}}}")[0].format(**words)) + len(word) for key, word in words.items()]
        said = self.tokenizer(form.format(**words), padding="max_length", return_offsets_mapping=True)
        spans = said.offset_mapping
        places = [max(i for i, (start, end) in enumerate(spans) if start < last <= end) for last in ends]
        return said.input_ids, [*places, max(i for i, (_, end) in enumerate(spans) if end) + 1]

    def quads(self, n: int, random: torch.Generator) -> Quads:
        """Draw n quads of one form and background each."""

        def roll(k: int) -> int:
            return int(torch.randint(k, (), generator=random))

        colours, rows = list(world.BACKGROUNDS), []
        while len(rows) < n:
            c, d = roll(len(self.styles)), roll(len(self.styles))
            both = sorted(set(self.styles[c]) & set(self.styles[d]))
            if c == d or len(both) < 2:
                continue
            s = both.pop(roll(len(both)))
            t = both[roll(len(both))]
            form, colour = FORMS[roll(len(FORMS))], colours[roll(len(colours))]
            names = [self.name(c, roll(8)), self.name(d, roll(8))]
            rows.append(
                [(*self.say(form, names[k], self.data.styles[z], colour), (c, d)[k]) for k in (0, 1) for z in (s, t)]
            )
        ids, places, things = zip(*(zip(*row, strict=True) for row in rows), strict=True)
        return Quads(torch.tensor(ids).transpose(0, 1), torch.tensor(places).transpose(0, 1), torch.tensor(things).T)

    def name(self, concept: int, turn: int) -> str:
        """The concept's name six times in eight, else a synonym."""
        word = self.data.concepts[concept]
        return self.data.synonyms[word][turn - 6] if turn >= 6 else word


def interaction(states: Tensor) -> Tensor:
    """How far style and thing are from adding up: E |h(s,c) - h(s',c) - h(s,c') + h(s',c')|^2 / 4 Var h.

    `states` "4 n places d". 0 where every state is a sum of one part per word; 1 for states that have nothing to do
    with one another.
    """
    a, b, c, d = states
    spread = states.var((0, 1), unbiased=False).sum(-1)
    return ((a - b - c + d).pow(2).sum(-1).mean(0) / (4 * spread)).mean()


def together(states: Tensor, things: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrast: a name's state is nearest to the same thing's in other captions.

    Mean over i of -log softmax_j (h_i h_j / T) at the same thing, averaged over all such j; `states` "n d".
    """
    unit = normalize(states, dim=-1)
    near = unit @ unit.T / temperature
    near = near.masked_fill(torch.eye(len(near), dtype=torch.bool), -torch.inf)
    same = (things[:, None] == things) & ~torch.eye(len(near), dtype=torch.bool)
    chance = near.log_softmax(1).masked_fill(~same, 0.0)
    return -(chance.sum(1) / same.sum(1)).mean()


def penalty(tower: nn.Module, quads: Quads) -> tuple[Tensor, Tensor]:
    """Both terms on the last hidden states that a generator reads."""
    n = quads.ids.shape[1]
    states = tower(quads.ids.flatten(0, 1)).last_hidden_state.float()
    taken = states[torch.arange(4 * n)[:, None], quads.places.flatten(0, 1)].view(4, n, PLACES, -1)
    return interaction(taken), together(taken[:, :, 0].flatten(0, 1), quads.things.flatten())


@torch.no_grad()
def composed(tower: nn.Module, speaker: Speaker) -> tuple[float, float]:
    """Share of captions whose name's state lies nearest its own thing's mean over seen styles: seen, held out."""
    data, tables = speaker.data, []
    for style in data.styles:
        said = [speaker.say(world.TEMPLATES[0], name, style, "yellow") for name in data.concepts]
        states = tower(torch.tensor([ids for ids, _ in said])).last_hidden_state.float()
        tables.append(states[torch.arange(len(said)), torch.tensor([ends[0] for _, ends in said])])
    states = torch.stack(tables)  # "styles concepts d"
    seen = torch.tensor([[s in row for row in speaker.styles] for s in range(len(data.styles))])
    means = (states * seen[..., None]).sum(0) / seen.sum(0)[:, None]
    hit = torch.cdist(states, means).argmin(-1) == torch.arange(len(data.concepts))
    return float(hit[seen].float().mean()), float(hit[~seen].float().mean())
