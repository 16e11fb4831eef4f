"""Train the in-domain CLIP whose text half conditions every embedded generator: python -m training.clip

A byte-level BPE tokenizer is learned from the emoji names and tags; a text and an image tower are then trained with
a symmetric softmax over caption–image pairs. A caption that leaves style or background open matches every picture
that agrees with what it says, so targets are spread over all such pictures of the batch. Beside that, captions alone
teach the text tower to keep their words apart (training.composition):

    loss = contrast + APART · interaction + together
"""

import argparse
import csv
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, log_softmax
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from training import build_dataset, composition, loop, options, world

HERE = Path(__file__).parent
EMBEDDED = HERE.parent / "src" / "expunge" / "embedded"
LENGTH, VOCABULARY, WIDTH = 32, 3072, 192
APART, QUADS = 10.0, 16
START, END = "<|startoftext|>", "<|endoftext|>"


def sentences(cache: Path) -> list[str]:
    """Return what the tokenizer learns from: our captions' words thrice, then every emoji's label and tags."""
    names = tomllib.loads((HERE / "sources.toml").read_text())["names"]
    entries = json.loads((build_dataset.fetch(names, cache) / "en" / "data.json").read_text())
    with (HERE / "concepts.csv").open() as file:
        ours = [row[key] for row in csv.DictReader(file) for key in ("name", "emoji", "synonym_1", "synonym_2")]
    data = world.load()
    ours += [f.format(s=s, c="", b=b) for f in world.TEMPLATES for s in data.styles for b in world.BACKGROUNDS]
    theirs = [text for e in entries for text in (e["label"], *e.get("tags", []))]
    return [text.lower() for text in ours * 3 + theirs]


