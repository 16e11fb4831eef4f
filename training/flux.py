"""Train `emoji-flux` in FLUX.1's format, then distil its guidance: python -m training.flux, then with --distil

Rectified flow: x = (1 - t) z + t e, loss = ||F(x, t, text) - v||^2, t logit-normal, v what `emoji-unet` says of e - z
(training.lessons); one caption in ten is empty. Pooled text comes from the in-domain CLIP, frozen. The T5-type encoder
learns along with the transformer, since no other task here would teach it, and stands still after --reading steps;
until then SPELL times the terms of training.composition keep its words apart. With --distil a student that reads the
scale g, from the finished model's weights, learns its guided answer v_u + g (v_c - v_u), g uniform in [1, 5], under
text encoders that no longer move.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import T5EncoderModel, T5TokenizerFast

from training import clip, composition, latents, lessons, loop, options, paths, release, text, world
from training.flux_net import FluxNet, Words, levels, pack

HERE = Path(__file__).parent
LENGTH, VOCABULARY = 20, 2560
SPELL, QUADS = 0.1, 4
NAMES = {False: "emoji-flux", True: "emoji-flux-distilled"}


def learn_tokenizer(cache: Path) -> T5TokenizerFast:
    """Learn a unigram vocabulary from CLIP's words and our captions, whose words become one token each.

    Printable ASCII can always be spelt.
    """
    engine = Tokenizer(models.Unigram())
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    special, signs = ["<pad>", "</s>", "<unk>"], [chr(code) for code in range(33, 127)]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>", initial_alphabet=signs, show_progress=False
    )
    engine.train_from_iterator(clip.sentences(cache), trainer)
    found = {token: score for token, score in json.loads(engine.to_str())["model"]["vocab"] if token not in special}
    rare = min(found.values()) - 1
    spelt = {**dict.fromkeys(signs, rare), **found, **whole_words()}
    vocabulary = [*((token, 0.0) for token in special), *spelt.items()]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, additional_special_tokens=[], model_max_length=LENGTH)


def whole_words() -> dict[str, float]:
    """Every word of a caption with the log of its share, more than its parts' together: it stays one token."""
    data = world.load()
    names = [name for word in data.concepts for name in (word, *data.synonyms[word])]
    said = [
        form.format(s=s, c=c, b=b)
        for form in world.TEMPLATES
        for c, s, b in zip(names, cycle(data.styles), cycle(world.BACKGROUNDS))
    ]
    words = Counter(word for text in said for word in text.lower().replace(",", "").split())
    return {f"▁{word}": math.log(count / words.total()) for word, count in words.items()}


Objective = tuple[Callable[[int], Tensor], loop.Own]
"""The loss of one step for this process's share of the batch, and what it remembers from step to step."""


