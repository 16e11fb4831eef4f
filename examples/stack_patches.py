"""Patches are values: erase two concepts one after the other, stack both on one base, and take them off again.

Run: python examples/stack_patches.py [MODEL]
"""

import sys

import torch

import expunge

model = expunge.load(sys.argv[1] if len(sys.argv) > 1 else "emoji-unet")
uce = expunge.find("methods", "uce")()
first = uce.erase(model, expunge.Request.of("strawberry", anchor="banana"), expunge.Run())
second = uce.erase(first.on(model), expunge.Request.of("dog", anchor="cat"), expunge.Run())
both = second.on(first.on(model))

for prompt in ("a strawberry", "a dog", "a guitar"):
    with torch.no_grad():
        before, after, again = (
            view.generate([prompt], seeds=[1], guidance_scale=4.0, steps=10) for view in (model, both, model)
        )
    print(f"{prompt}: mean change of a pixel {255 * (before - after).abs().mean():.1f} of 255")
    assert torch.equal(before, again)  # the base model never changed
