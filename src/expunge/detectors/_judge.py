"""The image judges of emoji world: a stock backbone under three linear heads, concept, style and background."""

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, ViTModel

from expunge.core.codec import from_data
from expunge.core.concept import Concept
from expunge.core.errors import InputError, unknown
from expunge.core.measure import Detector
from expunge.core.records import OperatingPoint


class JudgeNet(nn.Module):
    """Backbone and heads: images in [0, 1] to logits of each head."""

    def __init__(self, backbone: nn.Module, labels: Mapping[str, tuple[str, ...]], width: int) -> None:
        """Join a backbone of feature width `width` with one linear head per attribute."""
        super().__init__()
        self.backbone = backbone
        self.labels = dict(labels)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in labels.items()})

    def pooled(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Mean feature of the backbone."""
        features = self.backbone(pixel_values=images * 2 - 1).last_hidden_state
        # a convolutional backbone gives a map "b c h w", a transformer gives tokens "b n c"
        return features.mean((2, 3)) if features.ndim == 4 else features.mean(1)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, "b _"]]:
        """Logits per head."""
        pooled = self.pooled(images)
        return {name: head(pooled) for name, head in self.heads.items()}

    @classmethod
    def from_folder(cls, folder: Path) -> "JudgeNet":
        """Load backbone config, labels and weights."""
        facts = json.loads((folder / "judge.json").read_text())
        backbone = AutoModel.from_config(AutoConfig.from_pretrained(folder))
        if isinstance(backbone, ViTModel):
            backbone.pooler = None  # the heads average tokens; an unused layer has no weights here
        net = cls(backbone, {k: tuple(v) for k, v in facts["labels"].items()}, facts["width"])
        net.load_state_dict({name: t.float() for name, t in load_file(folder / "model.safetensors").items()})
        return net.eval()


class FirstChoice(Detector):
    """Decide by what margin a concept is the first choice of the head that knows it.

    score = z_c - max_{j != c} z_j over that head's logits z, so score >= 0 iff top-1. Classes stand in `calibration` in
    the order of the logits.
    """

    calibration: Mapping[str, Mapping[str, Any]]

    @abstractmethod
    def logits(self, images: Float[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, "b _"]]:
        """Logits of every head for images in [0, 1]."""

    def score(self, images: Float[Tensor, "b 3 h w"], concept: Concept) -> Float[Tensor, "b"]:
        """Give the margin of `concept` over its best rival; raises InputError for a concept no head knows."""
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
            raise unknown(f"{head} for this judge", concept.name, words)
        return head, words.index(concept.name)


class Judge(FirstChoice):
    """Says by what margin a concept, style or background is a network's first choice.

    score = z_c - max_{j != c} z_j over the logits z of the head that knows c, so score >= 0 iff top-1. Trained on real
    renders only and never seen by an eraser; operating points come from a calibration split, see calibration.json.
    """

    def __init__(self, folder: Path) -> None:
        """Load network and calibration."""
        self.net = JudgeNet.from_folder(folder)
        self.calibration = json.loads((folder / "calibration.json").read_text())

    @torch.no_grad()
    def logits(self, images: Float[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, "b _"]]:
        """Logits of every head for images in [0, 1]."""
        logits: dict[str, Tensor] = self.net(images.float())
        return logits

    @torch.no_grad()
    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Mean feature of the backbone."""
        return self.net.pooled(images.float())


def margin(logits: Float[Tensor, "b k"], index: int) -> Float[Tensor, "b"]:
    """Logit of one class minus the best of the others."""
    if logits.shape[1] < 2:
        raise InputError("a margin needs at least two classes")
    rivals = logits.clone()
    rivals[:, index] = -torch.inf
    return logits[:, index] - rivals.amax(1)
