"""Erase a concept with two methods and save one picture of each model, same seed.

Run: python examples/erase_and_compare.py [MODEL [FOLDER]]
"""

import sys
from pathlib import Path

import torch
from PIL import Image

import expunge

name = sys.argv[1] if len(sys.argv) > 1 else "emoji-unet"
folder = Path(sys.argv[2] if len(sys.argv) > 2 else ".")
model = expunge.load(name)
request = expunge.Request.of("strawberry", anchor="banana")
uce = expunge.find("methods", "uce")()
esd = expunge.find("methods", "esd")(steps=20, pool=8, walk=10)

arms = {"base": model}
for method in (uce, esd):
    patch = method.erase(model, request, expunge.Run(seed=0))
    arms[type(method).__name__.lower()] = patch.on(model)

for arm, generator in arms.items():
    with torch.no_grad():
        (image,) = generator.generate(["a strawberry"], seeds=[7], guidance_scale=4.0, steps=10)
    pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(folder / f"{arm}.png")
    print(f"wrote {folder / arm}.png")
