"""The in-domain CLIP as a zero-shot judge: no head was trained for any concept."""

import json

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from expunge.core.codec import from_data
from expunge.core.concept import Concept
from expunge.core.errors import unknown
from expunge.core.measure import Detector
from expunge.core.records import OperatingPoint
from expunge.detectors._judge import EMBEDDED, margin


class ClipZeroShot(Detector):
    """Compare an image with one sentence per known concept (or style) in CLIP space.

    score = s_c - max_{j != c} s_j, s_j = exp(tau) cos(image, "a picture of a j"), so score >= 0 iff top-1. It shares
    its text tower with the embedded generators: a dependent witness, reported beside the judges, never instead of them.
    Source: zero-shot classification of CLIP (arXiv:2103.00020, section 3.1).
    """

    sentences = {"concept": "a picture of a {}", "style": "a {} picture"}

    def __init__(self) -> None:
        """Load the embedded CLIP and its calibration."""
        folder = EMBEDDED / "emoji-clip"
        self.model = CLIPModel.from_pretrained(folder, local_files_only=True).float().eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.calibration = json.loads((folder / "calibration.json").read_text())

    @torch.no_grad()
    def logits(self, images: Float[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, "b _"]]:
        """Similarities to every known concept and style for images in [0, 1]."""
        result = {}
        for head, sentence in self.sentences.items():
            texts = [sentence.format(word) for word in self.calibration[head]]
            ids = self.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
            result[head] = self.model(input_ids=ids, pixel_values=images.float() * 2 - 1).logits_per_image
        return result

    def score(self, images: Float[Tensor, "b 3 h w"], concept: Concept) -> Float[Tensor, "b"]:
        """Give the margin of `concept` over its best rival; raises InputError for a concept not in the list."""
        head, index = self._locate(concept)
        return margin(self.logits(images)[head], index)

    def operating_point(self, concept: Concept) -> OperatingPoint | None:
        """Threshold 0 with sensitivity and specificity measured on the calibration split."""
        head, _ = self._locate(concept)
        return from_data(OperatingPoint, self.calibration[head][concept.name])

    def _locate(self, concept: Concept) -> tuple[str, int]:
        head = "style" if concept.kind == "style" else "concept"
        words = list(self.calibration[head])
        if concept.name not in words:
            raise unknown(f"{head} for the in-domain CLIP", concept.name, words)
        return head, words.index(concept.name)
