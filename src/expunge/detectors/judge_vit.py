"""The judge of emoji world that is a vision transformer."""

from expunge.detectors._judge import Judge
from expunge.models._names import EMBEDDED


class JudgeViT(Judge):
    """Judge concept, style and background with a vision transformer trained on real renders."""

    def __init__(self) -> None:
        """Load the embedded weights."""
        super().__init__(EMBEDDED / "judge-vit")
