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
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from training import clip, composition, latents, lessons, loop, paths, release, text, world

HERE = Path(__file__).parent
LENGTH, VOCABULARY, WIDTH, HEADS = 20, 2560, 192, 3
SPELL, QUADS = 0.1, 4
SINGLES = 6
CENTRE, SPREAD = 0.8, 1.2  # of logit t: what a picture shows is settled where it is mostly noise
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


class FluxNet(nn.Module):
    """Transformer and T5 encoder, trained as one."""

    def __init__(self, vocabulary: int, *, distilled: bool) -> None:
        """Three dual and six single blocks over 16 image tokens (2 × 2 latents each) and 20 text tokens."""
        super().__init__()
        self.transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=3,
            num_single_layers=SINGLES,
            attention_head_dim=WIDTH // HEADS,
            num_attention_heads=HEADS,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=clip.WIDTH,
            guidance_embeds=distilled,
            axes_dims_rope=(16, 24, 24),
        )
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=vocabulary,
                d_model=WIDTH,
                d_kv=32,
                d_ff=384,
                num_layers=2,
                num_heads=6,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
                dropout_rate=0.0,
            )
        )
        places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
        self.register_buffer("places", places, persistent=False)

    def read(self, ids: Tensor) -> Tensor:
        """Token states "b 20 d"."""
        return self.t5(ids).last_hidden_state

    def velocity(self, x: Tensor, t: Tensor, states: Tensor, pooled: Tensor, scale: Tensor | None = None) -> Tensor:
        """Velocity "b 16 64" at packed latents x and levels t in [0, 1]; `scale` is a distilled model's."""
        return self.transformer(
            hidden_states=x,
            timestep=t,
            guidance=scale,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            img_ids=self.places,
            txt_ids=torch.zeros(states.shape[1], 3),
            return_dict=False,
        )[0]


def pack(z: Tensor) -> Tensor:
    """Latents "b 16 8 8" to tokens "b 16 64", as FluxPipeline packs them."""
    return z.view(-1, 16, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 16, 64)


class Words:
    """Caption to T5's token numbers and CLIP's pooled text."""

    def __init__(self, tokenizer: T5TokenizerFast) -> None:
        """Load the frozen tower."""
        self.tokenizer, self.embed = tokenizer, text.Embedder()

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Numbers "b 20" and pooled text "b d"."""
        batch = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return batch.input_ids, self.embed(captions)[1]


def levels(n: int, random: torch.Generator) -> Tensor:
    """Draw n noise levels, logit t normal, stratified: every batch sees all of them."""
    u = (torch.rand(n, generator=random) + torch.randperm(n, generator=random)) / n
    return torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)).mul(SPREAD).add(CENTRE).sigmoid()


def objective(net: FluxNet, tokenizer: T5TokenizerFast, args: argparse.Namespace) -> Callable[[int], Tensor]:
    """The loss of one step for this process's share of the batch."""
    words, share = Words(tokenizer), args.batch // args.processes
    mixture = latents.Mixture(share, args.extra)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if args.distil:
        return distillation(net, finished(tokenizer).eval().requires_grad_(False), words, mixture, args, rank)
    bank, speaker = lessons.Bank(mixture, levels), composition.Speaker(mixture.whole, tokenizer)

    def loss(step: int) -> Tensor:
        random = loop.rng(args.seed, 1, step, rank)
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

    return loss


def distillation(
    net: FluxNet, teacher: FluxNet, words: Words, mixture: latents.Mixture, args: argparse.Namespace, rank: int
) -> Callable[[int], Tensor]:
    """The loss of a student of the guided answer: half on straight paths from pictures, half on guided ones."""
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
        random = loop.rng(args.seed, 1, step, rank)
        with loop.mixed():
            sides = straight(share // 2, random), walked.draw(share - share // 2, random, step)
            x, t, scale, goal = (torch.cat([side[k] for side in sides]) for k in (0, 1, 2, 4))
            v = learned(x, t, sides[0][3] + sides[1][3], scale)
        return (v - goal).pow(2).mean()

    return loss


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


def work(rank: int, args: argparse.Namespace) -> None:
    """Train as one of `args.processes`, gradients averaged."""
    loop.join(rank, args.processes)
    torch.manual_seed(args.seed)
    # learnt anew, rare signs get other numbers than those the encoder knows
    shipped, known = release.EMBEDDED / NAMES[False] / "tokenizer_2", args.start or args.distil
    tokenizer = T5TokenizerFast.from_pretrained(shipped) if known else learn_tokenizer(args.cache)
    net = FluxNet(len(tokenizer), distilled=args.distil)
    if args.start:
        net.load_state_dict(finished(tokenizer, distilled=args.distil).state_dict())
    elif args.distil:
        net.load_state_dict(finished(tokenizer).state_dict(), strict=False)  # the scale's embedder is new
        for new in net.transformer.time_text_embed.guidance_embedder.linear_2.parameters():
            nn.init.zeros_(new)  # silent at first: the student begins as its teacher
    if args.distil:
        net.t5.requires_grad_(False)
    trainer = loop.Trainer(net, args.run, lr=args.lr, steps=args.steps, first=args.first, decay=0.9985)
    if rank == 0:
        trainer.log(begins=True, steps=args.steps, batch=args.batch, extra=args.extra)
    command = f"python -m training.flux{' --distil' * args.distil}"
    for step in trainer.run(objective(net, tokenizer, args), save_every=250):
        if rank == 0 and (step % args.publish == 0 or step == args.steps):
            # at the end the rate has fallen to zero: an average would only look back at worse weights
            weights = net.state_dict() if step == args.steps else trainer.ema
            pipeline = assemble(weights, tokenizer, distilled=args.distil)
            release.publish(pipeline, args.run, NAMES[args.distil], command)


def main() -> None:
    """Prepare the frozen parts, then train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--distil", action="store_true")
    parser.add_argument("--steps", type=int, default=14000)
    parser.add_argument(
        "--start", choices=list(NAMES.values()), help="begin from what ships where no checkpoint is left"
    )
    parser.add_argument("--first", type=int, default=0, help="step a further stretch counts on from, see --start")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--publish", type=int, default=1000)
    parser.add_argument("--extra", type=float, default=0.15, help="share of other things in a batch, see build_dataset")
    parser.add_argument("--reading", type=int, default=3000, help="steps in which the T5-type encoder learns")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=HERE / ".cache" / "npm")
    args = parser.parse_args()
    if args.start not in (None, NAMES[args.distil]):
        parser.error(f"--start {args.start} goes on with another model than {NAMES[args.distil]}; see --distil")
    args.run = HERE / "runs" / ("flux-distilled" if args.distil else "flux")
    args.run.mkdir(parents=True, exist_ok=True)
    loop.quiet_cpu()
    latents.prepare()
    if args.processes == 1:
        work(0, args)
    else:
        torch.multiprocessing.spawn(work, args=(args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
