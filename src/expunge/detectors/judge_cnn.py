"""The judge of emoji world that is a residual convolutional network."""

from expunge.detectors._judge import Judge
from expunge.models._names import EMBEDDED


class JudgeCNN(Judge):
    """Judge concept, style and background with a residual convolutional network trained on real renders."""

    def __init__(self) -> None:
        """Load the embedded weights."""
        super().__init__(EMBEDDED / "judge-cnn")
