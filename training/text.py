"""The frozen text side that all embedded generators share."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from training.release import EMBEDDED

HERE = Path(__file__).parent


def clip_side() -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Tokenizer and text tower of the in-domain CLIP, frozen; where no run of it is left, the published ones."""
    run = HERE / "runs" / "clip"
    if not run.joinpath("model").exists():
        made = EMBEDDED / "emoji-unet"
        tower = CLIPTextModel.from_pretrained(made / "text_encoder").float()
        return CLIPTokenizer.from_pretrained(made / "tokenizer"), tower.eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    whole = CLIPModel.from_pretrained(run / "model").float()
    tower = CLIPTextModel(whole.config.text_config)
    tower.load_state_dict(whole.text_model.state_dict())
    return tokenizer, tower.eval().requires_grad_(False)


class Embedder:
    """Caption to what the frozen tower says of it, remembered."""

    def __init__(self) -> None:
        """Load tokenizer and tower."""
        self.tokenizer, self.tower = clip_side()
        self.known: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Token states "b 32 d" and pooled text "b d"."""
        for caption in captions:
            # one by one: what is remembered must not hang on others of a batch, which after a kill are others
            if caption not in self.known:
                ids = self.tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt").input_ids
                out = self.tower(ids)
                self.known[caption] = out.last_hidden_state[0].half(), out.pooler_output[0].half()
        states, pooled = zip(*(self.known[c] for c in captions), strict=True)
        return torch.stack(states).float(), torch.stack(pooled).float()
