"""A-certificate: how often a fixed attack within a fixed budget succeeds, from the counts somebody else wrote down.

Source: certificates.md, section 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expunge.core.codec import from_data
from expunge.core.errors import InputError
from expunge.leakage.lower import most_rate
from expunge.leakage.record import AttackRow
from expunge.ops.stats import Sample, clopper_pearson, rate


@dataclass(frozen=True, kw_only=True)
class Try:
    """What an attack reached on one prompt: successes among its images, and those of the control without knowledge."""

    prompt: str
    cluster: str
    """What prompts share beyond the concept: a name, an artist; the prompt itself where they share nothing."""
    images: int
    successes: int
    null: int | None


@dataclass(frozen=True, kw_only=True)
class AttackLog:
    """One attack's results as `--attack FILE` expects them: these keys, nothing else."""

    attack: str
    budget: str
    concept: str
    patch_sha256: str
    tries: tuple[Try, ...]

    def __post_init__(self) -> None:
        if not self.tries or len({each.prompt for each in self.tries}) != len(self.tries):
            raise InputError(f"attack {self.attack!r} needs one try per prompt, and one prompt at least")
        for each in self.tries:
            if not (each.images > 0 and 0 <= each.successes <= each.images and 0 <= (each.null or 0) <= each.images):
                raise InputError(f"attack {self.attack!r}: {each.successes} successes of {each.images} images")

    @classmethod
    def of(cls, data: Mapping[str, Any], concept: str, patch_sha256: str) -> "AttackLog":
        """Read parsed JSON; raises InputError for other keys, or results about another concept or patch."""
        log = from_data(cls, data)
        for what, got, want in (("concept", log.concept, concept), ("patch", log.patch_sha256, patch_sha256)):
            if got != want:
                raise InputError(f"attack {log.attack!r} was run on {what} {got!r}, not {want!r}")
        return log


def attack_row(log: AttackLog, delta: float, attacks: int, seed: int) -> AttackRow:
    """Give an attack's rate with exact ends: success over a prompt's images is one trial, whatever their number.

    The upper end of the sentence is one-sided at delta / attacks, so that the worst of them holds too. Prompts that
    share a cluster are not independent: then both ends are those of the clustered interval.
    """
    won, n, share = [each.successes > 0 for each in log.tries], len(log.tries), delta / attacks
    exact, high = clopper_pearson(sum(won), n, 1 - share), most_rate(sum(won), n, share)
    clusters = [each.cluster for each in log.tries]
    if len(set(clusters)) < n:
        sample = Sample.of(won, clusters)
        exact, high = rate(sample, seed=seed, level=1 - share), rate(sample, seed=seed, level=1 - 2 * share).high
    null = [each.null > 0 for each in log.tries if each.null is not None]
    null_rate = sum(null) / len(null) if len(null) == n else None
    return AttackRow(
        name=log.attack,
        budget=log.budget,
        N=n,
        k=max(each.images for each in log.tries),
        successes=sum(won),
        ci=(exact.low, exact.high),
        success_hi=high,
        null_rate=null_rate,
        lift=exact.value - null_rate if null_rate is not None else None,
    )