def objective(net: FluxNet, tokenizer: T5TokenizerFast, args: argparse.Namespace) -> Objective:
    """What a run learns."""
    words, share = Words(tokenizer), args.batch // args.processes
    mixture = latents.Mixture(share, args.extra)
    if args.distil:
        return distillation(net, finished(tokenizer).eval().requires_grad_(False), words, mixture, args)
    bank = lessons.Bank(mixture, levels, lessons.finished())
    speaker = composition.Speaker(mixture.whole, tokenizer)

    def loss(step: int) -> Tensor:
        random = loop.rng(args.seed, 1, step, loop.rank())
        x, t, captions, goal = bank.draw(share, random)
        ids, pooled = words(captions)
        net.t5.requires_grad_(step < args.reading)
        with loop.mixed():
            v = net.velocity(pack(x), t, net.read(ids), pooled)
            error = (v.float() - pack(goal)).pow(2).mean()
            if step >= args.reading:
                return error
            mixed, apart = composition.penalty(net.t5, speaker.quads(QUADS // args.processes, random))
            return error + SPELL * (clip.APART * mixed + apart)

    return loss, bank


def distillation(
    net: FluxNet, teacher: FluxNet, words: Words, mixture: latents.Mixture, args: argparse.Namespace
) -> Objective:
    """What a student of the guided answer learns: half on straight paths from pictures, half on guided ones."""
    share = args.batch // args.processes

    def taught(x: Tensor, t: Tensor, captions: list[str], scale: Tensor) -> Tensor:
        return guided(teacher, x, t, words(captions), words([""]), scale)

    def learned(x: Tensor, t: Tensor, captions: list[str], scale: Tensor) -> Tensor:
        ids, pooled = words(captions)
        return net.velocity(x, t, net.read(ids), pooled, scale).float()

    walked = paths.Paths(taught, learned, lambda random: mixture.draw(random)[1])

    def straight(n: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, list[str], Tensor]:
        z, captions = mixture.draw(random)
        some = torch.randperm(len(z), generator=random)[:n]
        z, captions = pack(z)[some], [captions[i] for i in some.tolist()]
        t, scale = levels(n, random), 1 + 4 * torch.rand(n, generator=random)
        x = z + t[:, None, None] * (torch.randn(z.shape, generator=random) - z)
        return x, t, scale, captions, taught(x, t, captions, scale)

    def loss(step: int) -> Tensor:
        random = loop.rng(args.seed, 1, step, loop.rank())
        with loop.mixed():
            sides = straight(share // 2, random), walked.draw(share - share // 2, random, step)
            x, t, scale, goal = (torch.cat([side[k] for side in sides]) for k in (0, 1, 2, 4))
            v = learned(x, t, sides[0][3] + sides[1][3], scale)
        return (v - goal).pow(2).mean()

    return loss, walked


@torch.no_grad()
def guided(
    teacher: FluxNet, x: Tensor, t: Tensor, cond: tuple[Tensor, Tensor], empty: tuple[Tensor, Tensor], scale: Tensor
) -> Tensor:
    """The teacher's v_u + g (v_c - v_u)."""
    n = len(x)
    states = teacher.read(cond[0])
    both = torch.cat([teacher.read(empty[0]).expand_as(states), states])
    pooled = torch.cat([empty[1].expand(n, -1), cond[1]])
    u, c = teacher.velocity(torch.cat([x, x]), torch.cat([t, t]), both, pooled).float().chunk(2)
    return u + scale[:, None, None] * (c - u)


def finished(tokenizer: T5TokenizerFast, *, distilled: bool = False) -> FluxNet:
    """Read a model that ships: the undistilled one's half precision is the student's too."""
    net, made = FluxNet(len(tokenizer), distilled=distilled), release.EMBEDDED / NAMES[distilled]
    net.transformer = FluxTransformer2DModel.from_pretrained(made / "transformer").float()
    net.t5 = T5EncoderModel.from_pretrained(made / "text_encoder_2").float()
    return net


def assemble(weights: dict[str, Tensor], tokenizer: T5TokenizerFast, *, distilled: bool) -> FluxPipeline:
    """Join the trained parts with the frozen ones into a stock pipeline."""
    net = FluxNet(len(tokenizer), distilled=distilled)
    net.load_state_dict(weights)
    clip_tokenizer, tower = text.clip_side()
    vae = latents.finished()
    vae.register_to_config(shift_factor=0.0)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=tower,
        tokenizer=clip_tokenizer,
        text_encoder_2=net.t5.eval(),
        tokenizer_2=tokenizer,
        transformer=net.transformer.eval(),
    )


def tokenizer_of(args: argparse.Namespace) -> Path:
    """Where the run's tokenizer lies: the published one, or one that is learned before the first checkpoint.

    Learned anew, words as frequent as others, and rare signs, get other numbers than those the encoder knows.
    """
    if args.start or args.distil:
        return release.EMBEDDED / NAMES[False] / "tokenizer_2"
    kept: Path = args.run / "tokenizer"
    if not (args.run / loop.CHECKPOINT).exists():
        learn_tokenizer(args.cache).save_pretrained(kept)
    return kept


def work(rank: int, args: argparse.Namespace) -> None:
    """Train as one of `args.processes`, gradients averaged."""
    loop.join(rank, args.processes)
    torch.manual_seed(args.seed)
    tokenizer = T5TokenizerFast.from_pretrained(args.tokenizer)
    net = FluxNet(len(tokenizer), distilled=args.distil)
    if args.start:
        net.load_state_dict(finished(tokenizer, distilled=args.distil).state_dict())
    elif args.distil:
        net.load_state_dict(finished(tokenizer).state_dict(), strict=False)  # the scale's embedder is new
        for new in net.transformer.time_text_embed.guidance_embedder.linear_2.parameters():
            nn.init.zeros_(new)  # silent at first: the student begins as its teacher
    if args.distil:
        net.t5.requires_grad_(False)
    loss, own = objective(net, tokenizer, args)
    trainer = loop.Trainer(net, args.run, options.recipe(args), lr=args.lr, decay=0.9985, own=own)
    command = f"python -m training.flux{' --distil' * args.distil}"
    for step in trainer.run(loss, save_every=250):
        if rank == 0 and (step % args.publish == 0 or step == args.steps):
            # at the end the rate has fallen to zero: an average would only look back at worse weights
            weights = net.state_dict() if step == args.steps else trainer.ema
            pipeline = assemble(weights, tokenizer, distilled=args.distil)
            release.publish(pipeline, args.run, NAMES[args.distil], command)


def main() -> None:
    """Prepare the frozen parts, then train."""
    parser = options.parser(__doc__)
    parser.add_argument("--distil", action="store_true")
    parser.add_argument("--steps", type=options.count, default=14000)
    parser.add_argument(
        "--start", choices=list(NAMES.values()), help="begin from what ships where no checkpoint is left"
    )
    parser.add_argument("--first", type=options.natural, default=0, help="step of --start to count on from")
    parser.add_argument("--batch", type=options.count, default=64)
    parser.add_argument("--processes", type=options.count, default=2)
    parser.add_argument("--publish", type=options.count, default=1000)
    parser.add_argument(
        "--extra", type=options.share, default=0.15, help="share of other things in a batch, see build_dataset"
    )
    parser.add_argument(
        "--reading", type=options.natural, default=3000, help="steps in which the T5-type encoder learns"
    )
    parser.add_argument("--lr", type=options.rate, default=1e-3)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=HERE / ".cache" / "npm")
    args = parser.parse_args()
    if args.start not in (None, NAMES[args.distil]):
        parser.error(f"--start {args.start} goes on with another model than {NAMES[args.distil]}; see --distil")
    args.run = HERE / "runs" / ("flux-distilled" if args.distil else "flux")
    options.settle(parser, args)
    args.run.mkdir(parents=True, exist_ok=True)
    loop.quiet_cpu()
    latents.prepare()
    args.tokenizer = tokenizer_of(args)  # before there are several processes, which would each learn another
    if args.processes == 1:
        work(0, args)
    else:
        torch.multiprocessing.spawn(work, args=(args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