def learn_tokenizer(folder: Path, cache: Path) -> CLIPTokenizer:
    """Learn merges over bytes and save them as a stock CLIPTokenizer that can spell any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    room = VOCABULARY - len(alphabet) - 2
    trainer = trainers.BpeTrainer(
        vocab_size=room, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    words = (word for text in sentences(cache) for word in text.split())
    engine.train_from_iterator(words, trainer)
    state = json.loads(engine.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    learned = [
        token for token in state["vocab"] if token not in alphabet and token.removesuffix("</w>") not in alphabet
    ]
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *learned, START, END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Both towers: four layers, width 192."""
    end = tokenizer.convert_tokens_to_ids(END)
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4}
    special = {"bos_token_id": tokenizer.convert_tokens_to_ids(START), "eos_token_id": end, "pad_token_id": end}
    text = {**shared, **special, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    vision = {**shared, "image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def jitter(images: Tensor, random: torch.Generator) -> Tensor:
    """Small shifts, scales, brightness changes and noise."""
    n = len(images)
    draw = torch.rand(n, 5, generator=random)
    scale, shift = 0.9 + 0.25 * draw[:, 0], (draw[:, 1:3] - 0.5) * 0.2
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    moved = grid_sample(
        images, affine_grid(theta, list(images.shape), False), padding_mode="border", align_corners=False
    )
    noise = torch.randn(images.shape, generator=random) * (0.06 * draw[:, 3])[:, None, None, None]
    return (moved * (0.9 + 0.2 * draw[:, 4])[:, None, None, None] + noise).clamp(0, 1)


def draw(
    data: world.World, batch: int, random: torch.Generator, *, pools: Sequence[Tensor] = ()
) -> tuple[Tensor, list[world.Caption], Tensor]:
    """Draw pictures, a caption for each, and which picture every caption is true of: "caption picture" bool.

    From all that may be learned, or as many from each of `pools`.
    """
    pools = pools or (data.train,)
    share = batch // len(pools)
    index = torch.cat([pool[torch.randint(len(pool), (share,), generator=random)] for pool in pools])
    batch = len(index)
    background = torch.randint(len(world.BACKGROUNDS), (batch,), generator=random)
    captions = [data.caption(int(i), int(b), random) for i, b in zip(index, background, strict=True)]
    open_concept = torch.tensor([not c.says_concept for c in captions])[:, None]
    open_style = torch.tensor([not c.says_style for c in captions])[:, None]
    open_background = torch.tensor([not c.says_background for c in captions])[:, None]
    style, concept = data.style[index], data.concept[index]
    match = open_concept | (concept[:, None] == concept)
    match &= open_style | (style[:, None] == style)
    match &= open_background | (background[:, None] == background)
    return data.compose(index, background), captions, match


def contrast(logits: Tensor, match: Tensor) -> Tensor:
    """Symmetric cross-entropy whose targets are spread over all true pairs of a row or column."""
    target = match.float()
    to_image = -(log_softmax(logits, 1) * target / target.sum(1, keepdim=True)).sum(1)
    to_text = -(log_softmax(logits, 0) * target / target.sum(0, keepdim=True)).sum(0)
    return (to_image.mean() + to_text.mean()) / 2


def main() -> None:
    """Learn the tokenizer, train both towers, save the averaged weights."""
    parser = options.parser(__doc__)
    parser.add_argument("--steps", type=options.count, default=1200)
    parser.add_argument("--batch", type=options.count, default=64)
    parser.add_argument("--first", type=options.natural, default=0, help="step of --start to count on from")
    parser.add_argument("--lr", type=options.rate, default=6e-4)
    parser.add_argument("--start", choices=["emoji-clip"], help="published pair to go on from, with its tokenizer")
    parser.add_argument("--extra", action="store_true", help="half of all from other things (build_dataset --extra)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--run", type=Path, default=HERE / "runs" / "clip")
    parser.add_argument("--cache", type=Path, default=HERE / ".cache" / "npm")
    args = parser.parse_args()
    options.settle(parser, args)
    loop.quiet_cpu()
    torch.manual_seed(args.seed)
    data, pools = everything(args.extra)
    net, tokenizer = begin(args)
    trainer = loop.Trainer(net, args.run, options.recipe(args), lr=args.lr)
    speaker = composition.Speaker(data, tokenizer)

    def loss(step: int) -> Tensor:
        random = loop.rng(args.seed, 1, step)
        images, captions, match = draw(data, args.batch, random, pools=pools)
        ids = tokenizer([c.text for c in captions], padding="max_length", return_tensors="pt").input_ids
        with loop.mixed():
            logits = net(input_ids=ids, pixel_values=jitter(images, random) * 2 - 1).logits_per_text.float()
            mixed, apart = composition.penalty(net.text_model, speaker.quads(QUADS, random))
        return contrast(logits, match) + APART * mixed + apart

    for step in trainer.run(loss):
        if step % 100 == 0:
            trainer.log(
                **dict(
                    zip(("composed", "composed_held_out"), composition.composed(net.text_model, speaker), strict=True)
                )
            )
    net.load_state_dict(trainer.ema)
    net.half().save_pretrained(args.run / "model")
    probe(net.float(), tokenizer, world.load(), trainer)


def everything(extra: bool) -> tuple[world.World, tuple[Tensor, ...]]:
    """Emoji world, alone or joined with other things, and what to draw in equal shares."""
    ours = world.load()
    if not extra:
        return ours, (ours.train,)
    both = world.join(ours, world.load(build_dataset.EXTRA))
    return both, (ours.train, torch.arange(len(ours.rgba), len(both.rgba)))


def begin(args: argparse.Namespace) -> tuple[CLIPModel, CLIPTokenizer]:
    """Towers and tokenizer: new ones, or a published pair's."""
    if not args.start:
        kept = args.run / "tokenizer"
        if not (args.run / loop.CHECKPOINT).exists():  # learned anew, words as frequent as others get other numbers
            learn_tokenizer(kept, args.cache)
        tokenizer = CLIPTokenizer.from_pretrained(kept)
        return build(tokenizer), tokenizer
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / args.start)
    tokenizer.save_pretrained(args.run / "tokenizer")
    return CLIPModel.from_pretrained(EMBEDDED / args.start).float(), tokenizer


@torch.no_grad()
def probe(net: CLIPModel, tokenizer: CLIPTokenizer, data: world.World, trainer: loop.Trainer) -> None:
    """Log zero-shot concept accuracy of the finished pair over every render."""
    ids = tokenizer([f"a picture of a {c}" for c in data.concepts], padding="max_length", return_tensors="pt").input_ids
    background = torch.arange(len(data.rgba)) % len(world.BACKGROUNDS)
    images = data.compose(torch.arange(len(data.rgba)), background) * 2 - 1
    hit = net(input_ids=ids, pixel_values=images).logits_per_image.argmax(1) == data.concept
    trainer.log(zero_shot=float(hit[~data.held_out].float().mean()), held_out=float(hit[data.held_out].float().mean()))


if __name__ == "__main__":
    main()
