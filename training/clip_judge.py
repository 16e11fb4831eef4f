"""Finish the in-domain CLIP as a zero-shot judge: python -m training.clip_judge

The text tower stays as the generators know it; the image tower goes on learning to meet it, under the judges'
strong augmentation, and the pair is published; training.calibrate does the rest. No head is trained for any
concept: classes are sentences.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from training import clip, judges, loop, options, world

HERE = Path(__file__).parent
FOLDER = judges.EMBEDDED / "emoji-clip"


def main() -> None:
    """Train the image tower, save both towers in half precision."""
    parser = options.parser(__doc__)
    parser.add_argument("--steps", type=options.count, default=1200)
    parser.add_argument("--batch", type=options.count, default=64)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--run", type=Path, default=HERE / "runs" / "clip-judge")
    args = parser.parse_args()
    options.settle(parser, args)
    loop.quiet_cpu()
    torch.manual_seed(args.seed)
    data = world.load()
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "runs" / "clip" / "tokenizer")
    net = CLIPModel.from_pretrained(HERE / "runs" / "clip" / "model").float()
    net.text_model.requires_grad_(False)
    net.text_projection.requires_grad_(False)
    trainer = loop.Trainer(net, args.run, options.recipe(args), lr=4e-4)

    def loss(step: int) -> Tensor:
        random = loop.rng(args.seed, 1, step)
        images, captions, match = clip.draw(data, args.batch, random)
        ids = tokenizer([c.text for c in captions], padding="max_length", return_tensors="pt").input_ids
        with loop.mixed():
            logits = net(input_ids=ids, pixel_values=judges.augment(images, random) * 2 - 1).logits_per_text.float()
        return clip.contrast(logits, match)

    for _ in trainer.run(loss):
        pass
    net.load_state_dict(trainer.ema)
    net.half().save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)


if __name__ == "__main__":
    main()
