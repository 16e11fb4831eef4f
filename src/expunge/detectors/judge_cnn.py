"""The judge of emoji world that is a residual convolutional network."""

from expunge.detectors._judge import EMBEDDED, Judge


class JudgeCNN(Judge):
    """Judge concept, style and background with a residual convolutional network trained on real renders."""

    def __init__(self) -> None:
        """Load the embedded weights."""
        super().__init__(EMBEDDED / "judge-cnn")
