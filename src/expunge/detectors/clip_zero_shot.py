"""The in-domain CLIP as a zero-shot judge: no head was trained for any concept."""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizer

from expunge.detectors._judge import FirstChoice
from expunge.models._names import EMBEDDED
from expunge.models._quiet import quiet


class ClipZeroShot(FirstChoice):
    """Compare an image with one sentence per known concept (or style) in CLIP space.

    score = s_c - max_{j != c} s_j, s_j = exp(tau) cos(image, "a picture of a j"), so score >= 0 iff top-1. It shares
    its text tower with the embedded generators: a dependent witness, reported beside the judges, never instead of them.
    Source: zero-shot classification of CLIP (arXiv:2103.00020, section 3.1).
    """

    sentences: ClassVar[Mapping[str, str]] = {"concept": "a picture of a {}", "style": "a {} picture"}

    def __init__(self) -> None:
        """Load the embedded CLIP and its calibration."""
        folder = EMBEDDED / "emoji-clip"
        with quiet():
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True).float().eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.calibration = json.loads((folder / "calibration.json").read_text())

    @cached_property
    @torch.no_grad()
    def texts(self) -> dict[str, Float[Tensor, "k d"]]:
        """Unit vectors of the sentence of every known concept and style, by head; encoded once."""
        result = {}
        for head, sentence in self.sentences.items():
            texts = [sentence.format(word) for word in self.calibration[head]]
            ids = self.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
            result[head] = normalize(self.model.get_text_features(input_ids=ids).pooler_output, dim=-1)
        return result

    @torch.no_grad()
    def logits(self, images: Float[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, "b _"]]:
        """Similarities to every known concept and style for images in [0, 1], from one pass of the image tower."""
        seen = self.features(images) * self.model.logit_scale.exp()
        return {head: seen @ texts.T for head, texts in self.texts.items()}

    @torch.no_grad()
    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit vectors of the image tower."""
        return normalize(self.model.get_image_features(pixel_values=images.float() * 2 - 1).pooler_output, dim=-1)
