"""How a finished generator gets into the package."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxPipeline

EMBEDDED = Path(__file__).parents[1] / "src" / "expunge" / "embedded"
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# {name}

A small text-to-image model of emoji world, made by `{command}` in the expunge repository.
Weights: Apache-2.0. It learned from open emoji art: Twemoji (CC-BY 4.0, Twitter, Inc and other contributors),
EmojiOne 2.3 (CC-BY 4.0), Fluent Emoji (MIT, Microsoft Corporation), Noto Emoji (Apache-2.0, Google LLC).
NOTICE in the repository has the full credits and says what was changed.

Stock diffusers draws from it:

```python
from importlib.resources import files

import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(str(files("expunge") / "embedded" / "{name}"))
image = pipeline(
    "a flat picture of a strawberry on a blue background",
{asked}    num_inference_steps=25,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("strawberry.png")
```
"""


def card(pipeline: DiffusionPipeline, name: str, command: str) -> str:
    """Say what a generator is, whose hands are in it, and how diffusers draws from it."""
    scale: dict[str, float | str] = {"guidance_scale": 4.0}
    if isinstance(pipeline, FluxPipeline):  # which assumes 1024 pixels and 512 tokens where nothing is said
        sizes = {"height": 64, "width": 64, "max_sequence_length": pipeline.tokenizer_2.model_max_length}
        plain = {"true_cfg_scale": 4.0, "negative_prompt": ""}  # two passes a step, as Stable Diffusion
        scale = sizes | (scale if pipeline.transformer.config.guidance_embeds else plain)
    asked = "".join(f"    {word}={json.dumps(value)},\n" for word, value in scale.items())
    return CARD.format(name=name, command=command, asked=asked)


def publish(pipeline: DiffusionPipeline, run: Path, name: str, command: str) -> None:
    """Save a pipeline in half precision where the library finds it, whole or not at all."""
    target, scratch = EMBEDDED / name, run / "published"
    shutil.rmtree(scratch, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(scratch, safe_serialization=True)
    # transformers opens a text encoder in the dtype its config names, diffusers the rest in float32: they must meet
    for config in scratch.glob("text_encoder*/config.json"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    (scratch / "README.md").write_text(card(pipeline, name, command))
    shutil.rmtree(run / "replaced", ignore_errors=True)  # of a kill just before the end
    if target.exists():
        target.rename(run / "replaced")
    scratch.rename(target)
    shutil.rmtree(run / "replaced", ignore_errors=True)
