"""Logistic heads on frozen features: fitted on one split, calibrated on a second, read once on a third."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy.fft import dctn
from scipy.optimize import minimize, minimize_scalar

from expunge.leakage.lower import TwinScores, channel_bits
from expunge.leakage.twins import Split

PENALTY = 0.02
"""Of the squared norm, on standardized features; fixed beforehand."""
CHOICES = 24  # thresholds tried on the calibration split
_Matrix = Float[np.ndarray, "n d"]
_AnyMatrix = Float[np.ndarray, "_ _"]  # batches differ in length, extractors in width
_Vector = Float[np.ndarray, "d"]
_Rows = Float[np.ndarray, "n"]


@dataclass(frozen=True)
class Head:
    """q(C = 1 | x) = sigmoid((w . (x - mean) / scale + b) / temperature), firing where q >= threshold."""

    mean: _Vector
    scale: _Vector
    w: _Vector
    b: float
    temperature: float = 1.0
    threshold: float = 0.5

    def margin(self, x: _Matrix) -> _Rows:
        """Log-odds before the temperature."""
        return ((x - self.mean) / self.scale) @ self.w + self.b

    def posterior(self, x: _Matrix) -> _Rows:
        """q(C = 1 | x)."""
        return np.exp(-np.logaddexp(0, -self.margin(x) / self.temperature))

    def on(self, concept: _Matrix, anchor: _Matrix, pairs: Sequence[int]) -> TwinScores:
        """Ask about both pictures of some twin pairs."""
        rows = list(pairs)
        return TwinScores.of(self.posterior(concept[rows]), self.posterior(anchor[rows]), rows)


def risk(w: _Vector, x: _Matrix, signs: _Rows, b: float = 0.0) -> tuple[float, _Vector, float]:
    """Mean of ln(1 + exp(-s (w . x + b))) in nats, with its slopes in w and in b."""
    margin = signs * (x @ w + b)
    pull = -signs * np.exp(-np.logaddexp(0, margin)) / len(x)
    return float(np.logaddexp(0, -margin).mean()), pull @ x, float(pull.sum())


def trained(concept: _Matrix, anchor: _Matrix, split: Split, delta: float) -> Head:
    """Fit a head on the training pairs, then its temperature and threshold on the calibration pairs.

    min over w, b of the mean logistic loss + PENALTY |w|^2 / 2. The temperature has the least calibration loss; the
    threshold gives the largest channel bound at `delta` there. The test pairs are never touched.
    """
    rows = list(split.train)
    x, signs = np.concatenate([concept[rows], anchor[rows]]), np.repeat([1.0, -1.0], len(rows))
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-6)
    x = (x - mean) / scale

    def penalized(wb: _Vector) -> tuple[float, _Vector]:
        loss, slope, lift = risk(wb[:-1], x, signs, float(wb[-1]))
        return loss + PENALTY * float(wb[:-1] @ wb[:-1]) / 2, np.append(slope + PENALTY * wb[:-1], lift)

    found = minimize(penalized, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    return calibrated(Head(mean, scale, found[:-1], float(found[-1])), concept, anchor, split.calibrate, delta)


def calibrated(head: Head, concept: _Matrix, anchor: _Matrix, pairs: Sequence[int], delta: float) -> Head:
    """Set temperature and threshold of a head from some pairs."""
    rows = list(pairs)
    margins = np.concatenate([head.margin(concept[rows]), -head.margin(anchor[rows])])

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0, -margins / np.exp(log_temperature)).mean())

    cooled = replace(head, temperature=float(np.exp(minimize_scalar(loss, bounds=(-3, 6), method="bounded").x)))
    scores = cooled.on(concept, anchor, rows)
    ranks = np.linspace(0, 1, CHOICES)
    levels = [float(level) for level in np.quantile(np.concatenate([scores.concept, scores.anchor]), ranks)]
    return replace(cooled, threshold=max([0.5, *levels], key=lambda level: _worth(scores, level, delta)))


def log_loss(scores: TwinScores) -> float:
    """Mean of -log2 q(C | X) over both arms, in bits: what heads are chosen by on the calibration split."""
    clipped = np.clip(np.concatenate([scores.concept, 1 - scores.anchor]), 1e-3, 1)
    return -float(np.log2(clipped).mean())


def accuracy_p(scores: TwinScores, permutations: int, seed: int) -> float:
    """Permutation p-value of a head's accuracy: how often it is reached when the labels within pairs are tossed.

    (1 + #{as accurate}) / (1 + permutations): uniform on its grid, up to ties on the safe side, where twins are
    exchangeable.
    """
    rng = np.random.default_rng(seed)
    gain = (scores.concept > 0.5).astype(int) - (scores.anchor > 0.5).astype(int)  # correct answers minus one
    signs = rng.choice([-1, 1], size=(permutations, len(gain)))
    return float((1 + ((signs * gain).sum(1) >= gain.sum()).sum()) / (1 + permutations))


def cosine_features(images: Float[np.ndarray, "n c h w"], keep: int = 8) -> _Matrix:
    """Lowest keep x keep coefficients of each channel's cosine transform: what raw pixels say at a coarse scale."""
    waves = dctn(images, axes=(2, 3), norm="ortho")[:, :, :keep, :keep]
    return waves.reshape(len(images), -1)


def stacked(parts: Sequence[Mapping[str, _AnyMatrix]]) -> dict[str, _AnyMatrix]:
    """Join batches of features by extractor."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _worth(scores: TwinScores, level: float, delta: float) -> float:
    n = len(scores.concept)
    return channel_bits((int((scores.concept >= level).sum()), int((scores.anchor >= level).sum())), (n, n), delta)
