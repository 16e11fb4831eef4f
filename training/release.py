"""How a finished generator gets into the package."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

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
"""


def publish(pipeline: DiffusionPipeline, run: Path, name: str, command: str) -> None:
    """Save a pipeline in half precision where the library finds it, whole or not at all."""
    target, scratch = EMBEDDED / name, run / "published"
    shutil.rmtree(scratch, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(scratch, safe_serialization=True)
    # transformers opens a text encoder in the dtype its config names, diffusers the rest in float32: they must meet
    for config in scratch.glob("text_encoder*/config.json"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    (scratch / "README.md").write_text(CARD.format(name=name, command=command))
    if target.exists():
        target.rename(run / "replaced")
    scratch.rename(target)
    shutil.rmtree(run / "replaced", ignore_errors=True)
